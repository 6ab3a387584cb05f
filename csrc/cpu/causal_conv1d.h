// What the causal convolution's kernels read and write. No torch here: kernel files include this.
#pragma once

#include <cstdint>

#include "elements.h"
#include "states.h"
#include "tokens.h"

template <typename E>
struct CausalConv1d {
  int64_t B, T, D, W;              // B rows of T tokens; D channels; a token and the W - 1 before it make an output
  int64_t S;                       // sequences: the B rows, or those packed into the one row
  bool silu;
  bool stream;                     // past the caches, what is written
  int64_t block;                   // channels of a task

  Tokens<const E> x;               // [B, T, D]
  const Real<E>* weight;           // [D, W]
  const Real<E>* bias;             // [D]              may be null
  const Real<E>* initial_state;    // [S, D, W - 1]    may be null: zero
  const int32_t* cu_seqlens;       // [S + 1]          may be null: nothing is packed

  // Forward. The step has T = 1.
  Tokens<E> y;                     // [B, T, D]        lies as x
  Real<E>* final_state;            // [S, D, W - 1]

  // Backward. Each segment of a row writes its own layer of dweight and dbias; the caller sums the layers, in order.
  Tokens<const E> dy;              // [B, T, D]
  const Real<E>* dfinal_state;     // [S, D, W - 1]    may be null: zero
  Tokens<E> dx;                    // [B, T, D]        lies as x
  Real<E>* dweight;                // [B * segments, D, W]
  Real<E>* dbias;                  // [B * segments, D]
  Real<E>* dinitial_state;         // [S, D, W - 1]

  // A task is a segment of a row, or the state of a sequence, for a block of channels: at most BLOCK.
  static constexpr int64_t SEGMENT = 256, BLOCK = 512, NARROWEST = 64;

  int64_t segments() const { return (T + SEGMENT - 1) / SEGMENT; }
  int64_t blocks() const { return (D + block - 1) / block; }
  // Blocks as wide as leaves each thread three tasks to even out; no result depends on them.
  void share(int64_t threads) {
    for (block = BLOCK; block > NARROWEST && B * segments() * blocks() < 3 * threads;) block /= 2;
  }
  int64_t tasks() const { return (B * segments() + (W > 1 ? S : 0)) * blocks(); }
  // Numbers in a task's scratch: three filters of a block, its biases and their gradients, 4 W vectors of 16 lanes at
  // most; a tile of results; along tokens, two times a row for each lane: a segment, W - 1 tokens on both sides and a
  // vector more.
  static constexpr int64_t TILE = 8;
  int64_t scratch() const { return (3 * W + 2 + TILE) * BLOCK + 4 * W * 16 + 2 * 16 * pitch(); }
  int64_t pitch() const { return (SEGMENT + 2 * (W - 1) + 16 + 15) / 16 * 16; }
};

// What a step reads and advances: states [., D, slots], slots >= W - 1, the latest token last. Circular where
// `positions` tell the number of each new token: token n is in slot n mod slots.
template <typename S>
struct ConvolutionStates : States<S> {
  int64_t slots;
  const int64_t* positions;        // [B]              may be null
};

// A step has B * blocks() tasks. Tokens lie side by side along them: in x, or in dy.
#define DECLARE(isa)                                                                         \
  namespace isa {                                                                            \
  template <typename E>                                                                      \
  void causal_conv1d_forward(const CausalConv1d<E>&, int64_t task, Real<E>* scratch);        \
  template <typename E>                                                                      \
  void causal_conv1d_backward(const CausalConv1d<E>&, int64_t task, Real<E>* scratch);       \
  template <typename E>                                                                      \
  void causal_conv1d_forward_along(const CausalConv1d<E>&, int64_t task, Real<E>* scratch);  \
  template <typename E>                                                                      \
  void causal_conv1d_backward_along(const CausalConv1d<E>&, int64_t task, Real<E>* scratch); \
  template <typename E, typename S>                                                          \
  void causal_conv1d_step(const CausalConv1d<E>&, const ConvolutionStates<S>&, int64_t task, \
                          Real<E>* scratch);                                                 \
  }
DECLARE(base)
DECLARE(avx2)
DECLARE(avx512)
#undef DECLARE
