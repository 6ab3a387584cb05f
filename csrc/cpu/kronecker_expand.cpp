// LiGO's expansion on a CPU: blocks of products of matrices, and mixes of layers.
//
// A block of a result is [columns / W, rows, W] in scratch memory. What is multiplied is packed in panels of W, of RUN
// steps of the sum at a time, and each run's sum is added to the block: float32 sums are RUN long at most. Of what is
// mixed, all layers' blocks lie in each other, row r of layer j behind row r of layer j - 1, so that a mix is a product
// by the same micro-kernel: mix [made, old] times [old, W].

#include "kronecker_expand.h"

#include "blocks.h"

namespace ISA {
namespace {

// Sizes of a block of a result, and where it begins.
struct Place {
  int64_t top, left, rows, columns;

  Place(const Blocks& x, int64_t block)
      : top(block / x.across() * x.height),
        left(block % x.across() * x.width),
        rows(x.rows - top < x.height ? x.rows - top : x.height),
        columns(x.columns - left < x.width ? x.columns - left : x.width) {}
};

// dmix [J columns of it], of two rows: sums over lanes of grad times x. A recursion, as Sums.
template <int J, typename R>
struct Dots {
  Vec<R> first{}, second{};
  Dots<J - 1, R> below;

  INLINE_MEMBER void add(const R* x, Vec<R> grad0, Vec<R> grad1) {
    const Vec<R> value = load(x);
    first = fma(value, grad0, first);
    second = fma(value, grad1, second);
    below.add(x + W<R>, grad0, grad1);
  }
  INLINE_MEMBER void put(double* row0, double* row1) const {
    *row0 += sum<R>(first);
    if (row1) *row1 += sum<R>(second);
    below.put(row0 + 1, row1 ? row1 + 1 : row1);
  }
};
template <typename R>
struct Dots<0, R> {
  INLINE_MEMBER void add(const R*, Vec<R>, Vec<R>) {}
  INLINE_MEMBER void put(double*, double*) const {}
};

// Of `chunks` of W columns, [chunks, made, W] and [chunks, old, W], J layers of old ones.
template <int J, typename R>
__attribute__((noinline)) void dots(const R* grad, int64_t grad_step, const R* grad1, const R* x, int64_t x_step,
                                    int64_t chunks, double* row0, double* row1) {
  Dots<J, R> sums;
  for (int64_t i = 0; i < chunks; i++, grad += grad_step, grad1 += grad_step, x += x_step)
    for (int64_t lane = 0; lane < W<R>; lane += LANES<R>) sums.add(x + lane, load(grad + lane), load(grad1 + lane));
  sums.put(row0, row1);
}
template <int J, typename R, typename... Rest>
INLINE void dots_of(int64_t count, Rest... rest) {
  if constexpr (J > 1)
    if (count < J) return dots_of<J - 1, R>(count, rest...);
  dots<J, R>(rest...);
}

constexpr int64_t TOGETHER = 6;    // 12 sums, as AVX2's registers hold

template <typename E, typename R = Real<E>>
struct Mixing {
  const Mix<E>& p;
  const Place place;
  R *a, *b, *x, *made, *out, *to_made, *to_old;
  const Block<R> block;            // row r of layer 0; layer j's follows W further on

  Mixing(const Mix<E>& p, int64_t task, R* scratch)
      : p(p),
        place(p.blocks, task),
        a(scratch),
        b(a + RUN * p.blocks.height),
        x(b + RUN * p.blocks.width),
        made(x + p.blocks.height * p.blocks.width * p.old),
        out(made + p.STRIP * p.blocks.width * p.made),
        to_made(out + p.STRIP * p.blocks.width * (p.made > p.old ? p.made : p.old)),
        to_old(to_made + (p.made + 31) / 32 * 32 * p.old),
        block{x, p.old * W<R>, place.rows * p.old * W<R>} {}

  Block<R> layer(int64_t j) const { return {block.data + j * W<R>, block.row, block.panel}; }

  void find_layers() const {
    if (!p.depth)
      for (int64_t j = 0; j < p.old; j++)
        pack(p.a.at(j).from(place.top, place.left), place.rows, place.columns, layer(j));
    for (int64_t d = 0; d < p.depth; d += RUN) {
      const int64_t run = p.depth - d < RUN ? p.depth - d : RUN;
      for (int64_t j = 0; j < p.old; j++) {
        if (j == 0 || p.b.layer) pack_right(p.b.at(j).from(d, place.left), run, place.columns, b);
        pack_left(p.a.at(j).from(place.top, d), place.rows, run, a);
        multiply_packed(a, b, place.rows, place.columns, run, d > 0, layer(j));
      }
    }
  }

  // to [count, rows, columns] (+)= the mix of `of` layers of a strip that begins at x; weights [of, count] in panels
  void mix_strip(const R* weights, int64_t of, int64_t count, const R* x, int64_t panel, int64_t top, int64_t rows,
                 const Layers<E>& to) const {
    const int64_t width = padded<R>(place.columns), step = count * W<R>;
    if (p.add)
      for (int64_t i = 0; i < count; i++)
        pack(to.at(i).from(top, place.left), rows, place.columns, Block<R>{out + i * W<R>, step, rows * step});
    for (int64_t left = 0; left < width; left += W<R>)
      for (int64_t r = 0; r < rows; r++)
        multiply_panels(weights, x + left / W<R> * panel + r * of * W<R>, count, W<R>, of, p.add,
                        Block<R>{out + (left / W<R> * rows + r) * step, W<R>, 0});
    for (int64_t i = 0; i < count; i++)
      unpack(Block<R>{out + i * W<R>, step, rows * step}, rows, place.columns, to.at(i).from(top, place.left));
  }

  void find_dots(const R* x, int64_t rows, double* dmix) const {
    const int64_t g = p.made * W<R>, panel = rows * g;
    for (int64_t left = 0; left < place.columns; left += W<R>) {
      const R* grad = made + left / W<R> * panel;
      const R* layers = x + left / W<R> * block.panel;
      for (int64_t i = 0; i < p.made; i += 2)
        for (int64_t j = 0; j < p.old; j += TOGETHER) {
          const bool two = i + 1 < p.made;
          double* sums = dmix + i * p.old + j;
          dots_of<TOGETHER, R>(p.old - j, grad + i * W<R>, g, grad + (i + two) * W<R>, layers + j * W<R>, block.row,
                               rows, sums, two ? sums + p.old : nullptr);
        }
    }
  }

  void run(double* dmix) const {
    find_layers();
    pack(p.mix, 1, p.old, p.old, p.made, Block<R>{to_made, W<R>, p.old * W<R>});
    pack(p.mix, p.old, 1, p.made, p.old, Block<R>{to_old, W<R>, p.made * W<R>});
    for (int64_t r = 0; r < place.rows; r += p.STRIP) {
      const int64_t rows = place.rows - r < p.STRIP ? place.rows - r : p.STRIP, top = place.top + r;
      const R* strip = x + r * block.row;
      if (p.out) mix_strip(to_made, p.old, p.made, strip, block.panel, top, rows, p.out);
      if (!p.grad) continue;
      const int64_t step = p.made * W<R>;
      for (int64_t i = 0; i < p.made; i++)
        pack(p.grad.at(i).from(top, place.left), rows, place.columns, Block<R>{made + i * W<R>, step, rows * step});
      if (p.back) mix_strip(to_old, p.made, p.old, made, rows * step, top, rows, p.back);
      if (dmix) find_dots(strip, rows, dmix);
    }
  }
};

}  // namespace

template <typename E>
void multiply_block(const Product<E>& p, int64_t task, Real<E>* scratch) {
  using R = Real<E>;
  const ForProducts here;
  const Place place(p.blocks, task % p.blocks.count());
  const int64_t l = task / p.blocks.count(), last = (l + 1) * p.terms < p.pairs ? (l + 1) * p.terms : p.pairs;
  R *a = scratch, *b = a + RUN * p.blocks.height;
  const Block<R> c{b + RUN * p.blocks.width, W<R>, place.rows * W<R>};
  bool add = false;
  if (p.plus) pack(p.plus.at(l).from(place.top, place.left), place.rows, place.columns, c), add = true;
  for (int64_t j = l * p.terms; j < last; j++)
    for (int64_t d = 0; d < p.depth; d += RUN, add = true) {
      const int64_t run = p.depth - d < RUN ? p.depth - d : RUN;
      pack_left(p.a.at(j).from(place.top, d), place.rows, run, a);
      pack_right(p.b.at(j).from(d, place.left), run, place.columns, b);
      multiply_packed(a, b, place.rows, place.columns, run, add, c);
    }
  unpack(c, place.rows, place.columns, p.c.at(l).from(place.top, place.left));
}

template <typename E>
void mix_block(const Mix<E>& p, int64_t task, Real<E>* scratch) {
  const ForProducts here;
  double* dmix = p.dmix ? p.dmix + task * p.made * p.old : nullptr;
  for (int64_t i = 0; dmix && i < p.made * p.old; i++) dmix[i] = 0;
  Mixing<E>(p, task, scratch).run(dmix);
}

#define INSTANTIATE(E)                                                 \
  template void multiply_block(const Product<E>&, int64_t, Real<E>*);  \
  template void mix_block(const Mix<E>&, int64_t, Real<E>*);
INSTANTIATE(bf16)
#if !defined(__AVX512BF16__)
INSTANTIATE(float)
INSTANTIATE(double)
#endif

}  // namespace ISA
