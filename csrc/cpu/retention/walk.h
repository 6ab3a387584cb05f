// What a task of retention walks over: the chunks of some columns of V of one head, or of several that share q, k or v,
// one after another; the state stays in the cache. Included by retention's kernels only.
#pragma once

#include "../retention.h"
#include "chunk.h"

namespace ISA {
namespace {

// The element types that a pass is built for here.
#if defined(__AVX512BF16__)
#define FOR_ELEMENTS(F) F(bf16)
#else
#define FOR_ELEMENTS(F) F(float) F(bf16) F(double)
#endif

// n tokens in the order of a scan: from `first` on, or reversed, back.
struct Chunk {
  int64_t first, n;
  bool reversed;

  template <typename E>
  Rows<E> of(const Rows<E>& tokens) const {
    return {tokens.first ? tokens.at(first) : nullptr, reversed ? -tokens.step : tokens.step};
  }
  template <typename E>
  Sink<E> of(const Sink<E>& sink) const {
    return {of(sink.whole), of(sink.layer), sink.add};
  }
};

// Sequence n, `heads` heads from `head` on, columns v0 to v0 + V of v, o and the state; tokens begin to end of a row.
template <typename E>
struct Task {
  using R = Real<E>;

  const Retention<E>& p;
  const int64_t split, head, n, v0, V, row, begin, end;
  Workspace<R> w;

  Task(const Retention<E>& p, int64_t index, R* scratch)
      : p(p),
        split(index % p.splits()),
        head(index / p.splits() % (p.H / p.heads) * p.heads),
        n(index / p.splits() / (p.H / p.heads)),
        v0(split * p.columns),
        V(p.V - v0 < p.columns ? p.V - v0 : p.columns),
        row(p.cu_seqlens ? 0 : n),
        begin(p.cu_seqlens ? p.cu_seqlens[n] : 0),
        end(p.cu_seqlens ? p.cu_seqlens[n + 1] : p.T),
        w(scratch, p.K, V) {}

  // Head h's rows of x [B, T, Hx, width], from `column` on: dense, or where it lies.
  template <typename X>
  Rows<X> rows(X* x, int64_t h, int64_t Hx, int64_t width, int64_t column = 0) const {
    return {x ? x + (row * p.T * Hx + h / (p.H / Hx)) * width + column : nullptr, Hx * width};
  }
  template <typename X>
  Rows<X> rows(const Heads<X>& x, int64_t h, int64_t Hx, int64_t column = 0) const {
    return {x.data ? x.at(row, 0, h / (p.H / Hx)) + column : nullptr, x.token};
  }
  // Where its gradient goes. A task that sees some columns of V only has a layer of its own for the others.
  Sink<E> sink(const RetentionGradient<E>& to, int64_t h, int64_t Hx, int64_t width, bool whole_width) const {
    const int64_t shared = p.H / Hx, column = whole_width ? 0 : v0;
    const int64_t layer = whole_width ? h % shared / p.heads * p.splits() + split : h % shared / p.heads;
    R* const here = to.layers ? to.layers + layer * p.B * p.T * Hx * width : nullptr;
    return {rows(to.whole, h, Hx, width, column), rows(here, h, Hx, width, column), h % shared > 0 && h > head};
  }
  template <typename X>
  Rows<X> state(X* x, int64_t h) const {
    return {x ? x + (n * p.H + h) * p.K * p.V + v0 : nullptr, p.V};
  }
  void read_state(const R* from, int64_t h, Reads reads) {
    w.decays_of = 0;
    memset(w.state.sums.data, 0, w.state_bytes());
    if (from) pack(Rows<const R>(state(from, h)), p.K, V, R(1), w.state.sums);
    for (int64_t v = 0; v < V; v += W<R>) w.state.round(v, reads);
  }
  void write_state(R* to, int64_t h) const { unpack(w.state.sums, p.K, V, Sink<R>{state(to, h), {}, false}); }

  int64_t chunks() const { return (end - begin + CHUNK - 1) / CHUNK; }
  Chunk chunk(int64_t i, bool reversed) const {
    const int64_t first = begin + i * CHUNK, n = end - first < CHUNK ? end - first : CHUNK;
    return {reversed ? first + n - 1 : first, n, reversed};
  }
};

// The scans over one head of a task.
template <typename E>
struct Head {
  using R = Real<E>;

  Task<E>& task;
  const int64_t h;
  const Retention<E>& p = task.p;
  Workspace<R>& w = task.w;
  const Rows<const E> q = task.rows(p.q, h, p.Hq), k = task.rows(p.k, h, p.Hk);
  const Rows<const E> v = task.rows(p.v, h, p.Hv, task.v0), grad_o = task.rows(p.grad_o, h, p.H, task.v0);
  const Rows<const R> rates =
      p.per_token ? task.rows(p.log_decay, h, p.H, 1) : Rows<const R>{p.log_decay + h, 0};

  // k and v are what is written, as they are in order.
  void enter_in_order(const Chunk& chunk) const {
    w.enter(chunk.of(rates), chunk.n, false);
    w.take_writers(chunk.n, chunk.of(k), R(1), chunk.of(v));
  }
};

}  // namespace
}  // namespace ISA
