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
//   M'  = in_end M       + (a out)^T b
//
// These are all the products there are. Included by retention's kernels only.
#pragma once

#include "../curves.h"
#if defined(__AVX512BF16__)
#include "operands_pairs.h"
#else
#include "operands.h"
#endif

namespace ISA {
namespace {

// 2^x for CHUNK x <= 0. What rounding x to float loses is 8 ulps of 2^x at x = -17: it is multiplied back. 0 where the
// vectors' exp2 stops, at 1.2e-38: what is forgotten is gone.
template <typename R>
INLINE void powers_of_two(const double* x, R* powers) {
  R rounded[CHUNK], lost[CHUNK];
  for (int64_t i = 0; i < CHUNK; i++) rounded[i] = R(x[i]), lost[i] = R((x[i] - rounded[i]) * 0.6931471805599453);
  for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
    const Vec<R> power = exp2(load(rounded + i)), exact = fma(power, load(lost + i), power);
    store(powers + i, load(rounded + i) < R(sizeof(R) == 4 ? -126 : -1022) ? Vec<R>{} : exact);
  }
}

// Memory for one chunk and the state, in the names of the equations.
template <typename R>
struct Workspace : Memory<R> {
  const int64_t K, V;
  const Writers<R> a{*this, K};            // weighed: a out
  const Values<R> b{*this, V};
  const Panels<R> y = this->panels(CHUNK, V);
  const LeftReaders<R> c{*this, K};        // weighed: c in
  const Panels<R> z = this->panels(K, CHUNK);
  const RightReaders<R> d{*this, V};       // weighed: d in
  const Panels<R> decay = this->panels(CHUNK, CHUNK);
  const LeftScores<R> left{*this};
  const RightScores<R> right{*this};
  const State<R> state{*this, K, V};
  R *const in = this->take(CHUNK), *const out = this->take(CHUNK), in_end = 0;
  int64_t decays_of = 0;                   // the n that decay, in and out are for; 0: none
  Ahead ahead;
#if defined(__AMX_BF16__)
  const Tiles tiles;
#endif

  Workspace(R* memory, int64_t K, int64_t V) : Memory<R>{memory}, K(K), V(V) {}

  int64_t state_bytes() const { return sizeof(R) * K * padded<R>(V); }

  // The decays of n tokens with these rates. A token's own rate counts before the token, but after it in a scan from the
  // last one. A rate below -1e3 would swallow its neighbours in the sums, which are float64: beside a decay of e^-100
  // float32 would leave 1e-5.
  void enter(const Rows<const R>& rates, int64_t n, bool reversed) {
    if (rates.step == 0 && decays_of == n) return;
    decays_of = n;
    constexpr double NEVER = -1e6, HALVINGS = 1.4426950408889634;
    double time[CHUNK], x[CHUNK], now = 0;
    for (int64_t i = 0; i < n; i++) {
      const double rate = *rates.at(i), before = now;
      now += HALVINGS * (rate < -1e3 ? -1e3 : rate);
      time[i] = reversed ? before : now;
    }
    for (int64_t i = n; i < CHUNK; i++) time[i] = NEVER;
    R row[CHUNK];
    for (int64_t j = 0; j < n; j++) {
      for (int64_t i = 0; i < CHUNK; i++) {
        const double since = time[i] - time[j];  // inside ?: it would be a branch
        x[i] = i < j ? NEVER : since;
      }
      powers_of_two(x, row);
      for (int64_t i = 0; i < CHUNK; i += LANES<R>) store(decay.at(j, i), load(row + i));
    }
    powers_of_two(time, in);
    for (int64_t i = 0; i < CHUNK; i++) x[i] = i < n ? now - time[i] : now;
    powers_of_two(x, out);
    x[0] = now;
    powers_of_two(x, row);
    in_end = row[0];
  }

  // The rows behind these n, which the next chunk will need.
  template <typename E>
  void expect(const Rows<E>& rows, int64_t n, int64_t width) {
    if (rows.first) ahead.add(rows.at(n), rows.step, CHUNK, width);
  }
  template <typename E>
  void take_writers(int64_t n, const Rows<const E>& from_a, R factor, const Rows<const E>& from_b, Reads reads) {
    a.take(from_a, n, K, factor, out, reads);
    b.take(from_b, n, V, reads);
    expect(from_a, n, K);
    expect(from_b, n, V);
  }
  template <typename E>
  void take_left_readers(int64_t n, const Rows<const E>& from, R factor, Reads reads) {
    c.take(from, n, K, factor, in, reads);
    expect(from, n, K);
  }
  template <typename E>
  void take_right_readers(int64_t n, const Rows<const E>& from) {
    d.take(from, n, V, in);
    expect(from, n, V);
  }

  // to[j, i] = x[j] . y[i] down to the diagonal: the first rows of the panel of columns i, or all n.
  template <typename Left, typename Right>
  void products(int64_t n, int64_t depth, const Left& x, const Right& y, const Panels<R>& to) {
    for (int64_t i = 0; i < n; i += W<R>)
      multiply(ahead, x, y.at(0, i), to.at(0, i), n < i + W<R> ? n : i + W<R>, depth, R(0));
  }
  // ... times decay. What a decay of 0 hides may be anything.
  void fade(int64_t n, const Panels<R>& x) {
    for (int64_t j = 0; j < n; j++)
      for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
        const Vec<R> weight = load(decay.at(j, i));
        store(x.at(j, i), weight == 0 ? Vec<R>{} : weight * load(x.at(j, i)));
      }
  }

  void find_left(int64_t n) {
    products(n, K, a.by_width, c.by_width, left.sums);
    fade(n, left.sums);
    left.round(n);
  }
  // z^T, and where asked: `through_state`, the part of c . z that comes from the state, and sums of left times right.
  void read_from_right(int64_t n, R* through_state, R* pairs) {
    products(n, V, b.by_width, d.by_width, right.sums);
    if (pairs) sum_pairs(n, pairs);
    fade(n, right.sums);
    right.round(n);
    for (int64_t i = 0; i < n; i += W<R>)
      multiply(ahead, state.by_column, d.weighed.at(0, i), z.at(0, i), K, V, R(0));
    if (through_state) c.products(z, through_state);
    for (int64_t i = 0; i < n; i += W<R>)
      multiply(ahead, a.by_token, right.by_writer.at(0, i), z.at(0, i), K, n < i + W<R> ? n : i + W<R>, R(1));
  }
  // y where it is read from the left, and M': panel by panel, each read and written while it is in L1.
  void write(int64_t n, Reads reads) {
    for (int64_t v = 0; v < V; v += W<R>) {
      if (reads & FROM_LEFT) {
        multiply(ahead, c.weighed, state.by_row.at(0, v), y.at(0, v), n, K, R(0));
        multiply(ahead, left.by_writer, b.by_token.at(0, v), y.at(0, v), n, n, R(1), TRIANGLE);
      }
      state.advance(ahead, a.weighed, b.by_token, v, n, in_end, reads);
    }
    ahead.count = 0;
  }
  // M' alone, of a state elsewhere.
  void write_to(const Panels<R>& state, int64_t n) {
    for (int64_t v = 0; v < V; v += W<R>)
      multiply(ahead, a.weighed, b.by_token.at(0, v), state.at(0, v), K, n, in_end);
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
  void sum_pairs(int64_t n, R* sums) {
    R after[CHUNK] = {};
    for (int64_t r = 0; r < n; r++) {
      Vec<R> total{};
      for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
        const Vec<R> pairs = load(left.sums.at(r, i)) * load(right.sums.at(r, i));
        store(after + i, load(after + i) + (load(decay.at(r, i)) == 0 ? Vec<R>{} : pairs));
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
