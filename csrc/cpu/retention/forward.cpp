// Retention: o and the final state.

#include "walk.h"

namespace ISA {
namespace {

template <typename E>
void forward(Task<E>& task) {
  const auto& p = task.p;
  auto& w = task.w;
  task.read_states(p.initial_state, FROM_LEFT);
  for (int64_t i = 0; i < task.chunks(); i++) {
    const Chunk chunk = task.chunk(i, false);
    task.for_heads([&](Head<E>& head) {
      head.enter_in_order(w, chunk, FROM_LEFT);
      w.take_left_readers(chunk.n, chunk.of(head.q), p.scale, head.memory.decays.in, head.of_q.first);
      w.find_left(head.memory, chunk.n, head.first_of_q_and_k());
      w.write(head.memory, chunk.n, true, FROM_LEFT);
      w.put_y(chunk.n, chunk.of(head.o));
    });
  }
  task.write_states(p.final_state);
}

}  // namespace

template <typename E>
int64_t retention_scratch(const Retention<E>& p) {
  return Task<E>(p, 0, nullptr).w.used;
}

template <typename E>
void retention_forward(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  Task<E> task(p, index, scratch);
  task.for_groups([&] { forward(task); });
}

#define INSTANTIATE(E)                                     \
  template int64_t retention_scratch(const Retention<E>&); \
  template void retention_forward(const Retention<E>&, int64_t, Real<E>*);
FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace ISA
