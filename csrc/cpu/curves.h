// Exponentials and what is made of them, on vectors. Included by kernel files only.
#pragma once

#include "vec.h"

namespace ISA {

// float64 is for checking: one call of the C library per lane.
#define LANE_BY_LANE(name, call)                                  \
  INLINE Doubles name(Doubles x) {                                \
    for (int64_t i = 0; i < LANES<double>; i++) x[i] = call(x[i]); \
    return x;                                                     \
  }
LANE_BY_LANE(exp, ::exp)
LANE_BY_LANE(exp2, ::exp2)
LANE_BY_LANE(log1p, ::log1p)
#undef LANE_BY_LANE

// 2^f for f in [-1/2, 1/2]: a polynomial, 0.79 ulp at most over 4 million f, 1 exactly at 0; and (2^f - 1) / f.
INLINE Floats rise_of_fraction(Floats f) {
  Floats p = f * 0.00015291998f + 0.0013390981f;
  p = p * f + 0.009618652f;
  p = p * f + 0.055503596f;
  p = p * f + 0.24022646f;
  return p * f + 0.6931472f;
}
INLINE Floats exp2_of_fraction(Floats f) { return rise_of_fraction(f) * f + 1.0f; }

// Adding 1.5 * 2^23 leaves the nearest whole number in a float's low bits.
constexpr float MAGIC = 12582912.0f;

#if defined(__AVX512F__)
INLINE Floats nearest(Floats t) { return t - (Floats)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | 8); }
INLINE Floats times_exp2(Floats p, Floats n) { return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n); }

// 2^t within 1 ulp. Below 2^-126 and from 2^128 on: zero and inf with AVX-512, the last number before them elsewhere.
INLINE Floats exp2(Floats t) {
  const Floats f = (Floats)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | 8);
  return times_exp2(exp2_of_fraction(f), t - f);
}
#else
#if defined(NEON)
INLINE Floats nearest(Floats t) { return (Floats)vrndnq_f32((float32x4_t)t); }
INLINE Floats between(Floats t, float least, float most) {                 // a NaN stays one
  return (Floats)vminq_f32(vmaxq_f32((float32x4_t)t, vdupq_n_f32(least)), vdupq_n_f32(most));
}
#else
INLINE Floats nearest(Floats t) { return (t + MAGIC) - MAGIC; }
INLINE Floats between(Floats t, float least, float most) {
  t = t < least ? splat(least) : t;                                        // a NaN is neither
  return t > most ? splat(most) : t;
}
#endif
// p 2^n for n in [-126, 127]. A product, for adding to p's bits would make a number of some NaNs.
INLINE Floats times_exp2(Floats p, Floats n) { return p * (Floats)((Ints)(n + (MAGIC + 127)) << 23); }
INLINE Floats exp2(Floats t) {
  t = between(t, -126.0f, 127.0f);
  const Floats n = nearest(t);
  return times_exp2(exp2_of_fraction(t - n), n);
}
#endif

// The larger; a NaN stays one.
INLINE Floats at_least(Floats x, float least) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps(_mm512_set1_ps(least), (__m512)x);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_max_ps(_mm256_set1_ps(least), (__m256)x);
#elif defined(NEON)
  return (Floats)vmaxq_f32((float32x4_t)x, vdupq_n_f32(least));
#else
  return x < least ? splat(least) : x;
#endif
}

// e^x for x <= 88, about 1 ulp: log2(e) is taken in two parts, for what rounding it loses times x is most of the error.
INLINE Floats exp(Floats x) {
  const Floats clamped = at_least(x, -87.0f);                              // e^-87 = 1.6e-38; a NaN stays
  const Floats n = nearest(clamped * 1.44269502f);                         // 1.44269502 + 1.92596299e-8 = log2(e)
  const Floats f = fma(clamped, splat(1.92596299e-8f), fma(clamped, splat(1.44269502f), -n));
  return times_exp2(exp2_of_fraction(f), n);
}

template <typename V>
INLINE V exp_of_minus_abs(V x) {
  return exp(x < 0 ? x : -x);
}

// log(1 + u) for u in [0, 1]. With s = u / (2 + u): 2 atanh(s) = u - s (u - s^2 P(s^2)); a rounding of s counts for a
// third at most.
INLINE Floats log1p(Floats u) {
  const Floats s = u / (u + 2.0f), w = s * s;
  Floats p = w * 0.242895573f + 0.214307413f;
  p = p * w + 0.286165953f;
  p = p * w + 0.39998889f;
  p = p * w + 0.666666746f;
  return u - s * (u - p * w);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|): no overflow, and relative accuracy for very negative x.
template <typename V>
INLINE V softplus(V x) {
  return (x > 0 ? x : V{}) + log1p(exp_of_minus_abs(x));
}

// e^-x, at most e^88, or e^700 in float64
INLINE Floats exp_of_minus(Floats x) { return exp(-at_least(x, -88.0f)); }
INLINE Doubles exp_of_minus(Doubles x) { return exp(x < -700 ? splat(700.0) : -x); }

template <typename V>
INLINE V sigmoid(V x) {
  return 1 / (exp_of_minus(x) + 1);
}

template <typename V>
INLINE V silu(V x) {
  return x * sigmoid(x);
}

// For a result of type E: what becomes a bfloat16 needs no more than 12 bits.
template <typename E, typename V>
INLINE V sigmoid_to(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 2) return (Floats)_mm512_rcp14_ps((__m512)(exp2(x * -1.44269502f) + 1.0f));
#endif
  return sigmoid(x);
}
template <typename E, typename V>
INLINE V silu_to(V x) {
  return x * sigmoid_to<E>(x);
}

// A function's value and slope at x, from one exp.
template <typename V>
struct Curve {
  V value, slope;
};
template <typename V>
INLINE Curve<V> softplus_curve(V x) {
  const V u = exp_of_minus_abs(x);
  return {(x > 0 ? x : V{}) + log1p(u), (x < 0 ? u : 1 + V{}) / (u + 1)};
}
template <typename V>
INLINE Curve<V> sigmoid_curve(V x) {
  const V u = exp_of_minus(x), s = 1 / (u + 1);
  return {s, s * (u * s)};                                                 // u s = 1 - s without cancelling
}
template <typename V>
INLINE Curve<V> silu_curve(V x) {
  const V u = exp_of_minus(x), s = 1 / (u + 1);
  return {x * s, s * (x * (u * s) + 1)};
}

}  // namespace ISA
