// Retention: the gradients, by a scan in order and one from the last token to the first.

#include "walk.h"

namespace ISA {
namespace {

// What the gradient of a head's rates needs from the scan in order. Of the states, those that enter every `every`-th
// chunk and those of one run of `every` chunks, computed again from its first: 2 sqrt(chunks) states in all.
template <typename R>
struct Kept {
  int64_t every, size;
  R *firsts, *run;
  R* readers;                              // for each token, the part of q . dq that comes from the state
  double drates;                           // of the chunks so far

  Kept() = default;
  Kept(Workspace<R>& w, int64_t T) : every(1), size(w.state_bytes() / sizeof(R)) {
    while (every * every * CHUNK < T) every++;
    firsts = w.take(every * size), run = w.take(every * size), readers = w.take(T + CHUNK);
  }
  R* first_of_run(int64_t chunk) const { return firsts + chunk / every * size; }
  R* in_run(int64_t chunk) const { return run + chunk % every * size; }
};

template <typename E>
struct Backward {
  using R = Real<E>;

  Task<E>& task;
  const Retention<E>& p = task.p;
  Workspace<R>& w = task.w;
  Kept<R> kept[RETENTION_TOGETHER];        // where the rates' gradient is wanted

  explicit Backward(Task<E>& task) : task(task) {
    for (int64_t i = 0; i < task.together && p.dlog_decay; i++) kept[i] = {w, p.T};
  }

  // The gradient of q.
  void in_order() {
    task.read_states(p.initial_state, FROM_RIGHT);
    for (int64_t i = 0; i < task.chunks(); i++) {
      const Chunk chunk = task.chunk(i, false);
      task.for_heads([&](Head<E>& head) {
        head.enter_in_order(w, chunk, FROM_RIGHT);
        w.take_right_readers(chunk.n, chunk.of(head.grad_o), head.memory.decays.in);
        R* readers = nullptr;
        if (p.dlog_decay) {
          const Kept<R>& kept = this->kept[head.place];
          if (i % kept.every == 0) memcpy(kept.first_of_run(i), head.memory.state.sums.data, w.state_bytes());
          w.take_left_readers(chunk.n, chunk.of(head.q), p.scale, nullptr, head.of_q.first);
          readers = kept.readers + i * CHUNK;
        }
        w.read_from_right(head.memory, chunk.n, head.of_k, head.of_q, readers, nullptr);
        w.write(head.memory, chunk.n, true, FROM_RIGHT);
        if (head.of_q.last) w.put_z(chunk.n, p.scale, chunk.of(head.dq));
      });
    }
  }

  // The gradients of k, v, the rates and the initial state.
  void reversed() {
    task.read_states(p.dfinal_state, BOTH);
    task.for_heads([&](Head<E>& head) { kept[head.place].drates = 0; });
    for (int64_t last = task.chunks() - 1, i = last; i >= 0; i--) {
      if (p.dlog_decay && (i == last || (i + 1) % kept->every == 0)) compute_runs_again(i);
      task.for_heads([&](Head<E>& head) { reversed(head, i); });
    }
    task.write_states(p.dinitial_state);
    if (p.dlog_decay && !p.per_token)
      task.for_heads([&](Head<E>& head) {
        p.dlog_decay[(task.split * p.N + task.n) * p.H + head.h] = kept[head.place].drates;
      });
  }
  void reversed(Head<E>& head, int64_t i) {
    const Chunk chunk = task.chunk(i, true);
    const auto& [decays, state] = head.memory;
    R pairs[CHUNK], writers[CHUNK];
    head.enter_reversed(w, chunk, p.scale, BOTH);
    w.take_left_readers(chunk.n, chunk.of(head.k), R(1), decays.in, head.of_k.first);
    w.take_right_readers(chunk.n, chunk.of(head.v), decays.in);
    w.find_left(head.memory, chunk.n, head.first_of_q_and_k());
    w.read_from_right(head.memory, chunk.n, head.of_q, head.of_k, p.dlog_decay ? writers : nullptr,
                      p.dlog_decay ? pairs : nullptr);
    if (p.dlog_decay) {
      Kept<R>& kept = this->kept[head.place];
      const double across = decays.in_end * product<R>({kept.in_run(i), p.K}, state.sums, task.V);
      kept.drates += put_drates(chunk, head.h, across, kept.readers + i * CHUNK, writers, pairs);
    }
    w.write(head.memory, chunk.n, head.of_v.first, BOTH);
    if (head.of_v.last) w.put_y(chunk.n, chunk.of(head.dv));
    if (head.of_k.last) w.put_z(chunk.n, R(1), chunk.of(head.dk));
  }

  // The states that enter the chunks of a run, up to `last`.
  void compute_runs_again(int64_t last) {
    const int64_t first = last / kept->every * kept->every;
    task.for_heads([&](Head<E>& head) {
      memcpy(kept[head.place].in_run(first), kept[head.place].first_of_run(first), w.state_bytes());
      head.memory.decays.tokens = 0;
    });
    for (int64_t i = first; i < last; i++)
      task.for_heads([&](Head<E>& head) {
        R* const next = kept[head.place].in_run(i + 1);
        memcpy(next, kept[head.place].in_run(i), w.state_bytes());
        head.enter_in_order(w, task.chunk(i, false), NOWHERE);
        w.write_to({next, p.K}, CHUNK, head.memory.decays.in_end);
      });
    task.for_heads([&](Head<E>& head) { head.memory.decays.tokens = 0; });
  }

  // A token's rate weighs what is written before the token and read at it or later. Only sums of its own pairs, never a
  // difference of larger sums: of pairs across the chunk, with the reader, the writer or both inside.
  double put_drates(const Chunk& chunk, int64_t h, double across, const R* readers, const R* writers,
                    const R* pairs) {
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
  Backward<E>{task};
  return task.w.used;
}

template <typename E>
void retention_backward(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  Task<E> task(p, index / p.scans(), scratch);
  Backward<E> backward(task);
  task.for_groups([&] {
    if (p.scans() == 1 || index % 2 == 0) backward.in_order();
    if (p.scans() == 1 || index % 2 == 1) backward.reversed();
  });
}

#define INSTANTIATE(E)                                              \
  template int64_t retention_backward_scratch(const Retention<E>&); \
  template void retention_backward(const Retention<E>&, int64_t, Real<E>*);
FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace ISA
