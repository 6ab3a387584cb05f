// The selective scan on a CPU, forward: one lane per channel, sequential in time, the states of a few n at a time in
// registers.
//
//   delta = softplus(dt + dt_bias)                       h[n] = exp(delta a[n]) h[n] + u b[n],  u = delta x
//   y     = (sum_n c[n] h[n] + d x) silu(z)
//
// A task owns one segment of a sequence and up to `split` channels of one group. It walks in chunks of 32 tokens, and
// in a chunk vector by vector of channels: x, dt, ... enter a tile that stays in L1, each block of states crosses it, y
// leaves.

#include "rows.h"
#include "soon.h"

namespace ISA {
namespace {

template <typename R>
struct ForwardTile {
  R delta[CHUNK * LANES<R>], u[CHUNK * LANES<R>], y[CHUNK * LANES<R>];
};

// Vector v of the task's channels. `total`, unless null, takes the sum of delta. Returns the reach of delta.
template <typename E, typename R>
R enter(const SelectiveScan<E>& p, const Task& task, const Chunk& chunk, int64_t v, Rooms<E>& rooms,
        ForwardTile<R>& tile, R* total) {
  const int64_t channel = task.channel<R>(v), lanes = task.lanes<R>(v);
  const Strip<const E> xs = read(p.x, task, chunk, v, rooms.x[0]), dts = read(p.dt, task, chunk, v, rooms.dt);
  const Vec<R> bias = optional(p.dt_bias, channel, lanes), skip = optional(p.d, channel, lanes);
  Vec<R> sum{};
  Reach<R> reach;
  for (int64_t t = 0; t < chunk.steps; t++) {
    const Vec<R> x = load(xs.at(t), lanes), raw = load(dts.at(t), lanes) + bias;
    const Vec<R> delta = p.dt_softplus ? softplus(raw) : raw;
    reach.add(delta);
    store(tile.delta + t * LANES<R>, delta);
    store(tile.u + t * LANES<R>, delta * x);
    store(tile.y + t * LANES<R>, skip * x);
    sum += delta;
  }
  if (total) store(total, load(total) + sum);
  return reach.largest();
}

template <typename E, typename R>
void leave(const SelectiveScan<E>& p, const Task& task, const Chunk& chunk, int64_t v, Rooms<E>& rooms,
           const ForwardTile<R>& tile) {
  const int64_t lanes = task.lanes<R>(v);
  const Strip<const E> zs = p.z ? read(p.z, task, chunk, v, rooms.z) : Strip<const E>{};
  const Strip<E> ys = open(p.y, task, chunk, v, rooms.y, p.stream);
  for (int64_t t = 0; t < chunk.steps; t++) {
    Vec<R> y = load(tile.y + t * LANES<R>);
    if (zs.first) y *= silu(load(zs.at(t), lanes));
    ys.put(t, y, lanes);
  }
  close(p.y, task, chunk, v, rooms.y);
}

// States n .. n + NB of LANES channels through one chunk: a, h [NB, LANES], bc [t, 2, N].
template <int NB, bool OUTPUT, bool BOUNDED, typename E, typename R>
INLINE void advance(ForwardTile<R>& tile, int64_t steps, const R* a, R* h, const R* bc, int64_t n, int64_t N,
                    Soon<E>& soon) {
  Vec<R> A[NB], H[NB], LOST[NB] = {};
  for (int j = 0; j < NB; j++) A[j] = load(a + j * LANES<R>), H[j] = load(h + j * LANES<R>);
  bc += n;
  for (int64_t t = 0; t < steps; t++, bc += 2 * N) {
    soon.fetch();
    const Vec<R> delta = load(tile.delta + t * LANES<R>), u = load(tile.u + t * LANES<R>);
    Vec<R> y{};
    for (int j = 0; j < NB; j++) {
      const Vec<R> left = exp2_of_product<BOUNDED>(delta, A[j]);
      H[j] = next_state<BOUNDED>(H[j], LOST[j], left, delta, A[j], u * bc[j]);
      if (OUTPUT) y += H[j] * bc[N + j];
    }
    if (OUTPUT) store(tile.y + t * LANES<R>, load(tile.y + t * LANES<R>) + y);
  }
  for (int j = 0; j < NB; j++) store(h + j * LANES<R>, H[j]);
}

// With OUTPUT: y, the final state and the checkpoints. Without: what the segment adds to a state that crosses it.
template <bool OUTPUT, typename E, typename R>
void forward(const SelectiveScan<E>& p, const Task& task, Stack<R> scratch) {
  const int64_t N = p.N, V = task.vectors<R>(), NL = N * LANES<R>;
  const int64_t state = (task.s * p.segments + task.segment) * p.D * N;
  R *a = scratch.take(V * NL), *h = scratch.take(V * NL), *bc = scratch.take(CHUNK * 2 * N);
  R* steps = scratch.take(V * LANES<R>);
  auto& rooms = *scratch.template take<Rooms<E>>(1);
  auto& tile = *scratch.template take<ForwardTile<R>>(1);
  const R fastest = read_rates(p.a, N, task, a);
  read_states(OUTPUT && p.initial_state ? p.initial_state + state : nullptr, N, task, h);
  memset(steps, 0, sizeof(R) * V * LANES<R>);
  for (int64_t i = task.t0 / CHUNK; i * CHUNK < task.t1 && task.t0 < task.t1; i++) {
    const Chunk chunk(p, task, i);
    if (OUTPUT && p.checkpoints && chunk.has_checkpoint) checkpoint<true>(p, task, i, h);
    pack(p, task, chunk, bc);
    const int64_t blocks = chunk.steps * (N / FORWARD_STATES + 1);
    const Tokens<const E> y = OUTPUT ? read_before(p.y, p.stream) : Tokens<const E>{};
    Soon<E> soon(task, chunk, chunk.begin + CHUNK, p.T, V * blocks, {p.x, p.dt, y, OUTPUT ? p.z : Tokens<const E>{}});
    for (int64_t v = 0; v < V; v++) {
      soon.next(task.channel<R>(v + 1), LANES<R>, blocks);
      const R longest = enter(p, task, chunk, v, rooms, tile, OUTPUT ? nullptr : steps + v * LANES<R>);
      const bool bounded = longest * fastest < REACH;
      int64_t n = 0;
      const auto go = [&](auto states) {
        constexpr int NB = decltype(states)::value;
        for (; n + NB <= N; n += NB) {
          const int64_t at = v * NL + n * LANES<R>;
          bounded ? advance<NB, OUTPUT, true>(tile, chunk.steps, a + at, h + at, bc, n, N, soon)
                  : advance<NB, OUTPUT, false>(tile, chunk.steps, a + at, h + at, bc, n, N, soon);
        }
      };
      go(Count<FORWARD_STATES>{}), go(Count<2>{}), go(Count<1>{});
      if (OUTPUT) leave(p, task, chunk, v, rooms, tile);
    }
  }
  if (OUTPUT) {
    if (p.stream) streamed();
    if (task.last) write_states(p.final_state + task.s * p.D * N, N, task, h);
    return;
  }
  write_states(p.added + state, N, task, h);
  write_left(p, task, a, steps);
}

}  // namespace

template <typename E>
void selective_scan_forward(const SelectiveScan<E>& p, int64_t task, Real<E>* scratch) {
  const FlushSubnormals here;
  forward<true>(p, Task(p, task), Stack<Real<E>>{scratch});
}
template <typename E>
void selective_scan_crossing(const SelectiveScan<E>& p, int64_t task, Real<E>* scratch) {
  const FlushSubnormals here;
  forward<false>(p, Task(p, task), Stack<Real<E>>{scratch});
}

#define INSTANTIATE(E)                                                               \
  template void selective_scan_forward(const SelectiveScan<E>&, int64_t, Real<E>*);  \
  template void selective_scan_crossing(const SelectiveScan<E>&, int64_t, Real<E>*);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(double)

}  // namespace ISA
