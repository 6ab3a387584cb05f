// Matrices packed in blocks, and their products. Included by kernels of LiGO's expansion only.
//
// Where bfloat16 has products of its own, what is multiplied is rounded to it in place, pairs along the sum in a word.
#pragma once

#include "kronecker_expand.h"
#include "multiply.h"
#include "turn.h"
#if defined(__AMX_BF16__)
#include "multiply_tiles.h"
#elif defined(__AVX512BF16__)
#include "multiply_pairs.h"
#endif

namespace ISA {
namespace {

// A part of a block: from a row of a panel to the next, and from a panel to the next.
template <typename R>
struct Block {
  R* data;
  int64_t row, panel;

  INLINE_MEMBER R* at(int64_t r, int64_t column) const {
    return data + column / W<R> * panel + r * row + column % W<R>;
  }
};

constexpr int64_t AHEAD = 4;       // rows of memory on their way to a cache: they end before a prefetcher follows

// Memory's [rows, columns] to a block, with zeros up to a whole panel.
template <typename E, typename R>
void pack(const E* from, int64_t row, int64_t column, int64_t rows, int64_t columns, const Block<R>& to) {
  const int64_t whole = columns / W<R> * W<R>;
  if (whole < columns)
    for (int64_t r = 0; r < rows; r++) store(to.at(r, whole), Vec<R>{}), store(to.at(r, whole + LANES<R>), Vec<R>{});
  if (column == 1) {
    for (int64_t r = 0; r < rows; r++, from += row)
      for_vectors<R>(columns, [&](int64_t c, int64_t count) INLINE_LAMBDA {
        __builtin_prefetch(from + AHEAD * row + c);
        store(to.at(r, c), load(from + c, count));
      });
  } else {
    for (int64_t c = 0; c < columns; c += W<R>)
      turn(from + c * column, column, columns - c < W<R> ? columns - c : W<R>, rows, to.at(0, c), to.row);
  }
}

template <typename E, typename R>
void unpack(const Block<R>& from, int64_t rows, int64_t columns, E* to, int64_t row, int64_t column) {
  if (column == 1) {
    for (int64_t r = 0; r < rows; r++, to += row)
      for_vectors<R>(columns, [&](int64_t c, int64_t count) INLINE_LAMBDA {
        store(to + c, load(from.at(r, c)), count);
      });
  } else {
    for (int64_t c = 0; c < columns; c += W<R>)
      turn<R, E>(from.at(0, c), from.row, rows, columns - c < W<R> ? columns - c : W<R>, to + c * column, column);
  }
}

template <typename E, typename R>
void pack(const Layers<E>& from, int64_t rows, int64_t columns, const Block<R>& to) {
  if (from.exact)
    pack((const R*)from.exact, from.row, from.column, rows, columns, to);
  else
    pack((const E*)from.rounded, from.row, from.column, rows, columns, to);
}

template <typename E, typename R>
void unpack(const Block<R>& from, int64_t rows, int64_t columns, const Layers<E>& to) {
  if (to.exact)
    unpack(from, rows, columns, to.exact, to.row, to.column);
  else
    unpack(from, rows, columns, to.rounded, to.row, to.column);
}

// Rows of memory are rows of whole panels.
template <typename R, typename E>
bool in_panels(const Layers<E>& x, int64_t columns) {
  return x.column == 1 && columns % W<R> == 0;
}

// c (+)= a^T b of panels of a and b, `depth` rows each, in what they are.
template <typename R>
void multiply_panels(const R* a, const R* b, int64_t rows, int64_t columns, int64_t depth, bool add,
                     const Block<R>& c) {
  for (int64_t left = 0; left < columns; left += W<R>)
    for (int64_t r = 0; r < rows;) {
      const int64_t more = W<R> - r % W<R> < rows - r ? W<R> - r % W<R> : rows - r;
      const int64_t tiles = (more + TALLEST - 1) / TALLEST, height = (more + tiles - 1) / tiles;
      tile_of<TALLEST, false>(height, Panels<R>{(R*)a, depth}.at(0, r), 0, b + left * depth, depth, R(add),
                              c.at(r, left), c.row);
      r += height;
    }
}

#if defined(__AVX512BF16__)
constexpr bool ROWS_MAY_BE_APART = false;  // of a product: these are copied
#if defined(__AMX_BF16__)
typedef Tiles ForProducts;
#else
struct [[maybe_unused]] ForProducts {};
#endif

// a [rows, depth], of which a row is a whole number of pairs long.
template <typename E>
void pack_left(const Layers<E>& a, int64_t rows, int64_t depth, float* to) {
  const int64_t high = paired(rows);
  pack(a, rows, depth, Block<float>{to, PAIRED, high * PAIRED});
  bf16* pairs = reinterpret_cast<bf16*>(to);
  for (int64_t i = 0; i < paired(depth) * high; i += PAIRED)
    store_words(pairs + i, in_a_row(load(to + i), load(to + i + LANES<float>)));
}
// b [depth, columns], with zeros behind the last row.
template <typename E>
void pack_right(const Layers<E>& b, int64_t depth, int64_t columns, float* to) {
  const int64_t deep = paired(depth);
  const Block<float> block{to, W<float>, deep * W<float>};
  pack(b, depth, columns, block);
  for (int64_t c = 0; c < columns; c += W<float>)
    memset(block.at(depth, c), 0, (deep - depth) * W<float> * sizeof(float));
  bf16* pairs = reinterpret_cast<bf16*>(to);
  for (int64_t i = 0; i < deep * padded<float>(columns); i += 2 * W<float>) {
    const float *row = to + i, *next = row + W<float>;
    const Words left = pair(load(row), load(next)), right = pair(load(row + LANES<float>), load(next + LANES<float>));
    store_words(pairs + i, left);
    store_words(pairs + i + W<float>, right);
  }
}
// c (+)= a b. Rows of c that are apart are brought together for the micro-kernel.
void multiply_packed(const float* a, const float* b, int64_t rows, int64_t columns, int64_t depth, bool add,
                     const Block<float>& c) {
  Ahead ahead;
  const LeftPairs left{reinterpret_cast<bf16*>(const_cast<float*>(a)), paired(rows)};
  const bf16* right = reinterpret_cast<const bf16*>(b);
  alignas(64) float panel[256 * W<float>];
  for (int64_t at = 0; at < columns; at += W<float>, right += paired(depth) * W<float>) {
    const bool apart = c.row != W<float>;
    if (apart && add) pack(c.at(0, at), c.row, 1, rows, W<float>, Block<float>{panel, W<float>, 0});
    multiply(ahead, left, right, apart ? panel : c.at(0, at), rows, depth, float(add));
    if (apart) unpack(Block<float>{panel, W<float>, 0}, rows, W<float>, c.at(0, at), c.row, 1);
  }
}
#else
constexpr bool ROWS_MAY_BE_APART = true;
struct [[maybe_unused]] ForProducts {};

template <typename E, typename R>
void pack_left(const Layers<E>& a, int64_t rows, int64_t depth, R* to) {
  pack(a.turned(), depth, rows, Block<R>{to, W<R>, depth * W<R>});
}
template <typename E, typename R>
void pack_right(const Layers<E>& b, int64_t depth, int64_t columns, R* to) {
  pack(b, depth, columns, Block<R>{to, W<R>, depth * W<R>});
}
template <typename R>
void multiply_packed(const R* a, const R* b, int64_t rows, int64_t columns, int64_t depth, bool add,
                     const Block<R>& c) {
  multiply_panels(a, b, rows, columns, depth, add, c);
}
#endif

}  // namespace
}  // namespace ISA
