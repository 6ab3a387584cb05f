// What the selective scan's kernels read and write. No torch here: kernel files include this.
#pragma once

#include "elements.h"
#include "states.h"
#include "tokens.h"

template <typename E>
struct SelectiveScan {
  using R = Real<E>;

  int64_t B, T, D, G, N;           // B rows of T tokens; D channels in G groups of D / G; N states a channel
  int64_t S;                       // sequences: the B rows, or those packed into the one row
  int64_t split;                   // channels one task owns, at most
  int64_t segments, length;        // parts of a sequence that run at once, and their tokens: a multiple of CHUNK
  bool dt_softplus;

  Tokens<const E> x, dt, z;        // [B, T, D]        z may be null
  const R* a;                      // [D, N]
  Projected<const E> b, c;         // [B, T, G, N]
  const R *d, *dt_bias;            // [D]              either may be null
  const R* initial_state;          // [S, segments, D, N]: what enters each segment; may be null: zero
  const int32_t* cu_seqlens;       // [S + 1]          may be null: nothing is packed
  R* checkpoints;                  // [ceil(T / CHUNK), B, N, D]: the state that enters every CHUNK-th token of a row;
                                   // written by the forward pass unless null, read by the backward pass
  // Forward. One token: T = 1, all is dense.
  Tokens<E> y;                     // [B, T, D]
  R* final_state;                  // [S, D, N]

  // Backward. Where tasks add to one gradient, each writes a layer and the caller sums the layers, in order.
  Tokens<const E> dy;              // [B, T, D]
  const R* dfinal_state;           // [S, segments, D, N]: of what leaves each segment; may be null: zero
  Tokens<E> dx, ddt, dz;           // [B, T, D]        dz is null where z is
  Projected<R> db, dc;             // [splits] of [B, T, G, N]
  R* da;                           // [S, segments, D, N]
  R *dd, *ddt_bias;                // [S, segments, D]
  R* dinitial_state;               // [S, segments, D, N]; the caller needs that of the first segments

  // What a segment adds to a state that crosses it, and what it leaves of that state.
  R *added, *left;                 // [S, segments, D, N]

  static constexpr int64_t CHUNK = 32, STEP_CHANNELS = 256;

  int64_t splits() const { return (D / G + split - 1) / split; }
  int64_t tasks() const { return S * segments * G * splits(); }
  int64_t segment(int64_t task) const { return task / splits() / G % segments; }
};

// Each does one of p.tasks() and owns `scratch`, which holds selective_scan_scratch() numbers, 64-byte aligned; the
// step does one of B * ceil(D / STEP_CHANNELS), of states [., D, N] with a contiguous last axis.
#define DECLARE(isa)                                                                      \
  namespace isa {                                                                         \
  template <typename E>                                                                   \
  int64_t selective_scan_scratch(const SelectiveScan<E>&);                                \
  template <typename E>                                                                   \
  void selective_scan_forward(const SelectiveScan<E>&, int64_t task, Real<E>* scratch);   \
  template <typename E>                                                                   \
  void selective_scan_backward(const SelectiveScan<E>&, int64_t task, Real<E>* scratch);  \
  template <typename E>                                                                   \
  void selective_scan_crossing(const SelectiveScan<E>&, int64_t task, Real<E>* scratch);  \
  template <typename E>                                                                   \
  void selective_scan_crossing_back(const SelectiveScan<E>&, int64_t task, Real<E>* scratch); \
  template <typename E, typename S>                                                       \
  void selective_scan_step(const SelectiveScan<E>&, const States<S>&, int64_t task);      \
  }
DECLARE(base)
DECLARE(avx2)
DECLARE(avx512)
#undef DECLARE
