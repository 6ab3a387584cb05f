// What the kernels of LiGO's expansion read and write. No torch here: kernel files include this.
#pragma once

#include <cstdint>

#include "elements.h"

// One matrix for each of some layers: elements from a row, a column and a layer to the next. Of rows and columns one
// lie side by side. In an op's element type, or else in that of its arithmetic.
template <typename E>
struct Layers {
  E* rounded;
  Real<E>* exact;
  int64_t row, column, layer;

  explicit operator bool() const { return rounded || exact; }
  Layers from(int64_t r, int64_t c) const { return moved(r * row + c * column); }
  Layers at(int64_t l) const { return moved(l * layer); }
  Layers turned() const { return {rounded, exact, column, row, layer}; }
  Layers moved(int64_t by) const {
    return {rounded ? rounded + by : rounded, exact ? exact + by : exact, row, column, layer};
  }
};

// The result [rows, columns] is computed in blocks, a task each: as equal ones as multiples of 32 can be.
struct Blocks {
  int64_t rows, columns, height, width;

  static int64_t side(int64_t size, int64_t most) {
    const int64_t count = (size + most - 1) / most;
    return count ? ((size + count - 1) / count + 31) / 32 * 32 : 32;
  }
  Blocks(int64_t rows, int64_t columns, int64_t highest, int64_t widest)
      : rows(rows), columns(columns), height(side(rows, highest)), width(side(columns, widest)) {}
  int64_t down() const { return (rows + height - 1) / height; }
  int64_t across() const { return (columns + width - 1) / width; }
  int64_t count() const { return down() * across(); }
};

constexpr int64_t RUN = 192;       // of a sum, that a block's panels hold at once

// c[l] = plus[l] + the sum of a[j] b[j] over j of l terms to (l + 1) terms, `pairs` at most.
template <typename E>
struct Product {
  int64_t layers, terms, pairs, depth;
  Layers<E> a, b;                  // [pairs, rows, depth] and [pairs, depth, columns]
  Layers<E> plus;                  // [layers, rows, columns]     may be nothing, or c
  Layers<E> c;                     // [layers, rows, columns]
  Blocks blocks;

  int64_t tasks() const { return layers * blocks.count(); }
  double work() const { return double(pairs) * blocks.rows * blocks.columns * depth; }
  // Of a task's scratch, in numbers: panels of a, b and c.
  int64_t scratch() const {
    return RUN * (blocks.height + blocks.width) + blocks.height * blocks.width;
  }
};

// Of x[j] = a[j] b[j], or a[j] alone where the depth is 0, j < old:
//   out[i] = sum_j mix[i, j] x[j], or, backward,  back[j] = sum_i mix[i, j] grad[i]  and  dmix[i, j] = <grad[i], x[j]>
template <typename E>
struct Mix {
  int64_t old, made, depth;
  Layers<E> a, b;                  // [old, rows, depth or columns] and [old, depth, columns]
  const Real<E>* mix;              // [made, old]
  Layers<E> out;                   // [made, rows, columns]       nothing in the backward
  Layers<E> grad;                  // [made, rows, columns]       nothing in the forward
  Layers<E> back;                  // [old, rows, columns]        may be nothing
  bool add;                        // to what out or back holds
  double* dmix;                    // [tasks, made, old]          may be null: the caller sums the layers, in order
  Blocks blocks;

  static constexpr int64_t STRIP = 16;  // rows that are mixed at once
  int64_t tasks() const { return blocks.count(); }
  double work() const { return double(old) * blocks.rows * blocks.columns * (depth + 2 * made); }
  int64_t mixes() const { return (made + 31) / 32 * 32 * old + (old + 31) / 32 * 32 * made; }
  // The same, and panels of what is mixed and made of it.
  int64_t scratch() const {
    return RUN * (blocks.height + blocks.width) + blocks.height * blocks.width * old +
           STRIP * blocks.width * (made + (made > old ? made : old)) + mixes();
  }
};

#define DECLARE(isa)                                                            \
  namespace isa {                                                               \
  template <typename E>                                                         \
  void multiply_block(const Product<E>&, int64_t task, Real<E>* scratch);       \
  template <typename E>                                                         \
  void mix_block(const Mix<E>&, int64_t task, Real<E>* scratch);                \
  }
DECLARE(base)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512_bf16)
DECLARE(amx)
#undef DECLARE
