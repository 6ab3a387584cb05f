// Vectors as rows of a matrix: its transpose, and the sums of its rows. Included by kernel files only.
#pragma once

#include "vec.h"

namespace ISA {

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

}  // namespace ISA
