// What the products of a chunk read, where the processor multiplies bfloat16: a copy for each side and depth, for two
// neighbours along a depth share a word. Tensors are bfloat16 already: rounded are what a factor or decays weigh,
// `left`, `right` and the state. All are summed, and the state is carried, in float32. Included by retention's kernels
// only.
#pragma once

#if defined(__AMX_BF16__)
#include "../multiply_tiles.h"
#else
#include "../multiply_pairs.h"
#endif
#include "packing.h"

namespace ISA {
namespace {

template <typename R>
LeftPairs left_pairs(Memory<R>& memory, int64_t rows, int64_t depth) {
  return {reinterpret_cast<bf16*>(memory.take(paired(rows) * paired(depth) / 2)), paired(rows)};
}
template <typename R>
RightPairs right_pairs(Memory<R>& memory, int64_t depth, int64_t columns) {
  return {reinterpret_cast<bf16*>(memory.take(paired(depth) * padded<R>(columns) / 2)), paired(depth)};
}

INLINE Words times(Words pairs, Floats first, Floats second) {
  return pair(first_of(pairs) * first, second_of(pairs) * second);
}

// 32 columns of n rows, `factor` times; zero behind the n-th.
struct PairedRows {
  Rows<const bf16> from;
  int64_t n, column, count;
  float factor;

  INLINE_MEMBER Words at(int64_t i) const {
    if (i >= n) return Words{};
    const Words pairs = count == PAIRED ? load_words(from.at(i, column)) : load_words(from.at(i, column), count);
    return factor == 1 ? pairs : times(pairs, splat(factor), splat(factor));
  }
};

// f(rows) for each 32 columns of n rows.
template <typename F>
INLINE void for_columns(const Rows<const bf16>& from, int64_t n, int64_t width, float factor, F f) {
  for (int64_t column = 0; column < width; column += PAIRED)
    f(PairedRows{from, n, column, width - column < PAIRED ? width - column : PAIRED, factor});
}

INLINE void transpose_words(Words* block) {
  Floats floats[LANES<float>];
  memcpy(floats, block, sizeof floats);
  transpose<float>(floats);
  memcpy(block, floats, sizeof floats);
}

// a [n, K]: from the left.
template <typename R>
struct Writers {
  LeftPairs by_width, by_token;

  Writers(Memory<R>& memory, int64_t K)
      : by_width(left_pairs(memory, CHUNK, K)), by_token(left_pairs(memory, K, CHUNK)) {}

  INLINE_MEMBER void take(const Rows<const bf16>& from, int64_t n, int64_t K, float factor, Reads reads) const {
    for_columns(from, n, K, factor, [&](const PairedRows& rows) INLINE_LAMBDA {
      for (int64_t i = 0; i < n; i += PAIRED) {
        Words halves[2][PAIRED / 2];
        for (int64_t j = 0; j < PAIRED; j += 2) {
          const Words row = rows.at(i + j), next = rows.at(i + j + 1);
          if (reads & FROM_LEFT) {
            store_words(by_width.at(i + j, rows.column), row);
            store_words(by_width.at(i + j + 1, rows.column), next);
          }
          zip_rows(row, next, halves[0][j / 2], halves[1][j / 2]);
        }
        for (int64_t half = 0; half < 2; half++) {
          transpose_words(halves[half]);
          for (int64_t j = 0; j < PAIRED / 2; j++)
            store_words(by_token.at(rows.column + half * PAIRED / 2 + j, i), halves[half][j]);
        }
      }
    });
  }
};

// b [n, V]: from the left over V, from the right over tokens, there weighed too.
template <typename R>
struct Values {
  LeftPairs by_width;
  RightPairs by_token, weighed;

  Values(Memory<R>& memory, int64_t V)
      : by_width(left_pairs(memory, CHUNK, V)),
        by_token(right_pairs(memory, CHUNK, V)),
        weighed(right_pairs(memory, CHUNK, V)) {}

  INLINE_MEMBER void take(const Rows<const bf16>& from, int64_t n, int64_t V, const float* weight, Reads reads) const {
    for_columns(from, n, V, 1, [&](const PairedRows& rows) INLINE_LAMBDA {
      for (int64_t i = 0; i < paired(n); i += 2) {
        const Words row = rows.at(i), next = rows.at(i + 1);
        if (reads & FROM_RIGHT) {
          store_words(by_width.at(i, rows.column), row);
          store_words(by_width.at(i + 1, rows.column), next);
        }
        Words left, right;
        zip_rows(row, next, left, right);
        if (reads & FROM_LEFT) {
          store_words(by_token.at(i, rows.column), left);
          store_words(by_token.at(i, rows.column + PAIRED / 2), right);
        }
        const Floats first = splat(weight[i]), second = splat(weight[i + 1]);
        store_words(weighed.at(i, rows.column), times(left, first, second));
        store_words(weighed.at(i, rows.column + PAIRED / 2), times(right, first, second));
      }
    });
  }
};

// f(rows' first column and pair, first token, pairs of 16 tokens)
template <typename F>
INLINE void for_turned_pairs(const PairedRows& rows, F f) {
  for (int64_t i = 0; i < paired(rows.n); i += LANES<float>) {
    Words block[LANES<float>];
    for (int64_t j = 0; j < LANES<float>; j++) block[j] = rows.at(i + j);
    transpose_words(block);
    for (int64_t j = 0; j < LANES<float>; j++) f(rows.column + 2 * j, i, block[j]);
  }
}

// c [n, K]: from the right, and weighed from the left.
template <typename R>
struct LeftReaders {
  RightPairs by_width;
  LeftPairs weighed;

  LeftReaders(Memory<R>& memory, int64_t K)
      : by_width(right_pairs(memory, K, CHUNK)), weighed(left_pairs(memory, CHUNK, K)) {}

  INLINE_MEMBER void take(const Rows<const bf16>& from, int64_t n, int64_t K, float factor, const float* weight) const {
    for_columns(from, n, K, factor, [&](const PairedRows& rows) INLINE_LAMBDA {
      if (weight) weigh(rows, weight);
      for_turned_pairs(rows, [&](int64_t k, int64_t i, Words pairs) INLINE_LAMBDA {
        store_words(by_width.at(k, i), pairs);
      });
    });
  }
  // What was taken, for other weights.
  INLINE_MEMBER void weigh(const Rows<const bf16>& from, int64_t n, int64_t K, float factor,
                           const float* weight) const {
    for_columns(from, n, K, factor, [&](const PairedRows& rows) INLINE_LAMBDA { weigh(rows, weight); });
  }
  INLINE_MEMBER void weigh(const PairedRows& rows, const float* weight) const {
    for (int64_t i = 0; i < rows.n; i++)
      store_words(weighed.at(i, rows.column), times(rows.at(i), splat(weight[i]), splat(weight[i])));
  }
  // sums[i] = c[i] . z[:, i], in runs of 32.
  void products(const Panels<float>& z, float* sums) const {
    for (int64_t i = 0; i < CHUNK; i += LANES<float>) {
      Floats total{};
      for (int64_t row = 0; row < z.rows;) {
        Floats run{};
        for (const int64_t end = row + 32 < z.rows ? row + 32 : z.rows; row < end; row += 2) {
          const Words pairs = load_words(by_width.at(row, i));
          run = fma(first_of(pairs), load(z.at(row, i)), run);
          if (row + 1 < end) run = fma(second_of(pairs), load(z.at(row + 1, i)), run);
        }
        total += run;
      }
      store(sums + i, total);
    }
  }
};

// d [n, V]: from the right.
template <typename R>
struct RightReaders {
  RightPairs by_width, weighed;

  RightReaders(Memory<R>& memory, int64_t V)
      : by_width(right_pairs(memory, V, CHUNK)), weighed(right_pairs(memory, V, CHUNK)) {}

  INLINE_MEMBER void take(const Rows<const bf16>& from, int64_t n, int64_t V, const float* weight) const {
    for_columns(from, n, V, 1, [&](const PairedRows& rows) INLINE_LAMBDA {
      for_turned_pairs(rows, [&](int64_t v, int64_t i, Words pairs) INLINE_LAMBDA {
        store_words(by_width.at(v, i), pairs);
        store_words(weighed.at(v, i), times(pairs, load(weight + i), load(weight + i)));
      });
    });
  }
};

// Rows j and j + 1 of sums, of which there are n, from column i on.
INLINE Words paired_rows(const Panels<float>& sums, int64_t n, int64_t j, int64_t i) {
  const Floats first = j < n ? load(sums.at(j, i)) : Floats{};
  return pair(first, j + 1 < n ? load(sums.at(j + 1, i)) : Floats{});
}

// `left` [writer, reader], which a product over writers reads from the left.
template <typename R>
struct LeftScores {
  Panels<float> sums;
  LeftPairs by_writer;

  explicit LeftScores(Memory<R>& memory)
      : sums(memory.panels(CHUNK, CHUNK)), by_writer(left_pairs(memory, CHUNK, CHUNK)) {}

  INLINE_MEMBER void round(int64_t n) const {
    for (int64_t i = 0; i < n; i += LANES<float>)
      for (int64_t j = 0; j < n; j += PAIRED) {
        Words block[LANES<float>];
        for (int64_t k = 0; k < LANES<float>; k++) block[k] = paired_rows(sums, n, j + 2 * k, i);
        transpose_words(block);
        for (int64_t k = 0; k < LANES<float>; k++) store_words(by_writer.at(i + k, j), block[k]);
      }
  }
};

// `right` [writer, reader], which it reads from the right.
template <typename R>
struct RightScores {
  Panels<float> sums;
  RightPairs by_writer;

  explicit RightScores(Memory<R>& memory)
      : sums(memory.panels(CHUNK, CHUNK)), by_writer(right_pairs(memory, CHUNK, CHUNK)) {}

  INLINE_MEMBER void round(int64_t n) const {
    for (int64_t j = 0; j < paired(n); j += 2)
      for (int64_t i = 0; i < paired(n); i += LANES<float>)
        store_words(by_writer.at(j, i), paired_rows(sums, n, j, i));
  }
};

// M [K, V]: itself, and what products over V, from the left, and over K, from the right, read.
template <typename R>
struct State {
  Panels<float> sums;
  LeftPairs by_column;
  RightPairs by_row;

  State() = default;
  State(Memory<R>& memory, int64_t K, int64_t V)
      : sums(memory.panels(K, V)), by_column(left_pairs(memory, K, V)), by_row(right_pairs(memory, K, V)) {}

  Rounded rounded(int64_t v, Reads reads) const {
    return {reads & FROM_RIGHT ? by_column.at(0, v) : nullptr, reads & FROM_LEFT ? by_row.at(0, v) : nullptr};
  }
  // M is given.
  void enter(int64_t V, Reads reads) const {
    const int64_t rows = paired(sums.rows);
    for (int64_t v = 0; v < V; v += W<float>)
      for (int64_t k = 0; k < rows; k += 2) {
        Floats x[4] = {};
        for (int64_t i = 0; i < 4 && k + i / 2 < sums.rows; i++)
          x[i] = load(sums.at(k + i / 2, v + i % 2 * LANES<float>));
        rounded(v, reads).from(k).put(x[0], x[1], x[2], x[3]);
      }
  }
  // M' = keep M + a b, the panel of column v.
  void advance(Ahead& ahead, const LeftPairs& a, const RightPairs& b, int64_t v, int64_t n, float keep,
               Reads reads) const {
    multiply(ahead, a, b.at(0, v), sums.at(0, v), sums.rows, n, keep, FULL, rounded(v, reads));
  }
};

}  // namespace
}  // namespace ISA
