// What the gated RMS norm's kernels read and write. No torch here: kernel files include this.
#pragma once

#include <cstdint>

#include "elements.h"

template <typename E>
struct GatedRmsNorm {
  int64_t rows, D;
  int64_t groups, channels;        // of a row, D = groups * channels; each group has a norm of its own
  int64_t x_row, gate_row;         // elements from a row of x to the next, of gate to the next
  double eps;
  bool gate_first, silu, centred;  // x times the gate is normed; silu or sigmoid; LayerNorm or RMS norm
  bool stream;                     // past the caches, what is written

  const E* x;                      // [rows, D] by these strides
  const E* gate;                   // [rows, D]        may be null
  const Real<E>* weight;           // [D]              may be null where bias is
  const Real<E>* bias;             // [D]              may be null where not centred

  // Forward.
  E* y;                            // [rows, D]

  // Backward. Each task writes its own layer of dweight and dbias; the caller sums the layers, in order.
  const E* dy;                     // [rows, D]
  E* dx;                           // [rows, D]
  E* dgate;                        // [rows, D]        null where gate is
  Real<E>* dweight;                // [tasks, D]       null where weight is
  Real<E>* dbias;                  // [tasks, D]       null where bias is

  // A task is so many rows: 32768 elements or more, 32 rows or more, or layers would outgrow what they sum, and as many
  // as leave 512 tasks, 8 for each of 64 threads.
  int64_t part() const {
    const int64_t least = D < 1024 ? 32768 / D : 32, most = (rows + 511) / 512;
    return least < most ? most : least;
  }
  int64_t tasks() const { return (rows + part() - 1) / part(); }
  // Of a task's scratch, in numbers: a group is whole vectors of 16 lanes at most; forward takes one row and 5 numbers
  // a group, backward two rows and three times the gradients of weight and bias; and rows on their way past the caches.
  int64_t width() const { return (channels + 15) / 16 * 16; }
  int64_t gradients() const { return (bias ? 2 : 1) * groups * width(); }
  int64_t rows_at() const { return (groups * (width() + 5) + 15) / 16 * 16; }
  int64_t scratch() const { return rows_at() + D; }
  int64_t backward_rows_at() const { return rows_at() + groups * width() + 3 * gradients(); }
  int64_t backward_scratch() const { return backward_rows_at() + 2 * D; }
};

#define DECLARE(isa)                                                                         \
  namespace isa {                                                                            \
  template <typename E>                                                                      \
  void gated_rms_norm_forward(const GatedRmsNorm<E>&, int64_t task, Real<E>* scratch);       \
  template <typename E>                                                                      \
  void gated_rms_norm_backward(const GatedRmsNorm<E>&, int64_t task, Real<E>* scratch);      \
  }
DECLARE(base)
DECLARE(avx2)
DECLARE(avx512)
#undef DECLARE
