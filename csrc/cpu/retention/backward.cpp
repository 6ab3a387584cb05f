// Retention: the gradients, by a scan in order and one from the last token to the first.

#include "walk.h"

namespace ISA {
namespace {

// What the gradient of the rates needs from the scan in order. Of the states, those that enter every `every`-th chunk
// and those of one run of `every` chunks, computed again from its first: 2 sqrt(chunks) states in all.
template <typename R>
struct Kept {
  int64_t every = 1, size;
  R *firsts = nullptr, *run = nullptr;
  R* readers = nullptr;                    // for each token, the part of q . dq that comes from the state

  Kept(Workspace<R>& w, int64_t T, bool wanted) : size(w.state_bytes() / sizeof(R)) {
    while (every * every * CHUNK < T) every++;
    if (wanted) firsts = w.take(every * size), run = w.take(every * size), readers = w.take(T + CHUNK);
  }
  R* first_of_run(int64_t chunk) const { return firsts + chunk / every * size; }
  R* in_run(int64_t chunk) const { return run + chunk % every * size; }
};

template <typename E>
struct Backward : Head<E> {
  using R = Real<E>;
  using Head<E>::task, Head<E>::h, Head<E>::p, Head<E>::w, Head<E>::q, Head<E>::k, Head<E>::v;
  using Head<E>::grad_o, Head<E>::rates, Head<E>::enter_in_order;

  const Kept<R>& kept;

  // The gradient of q.
  void in_order() {
    const Sink<E> dq = task.sink(p.dq, h, p.Hq, p.K, true);
    task.read_state(p.initial_state, h, FROM_RIGHT);
    for (int64_t i = 0; i < task.chunks(); i++) {
      const Chunk chunk = task.chunk(i, false);
      enter_in_order(chunk);
      w.take_right_readers(chunk.n, chunk.of(grad_o));
      if (p.dlog_decay) {
        if (i % kept.every == 0) memcpy(kept.first_of_run(i), w.state.sums.data, w.state_bytes());
        w.take_left_readers(chunk.n, chunk.of(q), p.scale);
      }
      w.read_from_right(chunk.n, p.dlog_decay ? kept.readers + i * CHUNK : nullptr, nullptr);
      w.write(chunk.n, FROM_RIGHT);
      w.put_z(chunk.n, p.scale, chunk.of(dq));
    }
  }

  // The gradients of k, v, the rates and the initial state.
  void reversed() {
    const Sink<E> dk = task.sink(p.dk, h, p.Hk, p.K, true), dv = task.sink(p.dv, h, p.Hv, p.V, false);
    double drates = 0;
    task.read_state(p.dfinal_state, h, BOTH);
    for (int64_t last = task.chunks() - 1, i = last; i >= 0; i--) {
      if (p.dlog_decay && (i == last || (i + 1) % kept.every == 0)) compute_run_again(i);
      const Chunk chunk = task.chunk(i, true);
      R pairs[CHUNK], writers[CHUNK];
      w.enter(chunk.of(rates), chunk.n, true);
      w.take_writers(chunk.n, chunk.of(q), p.scale, chunk.of(grad_o));
      w.take_left_readers(chunk.n, chunk.of(k), R(1));
      w.take_right_readers(chunk.n, chunk.of(v));
      w.find_left(chunk.n);
      w.read_from_right(chunk.n, p.dlog_decay ? writers : nullptr, p.dlog_decay ? pairs : nullptr);
      if (p.dlog_decay) {
        const double across = w.in_end * product<R>({kept.in_run(i), p.K}, w.state.sums, task.V);
        drates += put_drates(chunk, across, kept.readers + i * CHUNK, writers, pairs);
      }
      w.write(chunk.n, BOTH);
      w.put_y(chunk.n, chunk.of(dv));
      w.put_z(chunk.n, R(1), chunk.of(dk));
    }
    task.write_state(p.dinitial_state, h);
    if (p.dlog_decay && !p.per_token) p.dlog_decay[(task.split * p.N + task.n) * p.H + h] = drates;
  }

  // The states that enter the chunks of a run, up to `last`.
  void compute_run_again(int64_t last) {
    const int64_t first = last / kept.every * kept.every;
    memcpy(kept.in_run(first), kept.first_of_run(first), w.state_bytes());
    w.decays_of = 0;
    for (int64_t i = first; i < last; i++) {
      memcpy(kept.in_run(i + 1), kept.in_run(i), w.state_bytes());
      enter_in_order(task.chunk(i, false));
      for (int64_t v = 0; v < task.V; v += W<R>) w.write_panel(CHUNK, v, {kept.in_run(i + 1), p.K});
      w.ahead.count = 0;
    }
    w.decays_of = 0;
  }

  // A token's rate weighs what is written before the token and read at it or later. Only sums of its own pairs, never a
  // difference of larger sums: of pairs across the chunk, with the reader, the writer or both inside.
  double put_drates(const Chunk& chunk, double across, const R* readers, const R* writers, const R* pairs) {
    double drates[CHUNK], of_writers = 0, of_readers = 0, total = 0;
    for (int64_t i = chunk.n - 1; i >= 0; i--) {
      drates[i] = across + of_writers + pairs[i];
      of_writers += writers[i];
    }
    for (int64_t i = 0; i < chunk.n; i++) {
      of_readers += readers[chunk.n - 1 - i];
      drates[i] += of_readers;
      total += drates[i];
      if (p.per_token)
        p.dlog_decay[((task.split * p.B + task.row) * p.T + chunk.first - i) * p.H + h] = drates[i];
    }
    return total;
  }
};

}  // namespace

template <typename E>
int64_t retention_backward_scratch(const Retention<E>& p) {
  Task<E> task(p, 0, nullptr);
  Kept<Real<E>>(task.w, p.T, p.dlog_decay);
  return task.w.used;
}

template <typename E>
void retention_backward(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  Task<E> task(p, index, scratch);
  const Kept<Real<E>> kept(task.w, p.T, p.dlog_decay);
  for (int64_t h = task.head; h < task.head + p.heads; h++) {
    Backward<E> head{{task, h}, kept};
    head.in_order();
    head.reversed();
  }
}

#define INSTANTIATE(E)                                              \
  template int64_t retention_backward_scratch(const Retention<E>&); \
  template void retention_backward(const Retention<E>&, int64_t, Real<E>*);
FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace ISA
