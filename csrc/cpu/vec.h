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

#if defined(__AMX_BF16__)
#define ISA amx
#elif defined(__AVX512BF16__)
#define ISA avx512_bf16
#elif defined(__AVX512F__)
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

}  // namespace ISA
