// Products of matrices in panels. Included by kernel files only.
#pragma once

#include "ahead.h"
#include "panels.h"

namespace ISA {
namespace {

// The micro-kernel: C = keep C + A B for ROWS rows and one panel of columns. C is not read where keep is 0.

// Sums of ROWS rows: a recursion, for an array of vectors would not stay in registers.
template <int ROWS, typename R>
struct Sums {
  Vec<R> first{}, second{};
  Sums<ROWS - 1, R> below;

  INLINE_MEMBER void add(const R* a, int64_t step, Vec<R> b0, Vec<R> b1) {
    first = fma(splat(*a), b0, first);
    second = fma(splat(*a), b1, second);
    below.add(a + step, step, b0, b1);
  }
  template <typename E>
  INLINE_MEMBER void put(E* c, int64_t step, R keep) const {
    store(c, keep == 0 ? first : fma(splat(keep), load(c), first));
    store(c + LANES<R>, keep == 0 ? second : fma(splat(keep), load(c + LANES<R>), second));
    below.put(c + step, step, keep);
  }
};
template <typename R>
struct Sums<0, R> {
  INLINE_MEMBER void add(const R*, int64_t, Vec<R>, Vec<R>) {}
  template <typename E>
  INLINE_MEMBER void put(E*, int64_t, R) const {}
};

// Two vectors wide: the sums take 28 of 32 registers, or 12 of 16.
#if defined(__AVX512F__) || defined(NEON)
constexpr int TALLEST = 14;
#else
constexpr int TALLEST = 6;
#endif

// Row r of C is c + r step. A[d, r] is a[d W + r]. TURNED, where A is the transpose of what lies in panels, it is
// a[r W + d], and every W-th d is a `jump` further on.
template <int ROWS, bool TURNED, typename R>
__attribute__((noinline)) void tile(const R* a, int64_t jump, const R* b, int64_t depth, R keep, R* c,
                                    int64_t step) {
  Sums<ROWS, R> sums;
  while (depth > 0) {
    const int64_t run = depth < W<R> ? depth : W<R>;
    for (int64_t d = 0; d < run; d++, b += W<R>, a += TURNED ? 1 : W<R>)
      sums.add(a, TURNED ? W<R> : 1, load(b), load(b + LANES<R>));
    if (TURNED) a += jump;
    depth -= run;
  }
  keep == 0 ? sums.put(c, step, R(0)) : sums.put(c, step, keep);  // twice, for the choice to be made once
}

template <int ROWS, bool TURNED, typename R>
INLINE void tile_of(int64_t rows, const R* a, int64_t jump, const R* b, int64_t depth, R keep, R* c,
                    int64_t step = W<R>) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return tile_of<ROWS - 1, TURNED>(rows, a, jump, b, depth, keep, c, step);
  tile<ROWS, TURNED>(a, jump, b, depth, keep, c, step);
}

// c = keep c + a^T b, or TURNED a b, for one panel of b and c, in equally high tiles: 32 rows are 11, 11 and 10.
// TRIANGLE: the depth of a row ends at its diagonal. IN_RUNS: sums are of IN_ORDER products, or up to half as many more
// in the last, and then of these: 64 in order lose 1.6 times as much.
enum Shape { FULL, TRIANGLE, IN_RUNS };
constexpr int64_t IN_ORDER = 32;

template <bool TURNED, typename R>
INLINE void multiply_as(Ahead& ahead, const Panels<R>& a, const R* b, R* c, int64_t rows, int64_t depth, R keep,
              Shape shape = FULL) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = W<R> - r % W<R> < rows - r ? W<R> - r % W<R> : rows - r;
    const int64_t tiles = (left + TALLEST - 1) / TALLEST, height = (left + tiles - 1) / tiles;
    const int64_t until = shape == TRIANGLE && r + height < depth ? r + height : depth;
    ahead.fetch();
    for (int64_t d = 0, run; d < until; d += run) {
      run = shape != IN_RUNS || until - d < IN_ORDER * 3 / 2 ? until - d : IN_ORDER;
      tile_of<TALLEST, TURNED>(height, TURNED ? a.at(r, d) : a.at(d, r), (a.rows - 1) * W<R>, b + d * W<R>, run,
                               d ? R(1) : keep, c + r * W<R>);
    }
    r += height;
  }
}

template <typename R>
void multiply(Ahead& ahead, const Panels<R>& a, const R* b, R* c, int64_t rows, int64_t depth, R keep,
              Shape shape = FULL) {
  multiply_as<false>(ahead, a, b, c, rows, depth, keep, shape);
}
// What lies in panels is the transpose of a left operand.
template <typename R>
struct Transposed {
  Panels<R> panels;
};
template <typename R>
void multiply(Ahead& ahead, const Transposed<R>& a, const R* b, R* c, int64_t rows, int64_t depth, R keep,
              Shape shape = FULL) {
  multiply_as<true>(ahead, a.panels, b, c, rows, depth, keep, shape);
}

}  // namespace
}  // namespace ISA
