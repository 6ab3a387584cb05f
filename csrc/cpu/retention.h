// What retention's kernels read and write. No torch here: kernel files include this.
#pragma once

#include "elements.h"
#include "states.h"
#include "tokens.h"

// A gradient: whole, where each element is one task's; else in layers of [B, T, heads, width], one a task that has a
// part in it, for the caller to sum in order.
template <typename E>
struct RetentionGradient {
  E* whole;
  Real<E>* layers;
};

// As many heads are walked together at most.
constexpr int64_t RETENTION_TOGETHER = 8;

template <typename E>
struct Retention {
  using R = Real<E>;

  int64_t B, T, Hq, Hk, Hv, K, V;          // B rows of T tokens; K and V wide
  int64_t H;                               // heads of o and of the state; head h reads head h / (H / Hx) of x
  int64_t N;                               // sequences: the B rows, or those packed into the one row
  int64_t heads, columns;                  // of the state: what one task owns, columns at most
  bool per_token;
  R scale;

  Heads<const E> q, k, v;                  // [B, T, Hq, K], [B, T, Hk, K], [B, T, Hv, V]
  Heads<const R> log_decay;                // [H], or [B, T, H] where per_token
  const R* initial_state;                  // [N, H, K, V]     may be null: zero
  const int32_t* cu_seqlens;               // [N + 1]          may be null: nothing is packed
  // Forward.
  E* o;                                    // [B, T, H, V]
  R* final_state;                          // [N, H, K, V]

  // Backward.
  Heads<const E> grad_o;                   // [B, T, H, V]
  const R* dfinal_state;                   // [N, H, K, V]     may be null: zero
  RetentionGradient<E> dq, dk, dv;
  R* dlog_decay;                           // [splits, B, T, H] where per_token, else [splits, N, H]; null: not wanted
  R* dinitial_state;                       // [N, H, K, V]

  int64_t splits() const { return (V + columns - 1) / columns; }
  int64_t tasks() const { return N * (H / heads) * splits(); }
  // Heads of a task that are walked together: part of them evenly, with states of 256 KB at most, a quarter of an L2.
  int64_t together() const {
    int64_t count = heads < RETENTION_TOGETHER ? heads : RETENTION_TOGETHER;
    while (count > 1 && (heads % count || count * K * columns * int64_t{sizeof(R)} > 256 << 10)) count--;
    return count;
  }
  // In the backward the scan in order and the reversed one are tasks of their own where neither needs the other.
  int64_t scans() const { return dlog_decay ? 1 : 2; }
  int64_t backward_tasks() const { return scans() * tasks(); }
  // Tasks that have a part in the gradient of a tensor with Hx heads: those that share its heads, times `splits` where
  // each sees some columns of V only.
  int64_t layers(int64_t Hx, int64_t splits) const { return (H / Hx > heads ? H / Hx / heads : 1) * splits; }
};

template <typename E>
struct RetentionStep {
  using R = Real<E>;

  int64_t B, Hq, Hk, Hv, H, K, V;
  R scale;
  Heads<const E> q, k, v;                  // [B, Hq, K], [B, Hk, K], [B, Hv, V]
  Heads<const R> log_decay;                // [H], or [B, H]
  E* o;                                    // [B, H, V]
};

// Each does one task and owns `scratch`, 64-byte aligned, of retention_scratch numbers, or backward's. The step: one of
// the B H heads of states [., H, K, V], whose rows or columns are contiguous.
#define DECLARE(isa)                                                                    \
  namespace isa {                                                                       \
  template <typename E>                                                                 \
  int64_t retention_scratch(const Retention<E>&);                                       \
  template <typename E>                                                                 \
  int64_t retention_backward_scratch(const Retention<E>&);                              \
  template <typename E>                                                                 \
  void retention_forward(const Retention<E>&, int64_t task, Real<E>* scratch);          \
  template <typename E>                                                                 \
  void retention_backward(const Retention<E>&, int64_t task, Real<E>* scratch);         \
  template <typename E, typename S>                                                     \
  void retention_step(const RetentionStep<E>&, const States<S>&, int64_t task);         \
  template <typename E>                                                                 \
  void retention_crossing(const Retention<E>&, int64_t task, Real<E>* scratch);         \
  template <typename E>                                                                 \
  void retention_crossing_back(const Retention<E>&, int64_t task, Real<E>* scratch);    \
  }
DECLARE(base)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512_bf16)
DECLARE(amx)
#undef DECLARE
