// Sigmoid and SiLU of several vectors. An operation of all of them comes before the next: vector after vector each
// would wait for 20 operations of 4 cycles, of which a processor has three at most in sight. Included by kernels only.
#pragma once

#include "curves.h"

namespace ISA {

// So many at once: 8 operations are under way where two units take 4 cycles; 16 registers hold two vectors' worth.
constexpr int AT_ONCE = BYTES == 64 ? 4 : 2;

// t <- 2^t within 1 ulp, as exp2; of a result that becomes a bfloat16, E, within 2^-13.
template <typename E, int U>
INLINE void exp2_each(Floats (&t)[U]) {
#if defined(__AVX512F__)
  Floats f[U], p[U];
  for (int u = 0; u < U; u++) f[u] = (Floats)_mm512_reduce_ps((__m512)t[u], _MM_FROUND_TO_NEAREST_INT | 8);
  for (int u = 0; u < U; u++) t[u] -= f[u];
  if constexpr (sizeof(E) == 2) {
    for (int u = 0; u < U; u++) p[u] = f[u] * 0.05517166f + 0.24261114f;
    for (int u = 0; u < U; u++) p[u] = p[u] * f[u] + 0.693261f;
    for (int u = 0; u < U; u++) p[u] = p[u] * f[u] + 0.99992807f;
  } else {
    for (int u = 0; u < U; u++) p[u] = f[u] * 0.00015291998f + 0.0013390981f;
    constexpr float rest[] = {0.009618652f, 0.055503596f, 0.24022646f, 0.6931472f, 1.0f};
    for (const float next : rest)
      for (int u = 0; u < U; u++) p[u] = p[u] * f[u] + next;
  }
  for (int u = 0; u < U; u++) t[u] = times_exp2(p[u], t[u]);
#else
  for (int u = 0; u < U; u++) t[u] = exp2(t[u]);
#endif
}

INLINE Doubles at_least(Doubles x, double) { return x; }  // exp_of_minus bounds it

// e <- e^-x. The product is rounded once, which loses x 2^-24 of e, of a sigmoid a quarter of that at most.
template <typename E, int U>
INLINE void exp_of_minus_each(const Floats (&x)[U], Floats (&e)[U]) {
  for (int u = 0; u < U; u++) e[u] = x[u] * -1.44269502f;
  exp2_each<E>(e);
}
template <typename E, int U>
INLINE void exp_of_minus_each(const Doubles (&x)[U], Doubles (&e)[U]) {
  for (int u = 0; u < U; u++) e[u] = exp_of_minus(x[u]);
}

// s <- sigmoid(x) for a result of type E; 12 bits of it where that is bfloat16.
template <typename E, typename V, int U>
INLINE void sigmoid_each(const V (&x)[U], V (&s)[U]) {
  exp_of_minus_each<E>(x, s);
  for (int u = 0; u < U; u++) s[u] += 1;
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 2) {
    for (int u = 0; u < U; u++) s[u] = (Floats)_mm512_rcp14_ps((__m512)s[u]);
    return;
  }
#endif
  for (int u = 0; u < U; u++) s[u] = 1 / s[u];
}

// x <- silu(x) for a result of type E
template <typename E, typename V, int U>
INLINE void silu_each(V (&x)[U]) {
  V s[U];
  sigmoid_each<E>(x, s);
  for (int u = 0; u < U; u++) x[u] *= s[u];
}

// value <- silu(x), x <- its slope, with e s = 1 - s without cancelling; e is bounded, for inf 0 would be NaN.
template <typename R, typename V, int U>
INLINE void silu_curve_each(V (&x)[U], V (&value)[U]) {
  V bounded[U], e[U];
  for (int u = 0; u < U; u++) bounded[u] = at_least(x[u], R(-88));
  exp_of_minus_each<R>(bounded, e);
  for (int u = 0; u < U; u++) value[u] = 1 / (e[u] + 1);
  for (int u = 0; u < U; u++) e[u] *= value[u];
  for (int u = 0; u < U; u++) e[u] = e[u] * x[u] + 1;
  for (int u = 0; u < U; u++) e[u] *= value[u];
  for (int u = 0; u < U; u++) value[u] *= x[u], x[u] = e[u];
}

// The same of one vector, bit by bit.
template <typename E, typename V>
INLINE V silu_alone(V x) {
  V one[1] = {x};
  silu_each<E>(one);
  return one[0];
}
template <typename R, typename V>
INLINE V silu_slope(V x) {
  V one[1] = {x}, value[1];
  silu_curve_each<R>(one, value);
  return one[0];
}

}  // namespace ISA
