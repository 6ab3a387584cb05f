// Gated RMS norm on a CPU. A row is read twice, the second time from the cache; of a LayerNorm three times.

#include "gated_rms_norm.h"

#include "curves.h"
#include "stream.h"
#include "vec.h"

namespace ISA {
namespace {

// Sums lose the roundings of so many terms, then so many sums: 2048 rows of a task 8 and what an exact sum loses.
constexpr int64_t ROWS = 8, STRETCH = 64;

// What a kernel is compiled for. BIASED is with a weight, CENTRED, the LayerNorm, with weight and bias.
enum Norm { BARE, WEIGHTED, BIASED, CENTRED };
enum Gate { NONE, SILU_AFTER, SIGMOID_AFTER, SILU_FIRST, SIGMOID_FIRST };
constexpr bool after(Gate gate) { return gate == SILU_AFTER || gate == SIGMOID_AFTER; }
constexpr bool first(Gate gate) { return gate == SILU_FIRST || gate == SIGMOID_FIRST; }
constexpr bool by_silu(Gate gate) { return gate == SILU_AFTER || gate == SILU_FIRST; }

// f(i, count, sums) for each vector of a group, which adds to the sums; these are returned.
template <typename R, int COUNT>
struct Sums {
  Vec<R> lanes[COUNT] = {};
  INLINE_MEMBER R mean(int i, int64_t size) const { return sum<R>(lanes[i]) / size; }
};
template <typename R, int COUNT, typename F>
INLINE Sums<R, COUNT> sum_group(int64_t size, F f) {
  Sums<R, COUNT> total;
  for (int64_t begin = 0; begin < size; begin += STRETCH * LANES<R>) {
    const int64_t left = size - begin, some = left < STRETCH * LANES<R> ? left : STRETCH * LANES<R>;
    Sums<R, COUNT> part;
    for_each_vector<R>(some, [&](int64_t i, auto count) { f(begin + i, count, part.lanes); });
    for (int i = 0; i < COUNT; i++) total.lanes[i] += part.lanes[i];
  }
  return total;
}

// The first `count` lanes, the others zero: those are no channels, and a mean taken from them would count.
template <typename R>
INLINE Vec<R> lanes_of(Vec<R> v, Whole<R>) {
  return v;
}
template <typename R>
INLINE Vec<R> lanes_of(Vec<R> v, int64_t count) {
  for (int64_t i = count; i < LANES<R>; i++) v[i] = 0;
  return v;
}

// What a group's second pass needs of the first: 1 / rms and the means of u, h weight n and h weight, and what du is
// multiplied by, as below.
template <typename R>
struct Moments {
  R scale, mean, along, level, rate;
};

// Backward, what is normed, of x and the gate's values. A LayerNorm's is rounded: fused with the difference from a mean
// that was made of rounded ones, the product would leave its own rounding, where a group of one channel has nothing.
template <Gate GATE, Norm NORM, typename R>
INLINE Vec<R> normed(Vec<R> v, const R* values) {
  if constexpr (first(GATE)) v *= load(values);
  if constexpr (first(GATE) && NORM == CENTRED) asm("" : "+m"(v));
  return v;
}

template <Gate GATE, Norm NORM, typename E>
void forward(const GatedRmsNorm<E>& p, int64_t row, Moments<Real<E>>* moments, Real<E>* gated, E* y) {
  using R = Real<E>;
  const int64_t size = p.channels, width = p.width();
  const E *x = p.x + row * p.x_row, *gate = p.gate + row * p.gate_row;
  const R *weight = p.weight, *bias = p.bias;
  const auto activation = [=](int64_t i, auto count) {
    const Vec<R> v = load(gate + i, count);
    if constexpr (first(GATE) && NORM == CENTRED)  // a difference from a mean has less bits than what it is of
      return by_silu(GATE) ? silu(v) : sigmoid(v);
    else
      return by_silu(GATE) ? silu_to<E>(v) : sigmoid_to<E>(v);
  };
  for (int64_t group = 0; group < p.groups; group++) {
    const int64_t at = group * size;
    R* const kept = gated + group * width;
    // What is normed, and the same once more.
    const auto read = [=](int64_t i, auto count) {
      Vec<R> v = load(x + at + i, count);
      if constexpr (first(GATE)) store(kept + i, v *= activation(at + i, count));
      return v;
    };
    const auto reread = [=](int64_t i, auto count) { return first(GATE) ? load(kept + i) : load(x + at + i, count); };
    R mean = 0;
    if (NORM == CENTRED)
      mean = sum_group<R, 1>(size, [=](int64_t i, auto n, Vec<R>* sums) { sums[0] += read(i, n); }).mean(0, size);
    const auto sums = sum_group<R, 1>(size, [=](int64_t i, auto count, Vec<R>* sums) {
      const Vec<R> v = NORM == CENTRED ? lanes_of<R>(reread(i, count) - mean, count) : read(i, count);
      sums[0] = fma(v, v, sums[0]);
    });
    moments[group] = {R(1 / sqrt(sums.mean(0, size) + R(p.eps))), mean, 0, 0};
  }
  for (int64_t group = 0; group < p.groups; group++) {
    const int64_t at = group * size;
    const R *const kept = gated + group * width, scale = moments[group].scale, mean = moments[group].mean;
    for_each_vector<R>(size, [=](int64_t i, auto count) {
      Vec<R> v = first(GATE) ? load(kept + i) : load(x + at + i, count);
      v = (NORM == CENTRED ? v - mean : v) * scale;
      if (NORM != BARE) v *= load(weight + at + i, count);
      if (NORM >= BIASED) v += load(bias + at + i, count);
      if constexpr (after(GATE)) v *= activation(at + i, count);
      store(y + at + i, v, count);
    });
  }
}

// Of a task, [groups, width] each: the gate's values times dy and slopes times dy, or, where it comes first, its values
// and its slopes times x; what the last rows add to the gradients.
template <typename E>
struct Scratch {
  Real<E> *values, *slopes, *dweight, *dbias;
  E *dx, *dgate;  // of the row
};

// Backward, the first pass over a row: the moments of its groups, and what the gate gives into the scratch.
template <Gate GATE, Norm NORM, typename E>
INLINE void measure(const GatedRmsNorm<E>& p, int64_t row, Moments<Real<E>>* moments, const Scratch<E>& scratch) {
  using R = Real<E>;
  const int64_t size = p.channels, width = p.width();
  for (int64_t group = 0; group < p.groups; group++) {
    const int64_t at = group * size;
    const E *x = p.x + row * p.x_row + at, *gate = p.gate + row * p.gate_row + at, *dy = p.dy + row * p.D + at;
    const R* weight = p.weight + at;
    R *values = scratch.values + group * width, *slopes = scratch.slopes + group * width;
    const auto curve = [=](int64_t i, auto count) {
      const Vec<R> v = load(gate + i, count);
      return by_silu(GATE) ? silu_curve(v) : sigmoid_curve(v);
    };
    // u, and the same once more.
    const auto read = [=](int64_t i, auto count) {
      Vec<R> v = load(x + i, count);
      if constexpr (first(GATE)) {
        const Curve<Vec<R>> now = curve(i, count);
        store(slopes + i, v * now.slope);
        store(values + i, now.value);
        v *= now.value;
      }
      return v;
    };
    const auto reread = [=](int64_t i, auto count) { return normed<GATE, NORM, R>(load(x + i, count), values + i); };
    R mean = 0;
    if (NORM == CENTRED)
      mean = sum_group<R, 1>(size, [=](int64_t i, auto n, Vec<R>* sums) { sums[0] += read(i, n); }).mean(0, size);
    const auto sums = sum_group<R, NORM == CENTRED ? 3 : 2>(size, [=](int64_t i, auto count, Vec<R>* sums) {
      const Vec<R> v = NORM == CENTRED ? lanes_of<R>(reread(i, count) - mean, count) : read(i, count);
      Vec<R> h = load(dy + i, count);
      if constexpr (after(GATE)) {
        const Curve<Vec<R>> now = curve(i, count);
        store(slopes + i, h * now.slope);
        h *= now.value;
        store(values + i, h);
      }
      if (NORM != BARE) h *= load(weight + i, count);
      sums[0] = fma(v, v, sums[0]);
      sums[1] = fma(h, v, sums[1]);
      if constexpr (NORM == CENTRED) sums[2] += h;
    });
    const R scale = 1 / sqrt(sums.mean(0, size) + R(p.eps));
    moments[group] = {scale, mean, sums.mean(1, size) * scale, 0, scale};
    if constexpr (NORM == CENTRED) moments[group].level = sums.mean(2, size);
    if (size == (NORM == CENTRED ? 2 : 1)) {
      moments[group].along = 0;
      moments[group].rate *= R(p.eps) * scale * scale;
    }
  }
}

// With n the norm of u and h the gradient of n weight + bias:
// du = (h weight - mean(h weight) - n mean(h weight n)) / rms, where the first mean is the LayerNorm's.
// One channel, or two about their mean, have n^2 = 1 - eps / rms^2, and a difference would leave its roundings:
// du = (h weight - mean(h weight)) eps / rms^3.
template <Gate GATE, Norm NORM, typename E>
void backward(const GatedRmsNorm<E>& p, int64_t row, Moments<Real<E>>* moments, const Scratch<E>& scratch) {
  using R = Real<E>;
  const int64_t size = p.channels, width = p.width();
  measure<GATE, NORM>(p, row, moments, scratch);
  for (int64_t group = 0; group < p.groups; group++) {
    const int64_t at = group * size;
    const E *x = p.x + row * p.x_row + at, *dy = p.dy + row * p.D + at;
    const R *weight = p.weight + at, *bias = p.bias + at;
    E *dx = scratch.dx + at, *dgate = scratch.dgate + at;
    const R *values = scratch.values + group * width, *slopes = scratch.slopes + group * width;
    R *dweight = scratch.dweight + group * width, *dbias = scratch.dbias + group * width;
    const Moments<R> m = moments[group];
    for_each_vector<R>(size, [=](int64_t i, auto count) {
      const Vec<R> u = normed<GATE, NORM, R>(load(x + i, count), values + i);
      const Vec<R> n = (NORM == CENTRED ? u - m.mean : u) * m.scale;
      const Vec<R> w = NORM == BARE ? splat(R(1)) : load(weight + i, count);
      const Vec<R> h = after(GATE) ? load(values + i) : load(dy + i, count);
      Vec<R> du = h * w - n * m.along;
      du = (NORM == CENTRED ? du - m.level : du) * m.rate;
      if constexpr (first(GATE)) {
        store(dgate + i, du * load(slopes + i), count);
        du *= load(values + i);
      }
      store(dx + i, du, count);
      if constexpr (after(GATE)) {
        const Vec<R> ungated = NORM >= BIASED ? n * w + load(bias + i, count) : n * w;
        store(dgate + i, load(slopes + i) * ungated, count);
      }
      if (NORM != BARE) store(dweight + i, fma(h, n, load(dweight + i)));
      if (NORM >= BIASED) store(dbias + i, load(dbias + i) + h);
    });
  }
}

// f(gate, norm) as types.
template <auto VALUE>
struct Constant {
  static constexpr auto value = VALUE;
};
template <typename E, typename F>
INLINE void with_norm(const GatedRmsNorm<E>& p, F f) {
  if (p.centred) return f(Constant<CENTRED>{});
  if (p.bias) return f(Constant<BIASED>{});
  if (p.weight) return f(Constant<WEIGHTED>{});
  f(Constant<BARE>{});
}
template <typename E, typename F>
INLINE void with_options(const GatedRmsNorm<E>& p, F f) {
  with_norm(p, [&](auto norm) {
    if (!p.gate) return f(Constant<NONE>{}, norm);
    if (p.gate_first) return p.silu ? f(Constant<SILU_FIRST>{}, norm) : f(Constant<SIGMOID_FIRST>{}, norm);
    p.silu ? f(Constant<SILU_AFTER>{}, norm) : f(Constant<SIGMOID_AFTER>{}, norm);
  });
}

}  // namespace

template <typename E>
void gated_rms_norm_forward(const GatedRmsNorm<E>& p, int64_t task, Real<E>* scratch) {
  using R = Real<E>;
  const FlushSubnormals flush;
  const int64_t from = task * p.part(), to = from + p.part() < p.rows ? from + p.part() : p.rows;
  Moments<R>* moments = reinterpret_cast<Moments<R>*>(scratch + p.groups * p.width());
  E* const y = reinterpret_cast<E*>(scratch + p.rows_at());
  with_options(p, [&](auto gate, auto norm) {
    for (int64_t row = from; row < to; row++) {
      forward<gate.value, norm.value>(p, row, moments, scratch, p.stream ? y : p.y + row * p.D);
      if (p.stream) stream(p.y + row * p.D, y, p.D);
    }
  });
  if (p.stream) streamed();
}

template <typename E>
void gated_rms_norm_backward(const GatedRmsNorm<E>& p, int64_t task, Real<E>* scratch) {
  using R = Real<E>;
  const FlushSubnormals flush;
  const int64_t from = task * p.part(), to = from + p.part() < p.rows ? from + p.part() : p.rows;
  const int64_t width = p.width(), whole = p.groups * width, gradients = p.gradients();
  R *recent = scratch + 2 * whole, *sums = recent + gradients, *lost = sums + gradients;
  Moments<R>* moments = reinterpret_cast<Moments<R>*>(lost + gradients);
  E *const dx = reinterpret_cast<E*>(scratch + p.backward_rows_at()), *const dgate = dx + p.D;
  for (int64_t i = 0; i < 3 * gradients; i++) recent[i] = 0;
  with_options(p, [&](auto gate, auto norm) {
    for (int64_t row = from; row < to; row++) {
      const Scratch<E> rows = {scratch, scratch + whole, recent, recent + whole,
                               p.stream ? dx : p.dx + row * p.D, p.stream ? dgate : p.dgate + row * p.D};
      backward<gate.value, norm.value>(p, row, moments, rows);
      if (p.stream) stream(p.dx + row * p.D, dx, p.D);
      if (p.stream && p.gate) stream(p.dgate + row * p.D, dgate, p.D);
      if (norm.value == BARE || ((row - from) % ROWS != ROWS - 1 && row != to - 1)) continue;
      for (int64_t i = 0; i < gradients; i += LANES<R>) {
        ExactSum<R> sum{load(sums + i), load(lost + i)};
        sum.add(load(recent + i));
        store(sums + i, sum.total);
        store(lost + i, sum.lost);
        store(recent + i, Vec<R>{});
      }
    }
  });
  if (p.stream) streamed();
  for (int64_t group = 0; group < p.groups; group++) {
    const int64_t size = p.channels, at = task * p.D + group * size;
    const R *of_weight = sums + group * width, *of_bias = of_weight + whole;
    for (int64_t i = 0; i < size && p.dweight; i++) p.dweight[at + i] = of_weight[i];
    for (int64_t i = 0; i < size && p.dbias; i++) p.dbias[at + i] = of_bias[i];
  }
}

#define INSTANTIATE(E)                                                                     \
  template void gated_rms_norm_forward(const GatedRmsNorm<E>&, int64_t, Real<E>*);         \
  template void gated_rms_norm_backward(const GatedRmsNorm<E>&, int64_t, Real<E>*);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace ISA
