// Retention: what a part of a sequence adds to what crosses it.

#include "walk.h"

namespace ISA {
namespace {

// To a state.
template <typename E>
void crossing(Task<E>& task) {
  task.read_states(nullptr, NOWHERE);
  for (int64_t i = 0; i < task.chunks(); i++) {
    const Chunk chunk = task.chunk(i, false);
    task.for_heads([&](Head<E>& head) {
      head.enter_in_order(task.w, chunk, NOWHERE);
      task.w.write(head.memory, chunk.n, true, NOWHERE);
    });
  }
  task.write_states(task.p.final_state);
}

// To its gradient, from behind.
template <typename E>
void crossing_back(Task<E>& task) {
  task.read_states(nullptr, NOWHERE);
  for (int64_t i = task.chunks() - 1; i >= 0; i--) {
    const Chunk chunk = task.chunk(i, true);
    task.for_heads([&](Head<E>& head) {
      head.enter_reversed(task.w, chunk, task.p.scale, NOWHERE);
      task.w.write(head.memory, chunk.n, true, NOWHERE);
    });
  }
  task.write_states(task.p.dinitial_state);
}

}  // namespace

template <typename E>
void retention_crossing(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  Task<E> task(p, index, scratch);
  task.for_groups([&] { crossing(task); });
}

template <typename E>
void retention_crossing_back(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  Task<E> task(p, index, scratch);
  task.for_groups([&] { crossing_back(task); });
}

#define INSTANTIATE(E)                                                      \
  template void retention_crossing(const Retention<E>&, int64_t, Real<E>*); \
  template void retention_crossing_back(const Retention<E>&, int64_t, Real<E>*);
FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace ISA
