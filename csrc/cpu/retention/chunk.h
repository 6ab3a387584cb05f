// Retention on a CPU. Both passes are scans of one form over the tokens of a head: each token writes an outer product
// into a state M [K, V], and tokens read it from the left, from the right or from both sides:
//
//   M = exp(log_decay) M + a (x) b          y = c . M          z = M . d
//
//   forward                       a = k   b = v   c = q                y = o
//   backward, in order            a = k   b = v           d = do       z = dq
//   backward, last token first    a = q   b = do  c = k   d = v        y = dv   z = dk     M = the state's gradient
//
// A scan goes in chunks of tokens. In a chunk there are four decays: decay[j, i] from writer j to a reader i >= j (0
// for i < j), in[i] from the state that enters to reader i, out[j] from writer j to the state that leaves, and in_end
// across:
//
//   y   = (c in) M       + left^T b           left[j, i]  = decay[j, i] a[j] . c[i]
//   z^T = M (d in)^T     + a^T right          right[j, i] = decay[j, i] b[j] . d[i]
//   M'  = in_end M       + a^T (b out)
//
// These are all the products there are. Heads that share q, k or v go through a chunk one after another: q and k are
// packed once for those that share them, a . c is summed once where they share both, and y, z and `right` are summed
// over those that share what they are gradients of. Included by retention's kernels only.
#pragma once

#include "decays.h"
#if defined(__AVX512BF16__)
#include "operands_pairs.h"
#else
#include "operands.h"
#endif

namespace ISA {
namespace {

// The memory of one head: its decays and its state.
template <typename R>
struct HeadMemory {
  Decays<R> decays;
  State<R> state;

  HeadMemory() = default;
  HeadMemory(Memory<R>& memory, int64_t K, int64_t V) : decays(memory), state(memory, K, V) {}
};

// Which of the heads in a chunk come first and last of those that share a tensor.
struct Sharing {
  bool first, last;
};

template <typename R>
void add(const Panels<R>& x, const Panels<R>& to) {
  for (int64_t column = 0; column < CHUNK; column += W<R>)
    for (int64_t i = 0; i < x.rows * W<R>; i += LANES<R>)
      store(to.at(0, column) + i, load(to.at(0, column) + i) + load(x.at(0, column) + i));
}

// Memory for one chunk of one head after another, in the names of the equations.
template <typename R>
struct Workspace : Memory<R> {
  const int64_t K, V;
  const Writers<R> a{*this, K};
  const Values<R> b{*this, V};             // weighed: b out
  const Panels<R> y = this->panels(CHUNK, V);
  const LeftReaders<R> c{*this, K};        // weighed: c in
  const Panels<R> z = this->panels(K, CHUNK), z_of_head;
  const RightReaders<R> d{*this, V};       // weighed: d in
  const LeftScores<R> left{*this};
  const RightScores<R> right{*this};
  const Panels<R> left_products, right_products;
  Ahead ahead;
#if defined(__AMX_BF16__)
  const Tiles tiles;
#endif

  // For a head alone, or several: its products fade where they are.
  Workspace(R* memory, int64_t K, int64_t V, bool several)
      : Memory<R>{memory},
        K(K),
        V(V),
        z_of_head(several ? this->panels(K, CHUNK) : z),
        left_products(several ? this->panels(CHUNK, CHUNK) : left.sums),
        right_products(several ? this->panels(CHUNK, CHUNK) : right.sums) {}

  int64_t state_bytes() const { return sizeof(R) * K * padded<R>(V); }

  // The rows behind these n, which the next chunk will need.
  template <typename E>
  void expect(const Rows<E>& rows, int64_t n, int64_t width) {
    if (rows.first) ahead.add(rows.at(n), rows.step, CHUNK, width);
  }
  template <typename E>
  void take_writers(int64_t n, const Rows<const E>& from, R factor, Reads reads) {
    a.take(from, n, K, factor, reads);
    expect(from, n, K);
  }
  template <typename E>
  void take_values(int64_t n, const Rows<const E>& from, const R* out, Reads reads) {
    b.take(from, n, V, out, reads);
    expect(from, n, V);
  }
  // Those of the heads behind the first are weighed only; none where there is no `in`.
  template <typename E>
  void take_left_readers(int64_t n, const Rows<const E>& from, R factor, const R* in, bool first) {
    if (!first) return in ? c.weigh(from, n, K, factor, in) : void();
    c.take(from, n, K, factor, in);
    expect(from, n, K);
  }
  template <typename E>
  void take_right_readers(int64_t n, const Rows<const E>& from, const R* in) {
    d.take(from, n, V, in);
    expect(from, n, V);
  }

  // to[j, i] = x[j] . y[i] down to the diagonal: the first rows of the panel of columns i, or all n.
  template <typename Left, typename Right>
  void products(int64_t n, int64_t depth, const Left& x, const Right& y, const Panels<R>& to) {
    for (int64_t i = 0; i < n; i += W<R>)
      multiply(ahead, x, y.at(0, i), to.at(0, i), n < i + W<R> ? n : i + W<R>, depth, R(0));
  }
  void find_left(const HeadMemory<R>& head, int64_t n, bool first) {
    if (first) products(n, K, a.by_width, c.by_width, left_products);
    head.decays.fade(n, left_products, left.sums, false);
    left.round(n);
  }
  // z^T, of which the last head of those that share a and of those that share z add what does not come from the state.
  // Where asked: `through_state`, the part of c . z that comes from it, and sums of left times right.
  void read_from_right(const HeadMemory<R>& head, int64_t n, Sharing of_a, Sharing of_z, R* through_state, R* pairs) {
    products(n, V, b.by_width, d.by_width, right_products);
    if (pairs) sum_pairs(head, n, pairs);
    head.decays.fade(n, right_products, right.sums, !of_a.first && !of_z.first);
    const Panels<R>& read = through_state && !of_z.first ? z_of_head : z;
    for (int64_t i = 0; i < n; i += W<R>)
      multiply(ahead, head.state.by_column, d.weighed.at(0, i), read.at(0, i), K, V,
               R(read.data == z.data && !of_z.first), IN_RUNS);
    if (through_state) c.products(read, through_state);
    if (read.data != z.data) add(read, z);
    if (!of_a.last && !of_z.last) return;
    right.round(n);
    for (int64_t i = 0; i < n; i += W<R>)
      multiply(ahead, a.by_token, right.by_writer.at(0, i), z.at(0, i), K, n < i + W<R> ? n : i + W<R>, R(1));
  }
  // y where it is read from the left, and M': panel by panel, each read and written while it is in L1.
  void write(const HeadMemory<R>& head, int64_t n, bool first_of_y, Reads reads) {
    for (int64_t v = 0; v < V; v += W<R>) {
      if (reads & FROM_LEFT) {
        multiply(ahead, c.weighed, head.state.by_row.at(0, v), y.at(0, v), n, K, R(!first_of_y),
                 reads == BOTH ? IN_RUNS : FULL);
        multiply(ahead, left.by_writer, b.by_token.at(0, v), y.at(0, v), n, n, R(1), TRIANGLE);
      }
      head.state.advance(ahead, a.by_token, b.weighed, v, n, head.decays.in_end, reads);
    }
    ahead.count = 0;
  }
  // M' alone, of a state elsewhere.
  void write_to(const Panels<R>& state, int64_t n, R in_end) {
    for (int64_t v = 0; v < V; v += W<R>)
      multiply(ahead, a.by_token, b.weighed.at(0, v), state.at(0, v), K, n, in_end);
    ahead.count = 0;
  }

  template <typename E>
  void put_y(int64_t n, const Sink<E>& to) {
    unpack(y, n, V, to);
    expect(to.whole, n, V);
  }
  template <typename E>
  void put_z(int64_t n, R factor, const Sink<E>& to) {
    unpack_transposed(z, n, K, factor, to);
    expect(to.whole, n, K);
  }

  // sums[r]: left[j, i] right[j, i] over j <= r < i, what the rate of token r lies between. Only `left` has faded yet.
  void sum_pairs(const HeadMemory<R>& head, int64_t n, R* sums) {
    R after[CHUNK] = {};
    for (int64_t r = 0; r < n; r++) {
      Vec<R> total{};
      for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
        const Vec<R> pairs = load(left.sums.at(r, i)) * load(right_products.at(r, i));
        store(after + i, load(after + i) + (load(head.decays.between.at(r, i)) == 0 ? Vec<R>{} : pairs));
      }
      after[r] = 0;
      for (int64_t i = 0; i < CHUNK; i += LANES<R>) total += load(after + i);
      sums[r] = sum<R>(total);
    }
  }
};

template <typename R>
double product(const Panels<R>& x, const Panels<R>& y, int64_t columns) {
  double total = 0;
  for_vectors<R>(columns, [&](int64_t column, int64_t) {
    Vec<R> sums{};
    for (int64_t row = 0; row < x.rows; row++) sums = fma(load(x.at(row, column)), load(y.at(row, column)), sums);
    total += sum<R>(sums);
  });
  return total;
}

}  // namespace
}  // namespace ISA
