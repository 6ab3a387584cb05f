// Between tensors and panels. Included by retention's kernels only.
#pragma once

#include "../panels.h"
#include "../turn.h"

namespace ISA {
namespace {

// Tokens that are multiplied at once. More are read and written less state for each token, but more pairs of tokens.
#if defined(__AMX_BF16__)
constexpr int64_t CHUNK = 64;
#else
constexpr int64_t CHUNK = 32;
#endif

// Which sides a state is read from.
enum Reads { NOWHERE = 0, FROM_LEFT = 1, FROM_RIGHT = 2, BOTH = 3 };

// What a task has, taken piece by piece. Without memory it only counts.
template <typename R>
struct Memory {
  R* memory;
  int64_t used = 0;

  R* take(int64_t count) {
    R* here = memory ? memory + used : nullptr;
    used += padded<R>(count);
    return here;
  }
  Panels<R> panels(int64_t rows, int64_t columns) { return {take(rows * padded<R>(columns)), rows}; }
};

// x <- factor times n rows `width` wide; weighed <- row i of that times weight[i].
template <typename E, typename R = Real<E>>
void pack(const Rows<const E>& from, int64_t n, int64_t width, R factor, const Panels<R>& x,
          const R* weight = nullptr, const Panels<R>& weighed = {}) {
  for (int64_t i = 0; i < n; i++)
    for_vectors<R>(width, [&](int64_t column, int64_t count) INLINE_LAMBDA {
      const Vec<R> value = factor * load(from.at(i, column), count);
      store(x.at(i, column), value);
      if (weight) store(weighed.at(i, column), weight[i] * value);
    });
}

// The same transposed: row i is column i of x [width, CHUNK], and zeros follow the n-th; column i is weighed.
template <typename E, typename R = Real<E>>
void pack_transposed(const Rows<const E>& from, int64_t n, int64_t width, R factor, const Panels<R>& x,
                     const R* weight = nullptr, const Panels<R>& weighed = {}) {
  for (int64_t i = 0; i < CHUNK; i += LANES<R>)
    for_vectors<R>(width, [&](int64_t row, int64_t count) INLINE_LAMBDA {
      Vec<R> block[LANES<R>];
      for (int64_t j = 0; j < LANES<R>; j++)
        block[j] = i + j < n ? factor * load(from.at(i + j, row), count) : Vec<R>{};
      transpose<R>(block);
      for (int64_t j = 0; j < count; j++) {
        store(x.at(row + j, i), block[j]);
        if (weight) store(weighed.at(row + j, i), load(weight + i) * block[j]);
      }
    });
}

// Where rows of a result go: to their place, or else into a layer, added to what is there already.
template <typename E>
struct Sink {
  Rows<E> whole;
  Rows<Real<E>> layer;
  bool add;

  INLINE_MEMBER void put(int64_t row, int64_t column, Vec<Real<E>> value, int64_t count) const {
    if (whole.first) return store(whole.at(row, column), value, count);
    if (add) value += load(layer.at(row, column), count);
    store(layer.at(row, column), value, count);
  }
};

template <typename E, typename R = Real<E>>
void unpack(const Panels<R>& x, int64_t n, int64_t width, const Sink<E>& to) {
  for (int64_t i = 0; i < n; i++)
    for_vectors<R>(width, [&](int64_t column, int64_t count) INLINE_LAMBDA {
      to.put(i, column, load(x.at(i, column)), count);
    });
}

// x [width, CHUNK] -> n rows
template <typename E, typename R = Real<E>>
void unpack_transposed(const Panels<R>& x, int64_t n, int64_t width, R factor, const Sink<E>& to) {
  for (int64_t i = 0; i < n; i += LANES<R>)
    for_vectors<R>(width, [&](int64_t row, int64_t count) INLINE_LAMBDA {
      Vec<R> block[LANES<R>];
      for (int64_t j = 0; j < LANES<R>; j++) block[j] = j < count ? load(x.at(row + j, i)) : Vec<R>{};
      transpose<R>(block);
      for (int64_t j = 0; j < LANES<R> && i + j < n; j++) to.put(i + j, row, factor * block[j], count);
    });
}

}  // namespace
}  // namespace ISA
