// LiGO's expansion on a CPU: blocks of products of matrices, and mixes of layers.
//
// A block of a result is [columns / W, rows, W] in scratch memory, or lies where it belongs, if that are rows of whole
// panels: tiles then store to memory, and mixes read layers from it and write them to it. What is multiplied is packed
// in panels of W, of RUN steps of the sum at a time, and each run's sum is added to the block: float32 sums are RUN
// long at most. Of what is mixed and not in memory, all layers' blocks lie in each other, row r of layer j behind row r
// of layer j - 1: of a row, the layers are the right operand of a product, mix [made, old] times [old, W].

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

// Layers of a block, rows of whole panels: as they lie in memory, or packed.
template <typename S>
struct Lying {
  S* data;
  int64_t row, panel, layer;

  INLINE_MEMBER S* at(int64_t l, int64_t r, int64_t column) const {
    return data + l * layer + r * row + column / W<Real<S>> * panel;
  }
};

// dmix [J columns of it], of two rows: sums over lanes of grad times x. A recursion, as Sums.
template <int J, typename R>
struct Dots {
  Vec<R> first{}, second{};
  Dots<J - 1, R> below;

  template <typename X>
  INLINE_MEMBER void add(const X* x, int64_t layer, Vec<R> grad0, Vec<R> grad1) {
    const Vec<R> value = load(x);
    first = fma(value, grad0, first);
    second = fma(value, grad1, second);
    below.add(x + layer, layer, grad0, grad1);
  }
  INLINE_MEMBER void put(double* row0, double* row1) const {
    *row0 += sum<R>(first);
    if (row1) *row1 += sum<R>(second);
    below.put(row0 + 1, row1 ? row1 + 1 : row1);
  }
};
template <typename R>
struct Dots<0, R> {
  template <typename X>
  INLINE_MEMBER void add(const X*, int64_t, Vec<R>, Vec<R>) {}
  INLINE_MEMBER void put(double*, double*) const {}
};

// Of a panel of so many rows, two layers of new ones, the second of which may be the first, and J of old ones.
template <int J, typename G, typename X>
__attribute__((noinline)) void dots(const Lying<G>& grad, const Lying<X>& x, int64_t rows, double* row0,
                                    double* row1) {
  using R = Real<G>;
  Dots<J, R> sums;
  const G *first = grad.data, *second = row1 ? first + grad.layer : first;
  const X* layers = x.data;
  for (int64_t r = 0; r < rows; r++, first += grad.row, second += grad.row, layers += x.row)
    for (int64_t lane = 0; lane < W<R>; lane += LANES<R>)
      sums.add(layers + lane, x.layer, load(first + lane), load(second + lane));
  sums.put(row0, row1);
}
template <int J, typename... Rest>
INLINE void dots_of(int64_t count, const Rest&... rest) {
  if constexpr (J > 1)
    if (count < J) return dots_of<J - 1>(count, rest...);
  dots<J>(rest...);
}

constexpr int64_t TOGETHER = 6;    // 12 sums, as AVX2's registers hold

// Of a row of a panel, COUNT layers: to = keep to + the sum of the weights of `of` layers times these.
template <int COUNT, typename From, typename To, typename R>
__attribute__((noinline)) void mix_row(const R* weights, int64_t of, const From* from, int64_t layer, int64_t ahead,
                                       R keep, To* to, int64_t to_layer) {
  Sums<COUNT, R> sums;
  for (int64_t j = 0; j < of; j++, weights += W<R>, from += layer) {
    __builtin_prefetch(from + ahead);
    __builtin_prefetch(from + ahead + LANES<R>);
    sums.add(weights, 1, load(from), load(from + LANES<R>));
  }
  keep == 0 ? sums.put(to, to_layer, R(0)) : sums.put(to, to_layer, keep);
}
template <int COUNT, typename... Rest>
INLINE void mix_row_of(int64_t count, Rest... rest) {
  if constexpr (COUNT > 1)
    if (count < COUNT) return mix_row_of<COUNT - 1>(count, rest...);
  mix_row<COUNT>(rest...);
}

template <typename E, typename R = Real<E>>
struct Mixing {
  const Mix<E>& p;
  const Place place;
  R *a, *b, *x, *made, *out, *to_made, *to_old;
  const Block<R> block;            // row r of layer 0; layer j's follows W further on
  const bool there;                // what is mixed lies in memory

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
        block{x, p.old * W<R>, place.rows * p.old * W<R>},
        there(!p.depth && in_panels<R>(p.a, place.columns)) {}

  Block<R> layer(int64_t j) const { return {block.data + j * W<R>, block.row, block.panel}; }

  void find_layers() const {
    if (!p.depth && !there)
      for (int64_t j = 0; j < p.old; j++)
        pack(p.a.at(j).from(place.top, place.left), place.rows, place.columns, layer(j));
    for (int64_t d = 0; d < p.depth; d += RUN) {
      const int64_t run = p.depth - d < RUN ? p.depth - d : RUN;
      for (int64_t j = 0; j < p.old; j++) {
        if (j == 0 || p.b.layer) pack_right(p.b.at(j).from(d, place.left), run, place.columns, b);
        if (j == 0 || p.a.layer) pack_left(p.a.at(j).from(place.top, d), place.rows, run, a);
        multiply_packed(a, b, place.rows, place.columns, run, d > 0, layer(j));
      }
    }
  }

  // f(the layers as they lie, from a row on)
  template <typename F>
  static void as_they_lie(const Layers<E>& x, F f) {
    if (x.exact)
      f(Lying<R>{x.exact, x.row, W<R>, x.layer});
    else
      f(Lying<E>{x.rounded, x.row, W<R>, x.layer});
  }
  template <typename F>
  void with_old(int64_t r, F f) const {
    if (there)
      as_they_lie(p.a.from(place.top + r, place.left), f);
    else
      f(Lying<R>{x + r * block.row, block.row, block.panel, W<R>});
  }
  template <typename F>
  void with_grad(const Layers<E>& grad, int64_t rows, F f) const {
    if (in_panels<R>(grad, place.columns)) return as_they_lie(grad, f);
    const int64_t step = p.made * W<R>;
    for (int64_t i = 0; i < p.made; i++)
      pack(grad.at(i), rows, place.columns, Block<R>{made + i * W<R>, step, rows * step});
    f(Lying<R>{made, step, rows * step, W<R>});
  }

  // to [count, rows, columns] (+)= the mix of `of` layers of a strip; weights [of, count] in panels
  template <typename From>
  void mix_strip(const R* weights, int64_t of, int64_t count, const Lying<From>& from, int64_t rows,
                 const Layers<E>& to) const {
    const auto mix = [&](const auto& to) {
      const int64_t tiles = (count + TALLEST - 1) / TALLEST, height = (count + tiles - 1) / tiles;
      const int64_t ahead = from.layer == W<R> ? 0 : AHEAD * from.row;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t left = 0; left < place.columns; left += W<R>)
          for (int64_t i = 0; i < count;) {
            const int64_t more = W<R> - i % W<R> < count - i ? W<R> - i % W<R> : count - i;
            const int64_t some = more < height ? more : height;
            mix_row_of<TALLEST>(some, Panels<R>{(R*)weights, of}.at(0, i), of, (const From*)from.at(0, r, left),
                                from.layer, ahead, R(p.add), to.at(i, r, left), to.layer);
            i += some;
          }
    };
    if (in_panels<R>(to, place.columns)) return as_they_lie(to, mix);
    const int64_t step = count * W<R>;
    const auto held = [&](int64_t i) { return Block<R>{out + i * W<R>, step, rows * step}; };
    for (int64_t i = 0; p.add && i < count; i++) pack(to.at(i), rows, place.columns, held(i));
    mix(Lying<R>{out, step, rows * step, W<R>});
    for (int64_t i = 0; i < count; i++) unpack(held(i), rows, place.columns, to.at(i));
  }

  template <typename G, typename X>
  void find_dots(const Lying<G>& grad, const Lying<X>& x, int64_t rows, double* dmix) const {
    for (int64_t left = 0; left < place.columns; left += W<R>)
      for (int64_t i = 0; i < p.made; i += 2)
        for (int64_t j = 0; j < p.old; j += TOGETHER) {
          double* sums = dmix + i * p.old + j;
          dots_of<TOGETHER>(p.old - j, Lying<G>{grad.at(i, 0, left), grad.row, 0, grad.layer},
                            Lying<X>{x.at(j, 0, left), x.row, 0, x.layer}, rows, sums,
                            i + 1 < p.made ? sums + p.old : nullptr);
        }
  }

  void run(double* dmix) const {
    find_layers();
    pack(p.mix, 1, p.old, p.old, p.made, Block<R>{to_made, W<R>, p.old * W<R>});
    pack(p.mix, p.old, 1, p.made, p.old, Block<R>{to_old, W<R>, p.made * W<R>});
    for (int64_t r = 0; r < place.rows; r += p.STRIP) {
      const int64_t rows = place.rows - r < p.STRIP ? place.rows - r : p.STRIP;
      const auto strip = [&](const Layers<E>& x) { return x.from(place.top + r, place.left); };
      if (p.out)
        with_old(r, [&](const auto& x) { mix_strip(to_made, p.old, p.made, x, rows, strip(p.out)); });
      if (!p.grad) continue;
      with_grad(strip(p.grad), rows, [&](const auto& grad) {
        if (p.back) mix_strip(to_old, p.made, p.old, grad, rows, strip(p.back));
        if (dmix) with_old(r, [&](const auto& x) { find_dots(grad, x, rows, dmix); });
      });
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
  const Layers<E> to = p.c.at(l).from(place.top, place.left), plus = p.plus.at(l).from(place.top, place.left);
  const bool in_memory = ROWS_MAY_BE_APART && to.exact && in_panels<R>(to, place.columns);
  const Block<R> c = in_memory ? Block<R>{to.exact, to.row, W<R>}
                               : Block<R>{b + RUN * p.blocks.width, W<R>, place.rows * W<R>};
  bool add = bool(p.plus);
  if (add && !(in_memory && plus.exact == to.exact)) pack(plus, place.rows, place.columns, c);
  for (int64_t j = l * p.terms; j < last; j++)
    for (int64_t d = 0; d < p.depth; d += RUN, add = true) {
      const int64_t run = p.depth - d < RUN ? p.depth - d : RUN;
      pack_left(p.a.at(j).from(place.top, d), place.rows, run, a);
      pack_right(p.b.at(j).from(d, place.left), run, place.columns, b);
      multiply_packed(a, b, place.rows, place.columns, run, add, c);
    }
  if (!in_memory) unpack(c, place.rows, place.columns, to);
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
