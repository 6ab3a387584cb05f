// Retention: what a part of a sequence adds to what crosses it.

#include "walk.h"

namespace ISA {
namespace {

// To a state.
template <typename E>
void crossing(const Head<E>& head) {
  auto& [task, h, p, w, q, k, v, grad_o, rates] = head;
  task.read_state(nullptr, h, NOWHERE);
  for (int64_t i = 0; i < task.chunks(); i++) {
    const Chunk chunk = task.chunk(i, false);
    head.enter_in_order(chunk);
    w.write(chunk.n, NOWHERE);
  }
  task.write_state(p.final_state, h);
}

// To its gradient, from behind.
template <typename E>
void crossing_back(const Head<E>& head) {
  auto& [task, h, p, w, q, k, v, grad_o, rates] = head;
  task.read_state(nullptr, h, NOWHERE);
  for (int64_t i = task.chunks() - 1; i >= 0; i--) {
    const Chunk chunk = task.chunk(i, true);
    w.enter(chunk.of(rates), chunk.n, true);
    w.take_writers(chunk.n, chunk.of(q), p.scale, chunk.of(grad_o));
    w.write(chunk.n, NOWHERE);
  }
  task.write_state(p.dinitial_state, h);
}

}  // namespace

template <typename E>
void retention_crossing(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  Task<E> task(p, index, scratch);
  for (int64_t h = task.head; h < task.head + p.heads; h++) crossing(Head<E>{task, h});
}

template <typename E>
void retention_crossing_back(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  Task<E> task(p, index, scratch);
  for (int64_t h = task.head; h < task.head + p.heads; h++) crossing_back(Head<E>{task, h});
}

#define INSTANTIATE(E)                                                      \
  template void retention_crossing(const Retention<E>&, int64_t, Real<E>*); \
  template void retention_crossing_back(const Retention<E>&, int64_t, Real<E>*);
FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace ISA
