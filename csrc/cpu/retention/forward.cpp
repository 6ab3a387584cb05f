// Retention: o and the final state.

#include "walk.h"

namespace ISA {
namespace {

template <typename E>
void forward(const Head<E>& head) {
  auto& [task, h, p, w, q, k, v, grad_o, rates] = head;
  const Sink<E> o = {task.rows(p.o, h, p.H, p.V, task.v0), {}, false};
  task.read_state(p.initial_state, h, FROM_LEFT);
  for (int64_t i = 0; i < task.chunks(); i++) {
    const Chunk chunk = task.chunk(i, false);
    head.enter_in_order(chunk);
    w.take_left_readers(chunk.n, chunk.of(q), p.scale);
    w.find_left(chunk.n);
    w.write(chunk.n, FROM_LEFT);
    w.put_y(chunk.n, chunk.of(o));
  }
  task.write_state(p.final_state, h);
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
  for (int64_t h = task.head; h < task.head + p.heads; h++) forward(Head<E>{task, h});
}

#define INSTANTIATE(E)                                     \
  template int64_t retention_scratch(const Retention<E>&); \
  template void retention_forward(const Retention<E>&, int64_t, Real<E>*);
FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace ISA
