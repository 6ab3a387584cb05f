// Where a sequence is cut: what a segment adds to the gradient of a state that crosses it from behind.

#include "backward_tile.h"

namespace ISA {
namespace {

// The gradient of states n .. n + NB of LANES channels back through one chunk: a, dh [NB, LANES], bc [t, 2, N].
template <int NB, bool BOUNDED, typename R>
INLINE void advance_back(const BackwardTile<R>& tile, int64_t steps, const R* a, R* dh, const R* bc, int64_t n,
                         int64_t N) {
  Vec<R> A[NB], DH[NB];
  for (int j = 0; j < NB; j++) A[j] = load(a + j * LANES<R>), DH[j] = load(dh + j * LANES<R>);
  for (int64_t t = steps - 1; t >= 0; t--) {
    const Vec<R> delta = load(tile.delta + t * LANES<R>), dy = load(tile.dy + t * LANES<R>);
    const R* c = bc + t * 2 * N + N + n;
    for (int j = 0; j < NB; j++) DH[j] = (DH[j] + dy * c[j]) * exp2_of_product<BOUNDED>(delta, A[j]);
  }
  for (int j = 0; j < NB; j++) store(dh + j * LANES<R>, DH[j]);
}

// What a segment adds to the gradient of a state that crosses it from behind.
template <bool GATED, typename E, typename R>
void crossing_back(const SelectiveScan<E>& p, const Task& task, Stack<R> scratch) {
  constexpr int64_t L = LANES<R>;
  const int64_t N = p.N, V = task.vectors<R>(), NL = N * L, state = (task.s * p.segments + task.segment) * p.D * N;
  R *a = scratch.take(V * NL), *dh = scratch.take(V * NL), *bc = scratch.take(CHUNK * 2 * N);
  R* steps = scratch.take(V * L);
  auto& rooms = *scratch.template take<Rooms<E>>(1);
  auto& tile = *scratch.template take<BackwardTile<R>>(1);
  const R fastest = read_rates(p.a, N, task, a);
  memset(dh, 0, sizeof(R) * V * NL);
  memset(steps, 0, sizeof(R) * V * L);
  for (int64_t i = (task.t1 - 1) / CHUNK; i >= task.t0 / CHUNK; i--) {
    const Chunk chunk(p, task, i);
    pack(p, task, chunk, bc);
    for (int64_t v = 0; v < V; v++) {
      const R longest = enter<GATED>(p, task, chunk, v, read(p.x, task, chunk, v, rooms.x[0]), rooms, tile);
      const bool bounded = longest * fastest < REACH;
      for (int64_t t = 0; t < chunk.steps; t++) store(steps + v * L, load(steps + v * L) + load(tile.delta + t * L));
      int64_t n = 0;
      const auto go = [&](auto states) {
        constexpr int NB = decltype(states)::value;
        for (; n + NB <= N; n += NB) {
          const int64_t at = v * NL + n * L;
          bounded ? advance_back<NB, true>(tile, chunk.steps, a + at, dh + at, bc, n, N)
                  : advance_back<NB, false>(tile, chunk.steps, a + at, dh + at, bc, n, N);
        }
      };
      go(Count<FORWARD_STATES>{}), go(Count<2>{}), go(Count<1>{});
    }
  }
  write_states(p.added + state, N, task, dh);
  write_left(p, task, a, steps);
}

}  // namespace

template <typename E>
void selective_scan_crossing_back(const SelectiveScan<E>& p, int64_t task, Real<E>* scratch) {
  const FlushSubnormals here;
  const Stack<Real<E>> stack{scratch};
  p.z ? crossing_back<true>(p, Task(p, task), stack) : crossing_back<false>(p, Task(p, task), stack);
}

#define INSTANTIATE(E) template void selective_scan_crossing_back(const SelectiveScan<E>&, int64_t, Real<E>*);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(double)

}  // namespace ISA
