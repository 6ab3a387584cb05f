// Products of bfloat16 with sums in float32, by AMX. Included by kernel files only.
//
// Of a tile's depth, the first products of all pairs are summed, and the second ones, and then both are added to the
// tile: each product exact and each addition rounded to nearest even. Operands and sums that are subnormal count as
// zero.
#pragma once

#include "multiply.h"
#include "pairs.h"

namespace ISA {
namespace {

// While one lives, the thread's eight tiles are 16 rows of 64 bytes each.
struct Tiles {
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Tiles() {
    const Shapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};

// 32 rows and a panel of 32 columns: four tiles of sums. c = keep c + a b for the first `rows`, of which c is
// written. a: the first PAIRED of the depth, the next are `next` further on.
INLINE void block(const bf16* a, int64_t next, const bf16* b, int64_t depth, float keep, float* c, int64_t rows) {
  constexpr int64_t ROW = 16, LEFT = PAIRED * sizeof(bf16), RIGHT = W<float> * 2 * sizeof(bf16);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < depth; d += PAIRED, a += next, b += PAIRED * W<float>) {
    _tile_loadd(4, a, LEFT);
    _tile_loadd(6, b, RIGHT);
    _tile_loadd(7, b + PAIRED, RIGHT);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (rows > ROW) {
      _tile_loadd(5, a + ROW * PAIRED, LEFT);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int64_t STEP = W<float> * sizeof(float);
  alignas(64) float some[2 * ROW * W<float>];
  float* const to = keep == 0 && rows == 2 * ROW ? c : some;
  _tile_stored(0, to, STEP);
  _tile_stored(1, to + ROW, STEP);
  _tile_stored(2, to + ROW * W<float>, STEP);
  _tile_stored(3, to + ROW * W<float> + ROW, STEP);
  if (to == c) return;
  for (int64_t i = 0; i < rows * W<float>; i += LANES<float>)
    store(c + i, keep == 0 ? load(some + i) : fma(splat(keep), load(c + i), load(some + i)));
}

// c = keep c + a b for one panel of b and c.
INLINE void multiply(Ahead& ahead, const LeftPairs& a, const bf16* b, float* c, int64_t rows, int64_t depth, float keep,
                     Shape shape = FULL) {
  for (int64_t r = 0; r < rows; r += 32) {
    const int64_t until = shape == TRIANGLE && r + 32 < depth ? r + 32 : depth;
    ahead.fetch();
    block(a.at(r, 0), a.rows * PAIRED, b, until, keep, c + r * W<float>, rows - r < 32 ? rows - r : 32);
  }
}

}  // namespace
}  // namespace ISA
