// What a step leaves of a state: 2^(x y), most of what a scan computes. Included by kernels only.
#pragma once

#include "../curves.h"

namespace ISA {
namespace {

// Of x y in (-REACH, 0] within 2 ulp where there is an FMA: what is reduced is the exact product.
#if defined(__AVX512F__)
constexpr float REACH = 2e5f;            // the low bits of 1.5 * 2^19 + k/16 are k as far as 2^18

// The product is k/16 + f: 2^(k/16), the fraction's from a table in a register, scaled by the whole part, which is what
// scalef takes of it; a polynomial of degree 3 for f. 0.96 ulp at most over 2 million products from -86 to 0, 1 exactly
// at 0. Where FMAs, additions and shuffles have pipes of their own, 2 of 12 FMAs a state less than with degree 6.
INLINE Floats reduced_exp2(Floats x, Floats y) {
  constexpr Floats POWERS = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                             1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                             1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
  const Floats m = fma(x, y, splat(MAGIC / 16)), n = m - MAGIC / 16, f = fma(x, y, -n);
  const Floats power = times_exp2((Floats)_mm512_permutexvar_ps((__m512i)m, (__m512)POWERS), n);
  const Floats p = (f * 0.055505417f + 0.24023590f) * f + 0.69314718f;
  return fma(power, p * f, power);
}
#else
constexpr float REACH = 126.0f;

INLINE Floats reduced_exp2(Floats x, Floats y) {
  const Floats m = fma(x, y, splat(MAGIC + 127)), n = m - (MAGIC + 127);   // the low bits of m are 2^n's exponent
  return exp2_of_fraction(fma(x, y, -n)) * (Floats)((Ints)m << 23);
}
#endif

// BOUNDED: x y is in (-REACH, 0] in every lane. If not, a lane has the bits that it would have among others that are.
// What grows is not from the table: its 2^(1/16) is off by 0.39 ulp, the same way in every step of a state that lasts.
template <bool BOUNDED>
INLINE Floats exp2_of_product(Floats x, Floats y) {
  const Floats power = reduced_exp2(x, y);
  if (BOUNDED) return power;
  const Floats product = x * y;
  return (product <= 0) & (product > -REACH) ? power : exp2(product);
}
template <bool BOUNDED>
INLINE Doubles exp2_of_product(Doubles x, Doubles y) {
  return exp2(x * y);
}

// What of 2^t its rounding to a float leaves out.
INLINE Floats lost_of_exp2(Floats t) {
#if defined(__AVX512F__)
  const Floats n = nearest(t), f = t - n;
#else
  const Floats within = between(t, -126.0f, 127.0f), n = nearest(within), f = within - n;
#endif
  return times_exp2(fma(rise_of_fraction(f), f, 1.0f - exp2_of_fraction(f)), n);
}

// The state after h: left h + added, for left = 2^(x y). Where it grows, `lost` is what rounding has taken from it so
// far: in 32 steps 2 ulp on average, in a state that outlasts all others.
template <bool BOUNDED>
INLINE Floats next_state(Floats h, Floats& lost, Floats left, Floats x, Floats y, Floats added) {
  const Floats next = fma(left, h, added);
  if (BOUNDED) return next;
  const Floats t = x * y, high = left * h;
  const Floats low = fma(left, lost, fma(lost_of_exp2(t), h, added)) + fma(left, h, -high);
  const Floats sum = high + low, back = sum - high, rest = (high - (sum - back)) + (low - back);
  const auto kept = (t > 0) & (sum - sum == 0);
  lost = kept ? rest : Floats{};
  return kept ? sum : next;
}
template <bool BOUNDED>
INLINE Doubles next_state(Doubles h, Doubles&, Doubles left, Doubles, Doubles, Doubles added) {
  return fma(left, h, added);
}

}  // namespace
}  // namespace ISA
