// Products of bfloat16 with sums in float32, by vdpbf16ps. Included by kernel files only.
//
// A sum takes the second product of a pair first, each product exact and each addition rounded to nearest even (200000
// random sums on a Zen 5). Operands and sums that are subnormal count as zero, whatever MXCSR says: as FlushSubnormals
// has it anyway.
#pragma once

#include "multiply.h"
#include "pairs.h"

namespace ISA {
namespace {

// Sums of ROWS rows, two vectors wide.
template <int ROWS>
struct PairSums {
  Floats first{}, second{};
  PairSums<ROWS - 1> below;

  INLINE_MEMBER void add(const bf16* a, __m512bh b0, __m512bh b1) {
    int32_t pair;
    memcpy(&pair, a, sizeof pair);
    const __m512bh pairs = (__m512bh)_mm512_set1_epi32(pair);
    first = (Floats)_mm512_dpbf16_ps((__m512)first, pairs, b0);
    second = (Floats)_mm512_dpbf16_ps((__m512)second, pairs, b1);
    below.add(a + PAIRED, b0, b1);
  }
  INLINE_MEMBER void put(float* c, float keep) {
    if (keep != 0) {
      first = fma(splat(keep), load(c), first);
      second = fma(splat(keep), load(c + LANES<float>), second);
    }
    store(c, first);
    store(c + LANES<float>, second);
    below.put(c + W<float>, keep);
  }
  INLINE_MEMBER void put_rounded(const Rounded& rounded) const {
    rounded.put(first, second, below.first, below.second);
    if constexpr (ROWS > 1) below.below.put_rounded(rounded.from(2));
  }
};
template <>
struct PairSums<0> {
  static constexpr Floats first{}, second{};

  INLINE_MEMBER void add(const bf16*, __m512bh, __m512bh) {}
  INLINE_MEMBER void put(float*, float) {}
  INLINE_MEMBER void put_rounded(const Rounded&) const {}
};

// a: the first PAIRED of the depth, the next are `jump` further on.
template <int ROWS>
__attribute__((noinline)) void tile(const bf16* a, int64_t jump, const bf16* b, int64_t depth, float keep, float* c,
                                    const Rounded& rounded) {
  PairSums<ROWS> sums;
  while (depth > 0) {
    const int64_t run = depth < PAIRED ? depth : PAIRED;
    for (int64_t d = 0; d < run; d += 2, a += 2, b += 2 * W<float>)
      sums.add(a, (__m512bh)load_words(b), (__m512bh)load_words(b + W<float>));
    a += jump;
    depth -= run;
  }
  keep == 0 ? sums.put(c, 0) : sums.put(c, keep);
  if (rounded.left || rounded.right) sums.put_rounded(rounded);
}

template <int ROWS>
INLINE void tile_of(int64_t rows, const bf16* a, int64_t jump, const bf16* b, int64_t depth, float keep, float* c,
                    const Rounded& rounded) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return tile_of<ROWS - 1>(rows, a, jump, b, depth, keep, c, rounded);
  tile<ROWS>(a, jump, b, depth, keep, c, rounded);
}

// c = keep c + a b for one panel of b and c, in tiles of even height, for pairs of rows: 32 rows are 12, 10 and 10.
INLINE void multiply(Ahead& ahead, const LeftPairs& a, const bf16* b, float* c, int64_t rows, int64_t depth, float keep,
                     Shape shape = FULL, const Rounded& rounded = {}) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r, tiles = (left + TALLEST - 1) / TALLEST;
    const int64_t even = ((left + tiles - 1) / tiles + 1) / 2 * 2;
    const int64_t height = left < even ? left : even;
    const int64_t until = shape == TRIANGLE && r + height < depth ? r + height : depth;
    ahead.fetch();
    tile_of<TALLEST>(height, a.at(r, 0), (a.rows - 1) * PAIRED, b, until, keep, c + r * W<float>, rounded.from(r));
    r += height;
  }
}

}  // namespace
}  // namespace ISA
