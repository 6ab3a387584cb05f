// What a task of retention walks over: the chunks of some columns of V of one head, or of several that share q, k or v,
// in groups whose states stay in the cache together: of each chunk all heads of a group. Included by retention's
// kernels only.
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

// One of the heads of a group: what it reads and writes, and which heads of the group share it with this one.
template <typename E>
struct Head {
  using R = Real<E>;

  int64_t h, place;
  Sharing of_q, of_k, of_v;
  Rows<const E> q, k, v, grad_o;
  Rows<const R> rates;
  Sink<E> o, dq, dk, dv;
  HeadMemory<R> memory;

  // k and v are what is written, as they are in order.
  void enter_in_order(Workspace<R>& w, const Chunk& chunk, Reads reads) {
    memory.decays.enter(chunk.of(rates), chunk.n, false, reads);
    if (of_k.first) w.take_writers(chunk.n, chunk.of(k), R(1), reads);
    w.take_values(chunk.n, chunk.of(v), memory.decays.out, reads);
  }
  // q and grad_o are, from the last token.
  void enter_reversed(Workspace<R>& w, const Chunk& chunk, R scale, Reads reads) {
    memory.decays.enter(chunk.of(rates), chunk.n, true, reads);
    if (of_q.first) w.take_writers(chunk.n, chunk.of(q), scale, reads);
    w.take_values(chunk.n, chunk.of(grad_o), memory.decays.out, reads);
  }
  bool first_of_q_and_k() const { return of_q.first || of_k.first; }
};

// Sequence n, `heads` heads from `head` on, columns v0 to v0 + V of v, o and the state; tokens begin to end of a row.
template <typename E>
struct Task {
  using R = Real<E>;

  const Retention<E>& p;
  const int64_t split, head, n, v0, V, row, begin, end, together = p.together();
  Workspace<R> w;
  Head<E> group[RETENTION_TOGETHER];

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
        w(scratch, p.K, V, together > 1) {
    for (int64_t i = 0; i < together; i++) group[i].memory = {w, p.K, V};
  }

  // f() for each group of heads, f(head) for each head of the group.
  template <typename F>
  void for_groups(F f) {
    for (int64_t first = head; first < head + p.heads; first += together) {
      for (int64_t i = 0; i < together; i++) enter(first, i);
      f();
    }
  }
  template <typename F>
  INLINE_MEMBER void for_heads(F f) {
    for (int64_t i = 0; i < together; i++) f(group[i]);
  }

  // Head h's rows of x [B, T, Hx, width], from `column` on: dense, or where it lies.
  template <typename X>
  Rows<X> rows(X* x, int64_t h, int64_t Hx, int64_t width, int64_t column = 0) const {
    return {x ? x + (row * p.T * Hx + h / (p.H / Hx)) * width + column : nullptr, Hx * width};
  }
  template <typename X>
  Rows<X> rows(const Heads<X>& x, int64_t h, int64_t Hx, int64_t column = 0) const {
    return {x.data ? x.at(row, 0, h / (p.H / Hx)) + column : nullptr, x.token};
  }
  // Where its gradient goes, summed over the heads of the group that share it, the first of which is head `first` or
  // later. A task that sees some columns of V only has a layer of its own for the others.
  Sink<E> sink(const RetentionGradient<E>& to, int64_t first, int64_t h, int64_t Hx, int64_t width,
               bool whole_width) const {
    const int64_t shared = p.H / Hx, column = whole_width ? 0 : v0;
    const int64_t layer = whole_width ? h % shared / p.heads * p.splits() + split : h % shared / p.heads;
    R* const here = to.layers ? to.layers + layer * p.B * p.T * Hx * width : nullptr;
    return {rows(to.whole, h, Hx, width, column), rows(here, h, Hx, width, column),
            first > head && h / shared * shared < first};
  }
  template <typename X>
  Rows<X> state(X* x, int64_t h) const {
    return {x ? x + (n * p.H + h) * p.K * p.V + v0 : nullptr, p.V};
  }
  void enter(int64_t first, int64_t place) {
    Head<E>& x = group[place];
    const int64_t h = x.h = first + place;
    x.place = place;
    const auto sharing = [&](int64_t Hx) {
      const int64_t shared = p.H / Hx;
      return Sharing{place == 0 || h % shared == 0, place == together - 1 || (h + 1) % shared == 0};
    };
    x.of_q = sharing(p.Hq), x.of_k = sharing(p.Hk), x.of_v = sharing(p.Hv);
    x.q = rows(p.q, h, p.Hq), x.k = rows(p.k, h, p.Hk), x.v = rows(p.v, h, p.Hv, v0);
    x.grad_o = rows(p.grad_o, h, p.H, v0), x.rates = rows(p.log_decay, h, p.H);
    x.o = {rows(p.o, h, p.H, p.V, v0), {}, false};
    x.dq = sink(p.dq, first, h, p.Hq, p.K, true), x.dk = sink(p.dk, first, h, p.Hk, p.K, true);
    x.dv = sink(p.dv, first, h, p.Hv, p.V, false);
  }
  void read_states(const R* from, Reads reads) {
    for_heads([&](Head<E>& x) {
      const State<R>& state = x.memory.state;
      x.memory.decays.tokens = 0;
      memset(state.sums.data, 0, w.state_bytes());
      if (from) pack(Rows<const R>(this->state(from, x.h)), p.K, V, R(1), state.sums);
      state.enter(V, reads);
    });
  }
  void write_states(R* to) {
    for_heads([&](Head<E>& x) { unpack(x.memory.state.sums, p.K, V, Sink<R>{state(to, x.h), {}, false}); });
  }

  int64_t chunks() const { return (end - begin + CHUNK - 1) / CHUNK; }
  Chunk chunk(int64_t i, bool reversed) const {
    const int64_t first = begin + i * CHUNK, n = end - first < CHUNK ? end - first : CHUNK;
    return {reversed ? first + n - 1 : first, n, reversed};
  }
};

}  // namespace
}  // namespace ISA
