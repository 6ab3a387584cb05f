// Matrices as the micro-kernel reads them, in panels, and as tensors hold them, in rows. Included by kernel files only.
#pragma once

#include "vec.h"

namespace ISA {
namespace {

// A matrix in panels of W columns, [columns / W, rows, W].
template <typename R>
constexpr int64_t W = 2 * LANES<R>;

template <typename R>
INLINE int64_t padded(int64_t columns) {
  return (columns + W<R> - 1) / W<R> * W<R>;
}

template <typename R>
struct Panels {
  R* data;
  int64_t rows;

  INLINE_MEMBER R* at(int64_t row, int64_t column) const {
    return data + (column / W<R> * rows + row) * W<R> + column % W<R>;
  }
};

// Rows in a tensor, `step` elements apart. step < 0: the last one first.
template <typename E>
struct Rows {
  E* first;
  int64_t step;

  INLINE_MEMBER E* at(int64_t row, int64_t column = 0) const { return first + row * step + column; }
};

// f(column, count) for each vector of a row. It is inlined twice: but for the last vector, count is a constant.
template <typename R, typename F>
INLINE void for_vectors(int64_t width, F f) {
  int64_t column = 0;
  for (; column + LANES<R> <= width; column += LANES<R>) f(column, LANES<R>);
  if (column < width) f(column, width - column);
}
#define INLINE_LAMBDA __attribute__((always_inline))

}  // namespace
}  // namespace ISA
