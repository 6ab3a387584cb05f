// Vectors of float or double, as wide as the instruction set this file is compiled for: 64, 32 or 16 bytes.
// Included by kernel files only, which include no torch and no STL header: an inline function of theirs that the
// linker keeps in its AVX-512 form would end the process on a machine without AVX-512.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "elements.h"

#if defined(__SSE__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define ISA avx512
#elif defined(__AVX2__) && defined(__FMA__)
#define ISA avx2
#else
#define ISA base
#endif

namespace ISA {

// While one lives, results below 1.2e-38 are zero: a state that decays through subnormals costs 150 cycles a step.
struct [[maybe_unused]] FlushSubnormals {
#if defined(__SSE__)
  const unsigned before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#endif
};

#if defined(__AVX512F__)
constexpr int64_t BYTES = 64;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int64_t BYTES = 32;
#else
constexpr int64_t BYTES = 16;
#endif

typedef float Floats __attribute__((vector_size(BYTES)));
typedef double Doubles __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef int64_t Longs __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(BYTES / 2)));

template <typename R>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef Floats Type;
  typedef Ints Indices;
};
template <>
struct VectorOf<double> {
  typedef Doubles Type;
  typedef Longs Indices;
};
template <typename R>
using Vec = typename VectorOf<R>::Type;
template <typename R>
constexpr int64_t LANES = BYTES / sizeof(R);

// A size as a type, for a lambda to take at compile time.
template <int N>
struct Count {
  static constexpr int value = N;
};

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

template <typename R>
INLINE Vec<R> splat(R value) {
  return value - Vec<R>{};
}

// The compiler's own conversions take up to five instructions.
INLINE Words words(HalfWords bits) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Words);
#endif
}
INLINE HalfWords half_words(Words bits) {  // below 65536 each
#if defined(__AVX512F__)
  return (HalfWords)_mm512_cvtepi32_epi16((__m512i)bits);
#elif defined(__AVX2__) && defined(__FMA__)
  return (HalfWords)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)bits), _mm256_extracti128_si256((__m256i)bits, 1));
#else
  return __builtin_convertvector(bits, HalfWords);
#endif
}

INLINE Floats widen(HalfWords bits) { return (Floats)(words(bits) << 16); }
// To nearest, ties to even; a NaN stays one.
INLINE HalfWords narrow(Floats v) {
  const Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return half_words(v == v ? rounded : Words{} + 0x7fc0);
}

INLINE Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE Doubles load(const double* p) {
  Doubles v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE Floats load(const bf16* p) {
  HalfWords bits;
  memcpy(&bits, p, sizeof bits);
  return widen(bits);
}
INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
INLINE void store(double* p, Doubles v) { memcpy(p, &v, sizeof v); }
INLINE void store(bf16* p, Floats v) {
  const HalfWords bits = narrow(v);
  memcpy(p, &bits, sizeof bits);
}

// The first `count` lanes; the others read as zero and are not written.
template <typename E>
INLINE Vec<Real<E>> load(const E* p, int64_t count) {
  if (count == LANES<Real<E>>) return load(p);
  E some[LANES<Real<E>>] = {};
  memcpy(some, p, sizeof(E) * count);
  return load(some);
}
template <typename E>
INLINE void store(E* p, Vec<Real<E>> v, int64_t count) {
  if (count == LANES<Real<E>>) return store(p, v);
  E all[LANES<Real<E>>];
  store(all, v);
  memcpy(p, all, sizeof(E) * count);
}

// LANES, as a type.
template <typename R>
struct Whole {
  INLINE_MEMBER constexpr operator int64_t() const { return LANES<R>; }
};

// f(i, count) for each vector of `size` elements: whole ones, and then the rest in a function of its own, for a loop
// that may call memcpy keeps no vector in a register.
template <typename R, typename F>
INLINE void for_each_vector(int64_t size, F f) {
  int64_t i = 0;
  for (; i + LANES<R> <= size; i += LANES<R>) f(i, Whole<R>{});
  if (i < size) f(i, size - i);
}

// One element as the arithmetic sees it, and back.
INLINE float real(float x) { return x; }
INLINE double real(double x) { return x; }
INLINE float real(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(double* p, double x) { *p = x; }
INLINE void put(bf16* p, float x) {
  const HalfWords bits = narrow(splat(x));
  p->bits = bits[0];
}

template <typename R>
INLINE R sum(Vec<R> v) {
#if defined(__AVX512F__)  // or the loop goes through memory
  if constexpr (sizeof(R) == 4)
    return _mm512_reduce_add_ps((__m512)v);
  else
    return _mm512_reduce_add_pd((__m512d)v);
#else
  for (int64_t half = LANES<R> / 2; half; half /= 2)
    for (int64_t i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
#endif
}

// Lane i is lane at[i] of x, or from LANES on of y. `at` is known to the compiler.
template <typename V, typename Indices>
INLINE V shuffle(V x, V y, Indices at) {
#if defined(__clang__)  // which finds the instruction by itself
  constexpr int64_t lanes = sizeof(V) / sizeof(x[0]);
  V picked;
  for (int64_t i = 0; i < lanes; i++) picked[i] = at[i] < lanes ? x[at[i]] : y[at[i] - lanes];
  return picked;
#else
  return __builtin_shuffle(x, y, at);
#endif
}

// The transpose of LANES vectors: blocks off the diagonal change places, the largest first.
template <typename R, int64_t SIZE = LANES<R> / 2>
INLINE void transpose(Vec<R>* x) {
  typename VectorOf<R>::Indices upper, lower;
  for (int64_t i = 0; i < LANES<R>; i++) {
    upper[i] = i & SIZE ? LANES<R> + i - SIZE : i;
    lower[i] = i & SIZE ? LANES<R> + i : i + SIZE;
  }
  for (int64_t i = 0; i < LANES<R>; i++)
    if (!(i & SIZE)) {
      const Vec<R> above = x[i], below = x[i + SIZE];
      x[i] = shuffle(above, below, upper);
      x[i + SIZE] = shuffle(above, below, lower);
    }
  if constexpr (SIZE > 1) transpose<R, SIZE / 2>(x);
}

// To memory of a type, what was loaded as E: what was a bfloat16 and becomes one needs no rounding.
template <typename E, typename To>
INLINE void store_loaded(To* p, Vec<Real<E>> v) {
  if constexpr (sizeof(E) == 2 && sizeof(To) == 2) {
    const HalfWords bits = half_words((Words)v >> 16);
    memcpy(p, &bits, sizeof bits);
  } else {
    store(p, v);
  }
}

// to [columns, rows] <- from [rows, columns], whose rows are so many elements apart: LANES rows and columns.
template <typename E, typename To>
__attribute__((noinline)) void turn_block(const E* from, int64_t step, To* to, int64_t to_step) {
  using R = Real<E>;
  Vec<R> block[LANES<R>];
  for (int64_t i = 0; i < LANES<R>; i++, from += step) block[i] = load(from);
  transpose<R>(block);
  for (int64_t i = 0; i < LANES<R>; i++, to += to_step) store_loaded<E>(to, block[i]);
}

// The same of fewer.
template <typename E, typename To>
__attribute__((noinline)) void turn_rest(const E* from, int64_t step, int64_t rows, int64_t columns, To* to,
                                         int64_t to_step) {
  using R = Real<E>;
  constexpr int64_t L = LANES<R>;
  Vec<R> block[L];
  for (int64_t i = 0; i < L; i++) block[i] = i < rows ? load(from + i * step, columns) : Vec<R>{};
  transpose<R>(block);
  for (int64_t i = 0; i < columns; i++) {
    To all[L];
    store_loaded<E>(all, block[i]);
    memcpy(to + i * to_step, all, sizeof(To) * rows);
  }
}

// The same of any number.
template <typename E, typename To>
void turn(const E* from, int64_t step, int64_t rows, int64_t columns, To* to, int64_t to_step) {
  constexpr int64_t L = LANES<Real<E>>;
  for (int64_t i = 0; i < rows; i += L)
    for (int64_t j = 0; j < columns; j += L) {
      const E* here = from + i * step + j;
      To* there = to + j * to_step + i;
      if (rows - i >= L && columns - j >= L)
        turn_block(here, step, there, to_step);
      else
        turn_rest(here, step, rows - i < L ? rows - i : L, columns - j < L ? columns - j : L, there, to_step);
    }
}

// LANES / G rows of LANES numbers, each summed to G of them, in one vector: the halves of what is twice as long, added.
template <int64_t G, typename R>
INLINE Vec<R> fold(const R* rows) {
  constexpr int64_t L = LANES<R>;
  if constexpr (G == L) {
    return load(rows);
  } else {
    const Vec<R> x = fold<2 * G>(rows), y = fold<2 * G>(rows + L / (2 * G) * L);
    typename VectorOf<R>::Indices low{};
    for (int64_t i = 0; i < L; i++) low[i] = i / G * 2 * G + i % G;
    return shuffle(x, y, low) + shuffle(x, y, low + G);
  }
}

// out[i] = the sum of row i of LANES numbers
template <typename R>
INLINE void sum_rows(const R* rows, int64_t count, R* out) {
  int64_t i = 0;
  for (; i + LANES<R> <= count; i += LANES<R>) store(out + i, fold<1>(rows + i * LANES<R>));
  for (; i < count; i++) out[i] = sum<R>(load(rows + i * LANES<R>));
}

// A sum that carries what each addition rounds away.
template <typename R>
struct ExactSum {
  Vec<R> total{}, lost{};
  INLINE_MEMBER void add(Vec<R> v) {
    const Vec<R> corrected = v - lost, next = total + corrected;
    lost = (next - total) - corrected;
    total = next;
  }
};

// x y + z with one rounding; two where there is no FMA. The compiler fuses too, but not a product that is used twice.
INLINE Floats fma(Floats x, Floats y, Floats z) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
  return x * y + z;
#endif
}
INLINE Doubles fma(Doubles x, Doubles y, Doubles z) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Doubles)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
#else
  return x * y + z;
#endif
}

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

// 2^f for f in [-1/2, 1/2]: a polynomial, 0.79 ulp at most over 4 million f, 1 exactly at 0.
INLINE Floats exp2_of_fraction(Floats f) {
  Floats p = f * 0.00015291998f + 0.0013390981f;
  p = p * f + 0.009618652f;
  p = p * f + 0.055503596f;
  p = p * f + 0.24022646f;
  p = p * f + 0.6931472f;
  return p * f + 1.0f;
}

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
INLINE Floats nearest(Floats t) { return (t + MAGIC) - MAGIC; }
// p 2^n for n in [-126, 127]. A product, for adding to p's bits would make a number of some NaNs.
INLINE Floats times_exp2(Floats p, Floats n) { return p * (Floats)((Ints)(n + (MAGIC + 127)) << 23); }
INLINE Floats exp2(Floats t) {
  t = t < -126.0f ? splat(-126.0f) : t;                                    // a NaN is neither
  t = t > 127.0f ? splat(127.0f) : t;
  const Floats n = nearest(t);
  return times_exp2(exp2_of_fraction(t - n), n);
}
#endif

// 2^(x y), within 2 ulp where there is an FMA and |x y| < REACH: what is reduced is the exact product.
// BOUNDED: it is below REACH in every lane. If not, a lane has the bits that it would have among others that are.
constexpr float REACH = BYTES == 64 ? 1e6f : 126.0f;
template <bool BOUNDED>
INLINE Floats exp2_of_product(Floats x, Floats y) {
#if defined(__AVX512F__)
  const Floats m = fma(x, y, splat(MAGIC)), n = m - MAGIC;
  const Floats power = times_exp2(exp2_of_fraction(fma(x, y, -n)), n);
#else
  const Floats m = fma(x, y, splat(MAGIC + 127)), n = m - (MAGIC + 127);   // the low bits of m are 2^n's exponent
  const Floats power = exp2_of_fraction(fma(x, y, -n)) * (Floats)((Ints)m << 23);
#endif
  if (BOUNDED) return power;
  const Floats product = x * y;
  return (product < 0 ? -product : product) < REACH ? power : exp2(product);
}
template <bool BOUNDED>
INLINE Doubles exp2_of_product(Doubles x, Doubles y) {
  return exp2(x * y);
}

// The larger; a NaN stays one.
INLINE Floats at_least(Floats x, float least) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps(_mm512_set1_ps(least), (__m512)x);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_max_ps(_mm256_set1_ps(least), (__m256)x);
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
