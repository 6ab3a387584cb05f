// One vector of floats, as wide as the instruction set this file is compiled for: 16, 8 or 4 lanes.
// Included by kernel files only, which include no torch and no STL header: an inline function of theirs that the
// linker keeps in its AVX-512 form would end the process on a machine without AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

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
struct FlushSubnormals {
#if defined(__SSE__)
  const unsigned before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#endif
};

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES), may_alias));
typedef float AnyVec __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), may_alias));

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

INLINE Vec load(const float* p) { return *reinterpret_cast<const AnyVec*>(p); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<AnyVec*>(p) = v; }
INLINE Vec splat(float value) { return value - Vec{}; }

// The first `count` lanes; the others read as zero and are not written.
INLINE Vec load(const float* p, int64_t count) {
  if (count == LANES) return load(p);
  Vec v{};
  memcpy(&v, p, 4 * count);
  return v;
}
INLINE void store(float* p, Vec v, int64_t count) {
  if (count == LANES) return store(p, v);
  memcpy(p, &v, 4 * count);
}
INLINE Vec gather(const float* p, int64_t stride, int64_t count) {
  Vec v{};
  for (int64_t i = 0; i < count; i++) v[i] = p[i * stride];
  return v;
}
INLINE void scatter(float* p, int64_t stride, Vec v, int64_t count) {
  for (int64_t i = 0; i < count; i++) p[i * stride] = v[i];
}
INLINE float sum(Vec v) {
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

// A sum that carries what each addition rounds away.
struct ExactSum {
  Vec total{}, lost{};
  INLINE_MEMBER void add(Vec v) {
    const Vec corrected = v - lost, next = total + corrected;
    lost = (next - total) - corrected;
    total = next;
  }
};

// x y + z with one rounding; two where there is no FMA. The compiler fuses too, but not a product that is used twice.
INLINE Vec fma(Vec x, Vec y, Vec z) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
  return x * y + z;
#endif
}

// Adding 1.5 * 2^23 leaves the nearest whole number in a float's low bits.
constexpr float MAGIC = 12582912.0f;

INLINE Vec round(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (x + MAGIC) - MAGIC;
#endif
}

// 2^(n + f) for a whole n and f in [-1/2, 1/2]. 2^f is a polynomial of degree 6: 0.94 ulp at most over 2 million f.
// Zero below 2^-126 whatever f is, inf from n = 128 on; a NaN in f stays one.
INLINE Vec exp2(Vec n, Vec f) {
  Vec p = f * 0.00015353362f + 0.00133988739f;
  p = p * f + 0.00961843692f;
  p = p * f + 0.0555033237f;
  p = p * f + 0.240226477f;
  p = p * f + 0.693147182f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)n, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const Vec scaled = (Vec)((Ints)p + ((Ints)(n + MAGIC) << 23));
  return n < -126.0f ? Vec{} : p != p ? p : n > 127.0f ? splat(__builtin_inff()) : scaled;
#endif
}

// A factor times log2(e), in two parts: what rounding the first loses, times a large x, is most of the error.
struct Log2e {
  Vec high, low;
};
INLINE Log2e times_log2e(Vec a) {
  const Vec high = a * 1.44269502f;                                        // 1.44269502 + 1.92596299e-8 = log2(e)
  return {high, fma(a, splat(1.44269502f), -high) + a * 1.92596299e-8f};
}

// e^(x a): with an FMA about 1 ulp for every x a, because the reduced argument comes from the exact product.
INLINE Vec exp_of_product(Vec x, Log2e a) {
  const Vec n = round(x * a.high);
  return exp2(n, fma(x, a.low, fma(x, a.high, -n)));
}

INLINE Vec exp_of_minus_abs(Vec x) { return exp_of_product(x < 0.0f ? x : -x, times_log2e(splat(1.0f))); }

// log(1 + e^x) = max(x, 0) + log1p(u), without overflow and with relative accuracy for very negative x.
// With s = u / (2 + u): log1p(u) = 2 atanh(s) = u - s (u - s^2 P(s^2)); a rounding of s counts for a third at most.
INLINE Vec softplus(Vec x) {
  const Vec u = exp_of_minus_abs(x), s = u / (u + 2.0f), w = s * s;
  Vec p = w * 0.242895573f + 0.214307413f;
  p = p * w + 0.286165953f;
  p = p * w + 0.39998889f;
  p = p * w + 0.666666746f;
  return (x > 0.0f ? x : Vec{}) + (u - s * (u - p * w));
}

INLINE Vec sigmoid(Vec x) {
  const Vec u = exp_of_minus_abs(x);
  return (x < 0.0f ? u : splat(1.0f)) / (u + 1.0f);
}

INLINE Vec silu(Vec x) {
  const Vec u = exp_of_minus_abs(x);
  return (x < 0.0f ? x * u : x) / (u + 1.0f);
}

}  // namespace ISA
