// Matrices of bfloat16 as vdpbf16ps and tdpbf16ps multiply them: two neighbours along the depth of a product share a
// word. Included by kernel files only, of the instruction sets that have these.
//
// Every depth is zero up to a whole number of PAIRED, and every row of a left operand is there up to one: AMX's tiles
// are as deep and as high.
#pragma once

#include "panels.h"
#include "turn.h"

namespace ISA {
namespace {

constexpr int64_t PAIRED = 32;

INLINE int64_t paired(int64_t size) { return (size + PAIRED - 1) / PAIRED * PAIRED; }

// A left operand, rows by depth: [depth / PAIRED, rows, PAIRED].
struct LeftPairs {
  bf16* data;
  int64_t rows;

  INLINE_MEMBER bf16* at(int64_t row, int64_t d) const {
    return data + (d / PAIRED * rows + row) * PAIRED + d % PAIRED;
  }
};

// A right operand, depth by columns, in panels as wide as those of float32: [columns / W, depth / 2, W, 2].
struct RightPairs {
  bf16* data;
  int64_t depth;

  // d is even.
  INLINE_MEMBER bf16* at(int64_t d, int64_t column) const {
    return data + (column / W<float> * depth + d) * W<float> + column % W<float> * 2;
  }
};

// 16 words, or 32 bfloat16.
INLINE Words load_words(const bf16* p) {
  Words words;
  memcpy(&words, p, sizeof words);
  return words;
}
INLINE void store_words(bf16* p, Words words) { memcpy(p, &words, sizeof words); }
// The first `count` of 32; the others read as zero.
INLINE Words load_words(const bf16* p, int64_t count) {
  return (Words)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << count) - 1), p);
}

// The first and the second of each pair, and back, rounded to nearest, ties to even; subnormals are zero.
INLINE Floats first_of(Words pairs) { return (Floats)(pairs << 16); }
INLINE Floats second_of(Words pairs) { return (Floats)(pairs & 0xffff0000u); }
INLINE Words in_a_row(Floats left, Floats right) {
  return (Words)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
}
INLINE Words pair(Floats first, Floats second) {
  typedef int16_t Shorts __attribute__((vector_size(64)));
  constexpr Shorts zip = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Words)_mm512_permutexvar_epi16((__m512i)zip, (__m512i)in_a_row(first, second));
}

// Two rows of 32, column by column: columns 0 to 15 and 16 to 31.
INLINE void zip_rows(Words row, Words next, Words& left, Words& right) {
  typedef int16_t Shorts __attribute__((vector_size(64)));
  constexpr Shorts zip = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  left = (Words)_mm512_permutex2var_epi16((__m512i)row, (__m512i)zip, (__m512i)next);
  right = (Words)_mm512_permutex2var_epi16((__m512i)row, (__m512i)(zip + 16), (__m512i)next);
}

// f(first, count) for each 32 columns of a row.
template <typename F>
INLINE void for_pairs(int64_t width, F f) {
  int64_t column = 0;
  for (; column + PAIRED <= width; column += PAIRED) f(column, PAIRED);
  if (column < width) f(column, width - column);
}

}  // namespace
}  // namespace ISA
