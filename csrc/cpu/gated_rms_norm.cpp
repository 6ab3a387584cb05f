// Gated RMS norm on a CPU. A row is read twice, the second time from the cache.

#include "gated_rms_norm.h"

#include "vec.h"

namespace ISA {
namespace {

// Sums lose the roundings of so many terms, then so many sums: 2048 rows of a task 8 and what an exact sum loses.
constexpr int64_t ROWS = 8, STRETCH = 64;

// f(i, count, sums) for each vector of a row, which adds to the sums; these are returned.
template <typename R, int COUNT>
struct Sums {
  Vec<R> lanes[COUNT] = {};
};
template <typename R, int COUNT, typename F>
INLINE Sums<R, COUNT> sum_row(int64_t D, F f) {
  Sums<R, COUNT> total;
  for (int64_t begin = 0; begin < D; begin += STRETCH * LANES<R>) {
    const int64_t left = D - begin, size = left < STRETCH * LANES<R> ? left : STRETCH * LANES<R>;
    Sums<R, COUNT> part;
    for_each_vector<R>(size, [&](int64_t i, auto count) { f(begin + i, count, part.lanes); });
    for (int i = 0; i < COUNT; i++) total.lanes[i] += part.lanes[i];
  }
  return total;
}

template <bool GATED, bool WEIGHTED, typename E>
void forward(const GatedRmsNorm<E>& p, int64_t row) {
  using R = Real<E>;
  const int64_t D = p.D;
  const E *x = p.x + row * p.x_row, *gate = p.gate + row * p.gate_row;
  const R* weight = p.weight;
  E* y = p.y + row * D;
  const auto sums = sum_row<R, 1>(D, [&](int64_t i, auto count, Vec<R>* sums) {
    const Vec<R> v = load(x + i, count);
    sums[0] = fma(v, v, sums[0]);
  });
  const R scale = 1 / sqrt(sum<R>(sums.lanes[0]) / D + R(p.eps));
  for_each_vector<R>(D, [&](int64_t i, auto count) {
    Vec<R> v = load(x + i, count) * scale;
    if (WEIGHTED) v *= load(weight + i, count);
    if (GATED) v *= silu_to<E>(load(gate + i, count));
    store(y + i, v, count);
  });
}

// With n = x / rms(x) and h = dy silu(gate) weight: dx = (h - n mean(h n)) / rms(x).
template <bool GATED, bool WEIGHTED, typename E>
void backward(const GatedRmsNorm<E>& p, int64_t row, Real<E>* ungated, Real<E>* dgates, Real<E>* dweight) {
  using R = Real<E>;
  const int64_t D = p.D;
  const E *x = p.x + row * p.x_row, *gate = p.gate + row * p.gate_row, *dy = p.dy + row * D;
  const R* weight = p.weight;
  E *dx = p.dx + row * D, *dgate = GATED ? p.dgate + row * D : nullptr;
  const auto sums = sum_row<R, 2>(D, [&](int64_t i, auto count, Vec<R>* sums) {
    const Vec<R> v = load(x + i, count);
    Vec<R> h = load(dy + i, count);
    if (GATED) {
      const Curve<Vec<R>> curve = silu_curve(load(gate + i, count));
      store(dgates + i, h * curve.slope);
      h *= curve.value;
      store(ungated + i, h);
    }
    if (WEIGHTED) h *= load(weight + i, count);
    sums[0] = fma(v, v, sums[0]);
    sums[1] = fma(h, v, sums[1]);
  });
  const R scale = 1 / sqrt(sum<R>(sums.lanes[0]) / D + R(p.eps));
  const R mean = sum<R>(sums.lanes[1]) / D * scale;
  for_each_vector<R>(D, [&](int64_t i, auto count) {
    const Vec<R> n = load(x + i, count) * scale, w = WEIGHTED ? load(weight + i, count) : splat(R(1));
    const Vec<R> h = GATED ? load(ungated + i) : load(dy + i, count);
    store(dx + i, (h * w - n * mean) * scale, count);
    if (GATED) store(dgate + i, load(dgates + i) * n * w, count);
    if (WEIGHTED) store(dweight + i, fma(h, n, load(dweight + i)));
  });
}

// f(gated, weighted) as types.
template <bool VALUE>
struct Bool {
  static constexpr bool value = VALUE;
};
template <typename E, typename F>
INLINE void with_options(const GatedRmsNorm<E>& p, F f) {
  if (p.gate && p.weight) return f(Bool<true>{}, Bool<true>{});
  if (p.gate) return f(Bool<true>{}, Bool<false>{});
  if (p.weight) return f(Bool<false>{}, Bool<true>{});
  f(Bool<false>{}, Bool<false>{});
}

}  // namespace

template <typename E>
void gated_rms_norm_forward(const GatedRmsNorm<E>& p, int64_t task, Real<E>*) {
  const FlushSubnormals flush;
  const int64_t from = task * p.part(), to = from + p.part() < p.rows ? from + p.part() : p.rows;
  with_options(p, [&](auto gated, auto weighted) {
    for (int64_t row = from; row < to; row++) forward<gated.value, weighted.value>(p, row);
  });
}

template <typename E>
void gated_rms_norm_backward(const GatedRmsNorm<E>& p, int64_t task, Real<E>* scratch) {
  using R = Real<E>;
  const FlushSubnormals flush;
  const int64_t from = task * p.part(), to = from + p.part() < p.rows ? from + p.part() : p.rows, width = p.width();
  R *ungated = scratch, *dgates = ungated + width, *recent = dgates + width, *sums = recent + width, *lost = sums + width;
  for (int64_t i = 0; i < 3 * width; i++) recent[i] = 0;
  with_options(p, [&](auto gated, auto weighted) {
    for (int64_t row = from; row < to; row++) {
      backward<gated.value, weighted.value>(p, row, ungated, dgates, recent);
      if (!weighted.value || ((row - from) % ROWS != ROWS - 1 && row != to - 1)) continue;
      for (int64_t i = 0; i < width; i += LANES<R>) {
        ExactSum<R> sum{load(sums + i), load(lost + i)};
        sum.add(load(recent + i));
        store(sums + i, sum.total);
        store(lost + i, sum.lost);
        store(recent + i, Vec<R>{});
      }
    }
  });
  if (p.dweight)
    for (int64_t i = 0; i < p.D; i++) p.dweight[task * p.D + i] = sums[i];
}

#define INSTANTIATE(E)                                                                     \
  template void gated_rms_norm_forward(const GatedRmsNorm<E>&, int64_t, Real<E>*);         \
  template void gated_rms_norm_backward(const GatedRmsNorm<E>&, int64_t, Real<E>*);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace ISA
