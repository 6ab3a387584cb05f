// What the products of a chunk read, where they multiply the numbers that they sum: each tensor is packed once, and its
// panels are the operand of every product. Included by retention's kernels only.
#pragma once

#include "../multiply.h"
#include "packing.h"

namespace ISA {
namespace {

// a [n, K]: from the left.
template <typename R>
struct Writers {
  Panels<R> by_token;                      // a product over tokens sums these
  Transposed<R> by_width;                  // one over K sums these

  Writers(Memory<R>& memory, int64_t K) : by_token(memory.panels(CHUNK, K)), by_width{by_token} {}
  template <typename E>
  void take(const Rows<const E>& from, int64_t n, int64_t K, R factor, Reads) const {
    pack(from, n, K, factor, by_token);
  }
};

// b [n, V]: from the left over V, from the right over tokens, there weighed too.
template <typename R>
struct Values {
  Panels<R> by_token, weighed;
  Transposed<R> by_width;

  Values(Memory<R>& memory, int64_t V)
      : by_token(memory.panels(CHUNK, V)), weighed(memory.panels(CHUNK, V)), by_width{by_token} {}
  template <typename E>
  void take(const Rows<const E>& from, int64_t n, int64_t V, const R* weight, Reads) const {
    pack(from, n, V, R(1), by_token, weight, weighed);
  }
};

// c [n, K]: from the right, and weighed from the left.
template <typename R>
struct LeftReaders {
  Panels<R> by_width, weighed;

  LeftReaders(Memory<R>& memory, int64_t K) : by_width(memory.panels(K, CHUNK)), weighed(memory.panels(K, CHUNK)) {}
  template <typename E>
  void take(const Rows<const E>& from, int64_t n, int64_t K, R factor, const R* weight) const {
    pack_transposed(from, n, K, factor, by_width, weight, weighed);
  }
  // What was taken, for other weights.
  template <typename E>
  void weigh(const Rows<const E>&, int64_t, int64_t K, R, const R* weight) const {
    for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
      const Vec<R> weights = load(weight + i);
      for (int64_t k = 0; k < K; k++) store(weighed.at(k, i), weights * load(by_width.at(k, i)));
    }
  }
  // sums[i] = c[i] . z[:, i], in runs of 32.
  void products(const Panels<R>& z, R* sums) const {
    for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
      Vec<R> total{};
      for (int64_t row = 0; row < z.rows;) {
        Vec<R> run{};
        for (const int64_t end = row + 32 < z.rows ? row + 32 : z.rows; row < end; row++)
          run = fma(load(by_width.at(row, i)), load(z.at(row, i)), run);
        total += run;
      }
      store(sums + i, total);
    }
  }
};

// d [n, V]: from the right.
template <typename R>
struct RightReaders {
  Panels<R> by_width, weighed;

  RightReaders(Memory<R>& memory, int64_t V) : by_width(memory.panels(V, CHUNK)), weighed(memory.panels(V, CHUNK)) {}
  template <typename E>
  void take(const Rows<const E>& from, int64_t n, int64_t V, const R* weight) const {
    pack_transposed(from, n, V, R(1), by_width, weight, weighed);
  }
};

// `left` and `right` [writer, reader]: sums themselves, and what a product over writers reads.
template <typename R>
struct LeftScores {
  Panels<R> sums, by_writer;

  explicit LeftScores(Memory<R>& memory) : sums(memory.panels(CHUNK, CHUNK)), by_writer(sums) {}
  void round(int64_t) const {}
};
template <typename R>
using RightScores = LeftScores<R>;

// M [K, V]: itself, and what products over V, from the left, and over K, from the right, read.
template <typename R>
struct State {
  Panels<R> sums, by_row;
  Transposed<R> by_column;

  State() = default;
  State(Memory<R>& memory, int64_t K, int64_t V) : sums(memory.panels(K, V)), by_row(sums), by_column{sums} {}
  // M is given.
  void enter(int64_t, Reads) const {}
  // M' = keep M + a^T b, the panel of column v.
  void advance(Ahead& ahead, const Panels<R>& a, const Panels<R>& b, int64_t v, int64_t n, R keep, Reads) const {
    multiply(ahead, a, b.at(0, v), sums.at(0, v), sums.rows, n, keep);
  }
};

}  // namespace
}  // namespace ISA
