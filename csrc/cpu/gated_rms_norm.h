// What the gated RMS norm's kernels read and write. No torch here: kernel files include this.
#pragma once

#include <cstdint>

#include "elements.h"

template <typename E>
struct GatedRmsNorm {
  int64_t rows, D;
  int64_t x_row, gate_row;         // elements from a row of x to the next, of gate to the next
  double eps;

  const E* x;                      // [rows, D] by these strides
  const E* gate;                   // [rows, D]        may be null
  const Real<E>* weight;           // [D]              may be null

  // Forward.
  E* y;                            // [rows, D]

  // Backward. Each task writes its own layer of dweight; the caller sums the layers, in order.
  const E* dy;                     // [rows, D]
  E* dx;                           // [rows, D]
  E* dgate;                        // [rows, D]        null where gate is
  Real<E>* dweight;                // [tasks, D]       null where weight is

  // A task is so many rows: 32768 elements or more, and 32 rows or more, or layers would outgrow what they sum.
  int64_t part() const { return D < 1024 ? 32768 / D : 32; }
  int64_t tasks() const { return (rows + part() - 1) / part(); }
  // Numbers in a task's scratch: five rows, each in whole vectors of 16 lanes at most.
  int64_t width() const { return (D + 15) / 16 * 16; }
  int64_t scratch() const { return 5 * width(); }
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
