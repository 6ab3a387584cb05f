// The selective scan on a CPU, backward: the chunks of the forward pass in reverse. Inside a chunk exp(delta a) and h
// are computed again, from the state that enters it. dB and dC are summed over a task's channels lane by lane, then
// across lanes: the same order in every run.

#include "backward_tile.h"
#include "soon.h"

namespace ISA {
namespace {

// Rows [v, n] of LANES channels: a, the same for exp2, the state that enters the chunk, dh behind it, the sum for da.
template <typename R>
struct Rows {
  R *a, *rate, *h, *dh, *da;
  R fastest;                             // of read_rates
};

// PB vectors of channels, NB states of each: what a chunk leaves of them, token by token, and the states in between.
template <int PB, int NB, typename R>
struct Forth {
  alignas(64) R e[CHUNK][PB][NB][LANES<R>], h[CHUNK + 1][PB][NB][LANES<R>];
};

// Forwards through the chunk from H, which ends as the last state. bc [t, 2, N].
template <bool GATED, bool BOUNDED, int PB, int NB, typename E, typename R>
INLINE void advance(BackwardTile<R>* tiles, int64_t steps, const Vec<R> (&RATE)[PB][NB], Vec<R> (&H)[PB][NB],
                    const R* bc, int64_t N, Forth<PB, NB, R>& forth, Soon<E>& soon) {
  constexpr int64_t L = LANES<R>;
  Vec<R> LOST[PB][NB] = {};
  for (int64_t t = 0; t < steps; t++) {
    soon.fetch();
    for (int i = 0; i < PB; i++) {
      const Vec<R> delta = load(tiles[i].delta + t * L), u = load(tiles[i].u + t * L);
      Vec<R> y{};
      for (int j = 0; j < NB; j++) {
        const Vec<R> left = exp2_of_product<BOUNDED>(delta, RATE[i][j]);
        H[i][j] = next_state<BOUNDED>(H[i][j], LOST[i][j], left, delta, RATE[i][j], u * bc[t * 2 * N + j]);
        store(forth.e[t][i][j], left);
        store(forth.h[t + 1][i][j], H[i][j]);
        if (GATED) y += H[i][j] * bc[t * 2 * N + N + j];
      }
      if (GATED) store(tiles[i].y.run + t * L, load(tiles[i].y.run + t * L) + y);
    }
  }
}

// Forwards through the chunk, then backwards. `at` is the first state's row; bc [t, 2, N]; sums [t, 2, NB, LANES] take
// what they add to db and dc.
template <int PB, int NB, bool GATED, bool BOUNDED, typename E, typename R>
INLINE void retreat(BackwardTile<R>* tiles, int64_t steps, const Rows<R>& rows, int64_t at, const R* bc, int64_t N,
                    R* sums, Soon<E>& soon) {
  constexpr int64_t L = LANES<R>;
  Forth<PB, NB, R> forth;
  Vec<R> A[PB][NB], RATE[PB][NB], H[PB][NB], DH[PB][NB], DA[PB][NB];
  for (int i = 0; i < PB; i++)
    for (int j = 0; j < NB; j++) {
      const int64_t row = at + (i * N + j) * L;
      A[i][j] = load(rows.a + row), RATE[i][j] = load(rows.rate + row), H[i][j] = load(rows.h + row);
      DH[i][j] = load(rows.dh + row), DA[i][j] = Vec<R>{};
      store(forth.h[0][i][j], H[i][j]);
    }
  advance<GATED, BOUNDED>(tiles, steps, RATE, H, bc, N, forth, soon);
  for (int64_t t = steps - 1; t >= 0; t--) {
    R* sum = sums + t * 2 * NB * L;
    Vec<R> delta[PB], u[PB], dy[PB], through_b[PB], through_a[PB];
    for (int i = 0; i < PB; i++) {
      delta[i] = load(tiles[i].delta + t * L), u[i] = load(tiles[i].u + t * L), dy[i] = load(tiles[i].dy + t * L);
      through_b[i] = load(tiles[i].through_b.run + t * L), through_a[i] = load(tiles[i].through_a.run + t * L);
    }
    for (int j = 0; j < NB; j++) {
      const Vec<R> b = splat(bc[t * 2 * N + j]), c = splat(bc[t * 2 * N + N + j]);
      Vec<R> db = load(sum + j * L), dc = load(sum + (NB + j) * L);
      for (int i = 0; i < PB; i++) {
        const Vec<R> before = load(forth.h[t][i][j]);
        DH[i][j] += dy[i] * c;
        dc += dy[i] * H[i][j];
        db += u[i] * DH[i][j];
        through_b[i] += DH[i][j] * b;
        DH[i][j] *= load(forth.e[t][i][j]);
        const Vec<R> decayed = DH[i][j] * before;
        through_a[i] += decayed * A[i][j];
        DA[i][j] += decayed * delta[i];
        H[i][j] = before;
      }
      store(sum + j * L, db);
      store(sum + (NB + j) * L, dc);
    }
    for (int i = 0; i < PB; i++) {
      store(tiles[i].through_b.run + t * L, through_b[i]);
      store(tiles[i].through_a.run + t * L, through_a[i]);
    }
  }
  for (int i = 0; i < PB; i++)
    for (int j = 0; j < NB; j++) {
      const int64_t row = at + (i * N + j) * L;
      store(rows.dh + row, DH[i][j]);
      store(rows.da + row, load(rows.da + row) + DA[i][j]);
    }
}

// What a task's channels sum over tokens.
template <typename R>
struct Totals {
  ExactSum<R> d, dt_bias;
};

// Out of the tile of vector v: the gradients of x, dt and z, and what a chunk adds to those of d and dt_bias.
template <bool GATED, typename E, typename R>
void leave(const SelectiveScan<E>& p, const Task& task, const Chunk& chunk, int64_t v, const Strip<const E>& xs,
           Rooms<E>& rooms, const BackwardTile<R>& tile, Totals<R>& totals) {
  const int64_t channel = task.channel<R>(v), lanes = task.lanes<R>(v);
  const Strip<E> dxs = open(p.dx, task, chunk, v, rooms.y, p.stream);
  const Strip<E> ddts = open(p.ddt, task, chunk, v, rooms.dt, p.stream);
  const Strip<E> dzs = GATED ? open(p.dz, task, chunk, v, rooms.z, p.stream) : Strip<E>{};
  const Vec<R> skip = optional(p.d, channel, lanes);
  ExactSum<R> sum_d, sum_bias;
  for (int64_t t = 0; t < chunk.steps; t++) {
    const Vec<R> x = load(xs.at(t), lanes), dy = load(tile.dy + t * LANES<R>);
    const Vec<R> through_b = tile.through_b.total(t, p.N);
    Vec<R> ddt = x * through_b + tile.through_a.total(t, p.N);
    if (p.dt_softplus) ddt *= load(tile.slope + t * LANES<R>);
    if (GATED) dzs.put(t, load(tile.gate + t * LANES<R>) * tile.y.total(t, p.N), lanes);
    dxs.put(t, load(tile.delta + t * LANES<R>) * through_b + skip * dy, lanes);
    ddts.put(t, ddt, lanes);
    sum_d.add(dy * x);
    sum_bias.add(ddt);
  }
  close(p.dx, task, chunk, v, rooms.y);
  close(p.ddt, task, chunk, v, rooms.dt);
  if (GATED) close(p.dz, task, chunk, v, rooms.z);
  totals.d.add(sum_d.total);
  totals.dt_bias.add(sum_bias.total);
}

// PB vectors of channels from v on through one chunk, all their states. Each block of states has its own sums: those of
// all states at one stride would meet in few sets of the L1 cache.
template <int PB, bool GATED, typename E, typename R>
void retreat_all(const SelectiveScan<E>& p, const Task& task, const Chunk& chunk, int64_t v, Rooms<E>& rooms,
                 BackwardTile<R>* tiles, const Rows<R>& rows, const R* bc, R* sums, Totals<R>* totals, Soon<E>& soon) {
  bool bounded = true;
  Strip<const E> xs[PB];
  soon.next(task.channel<R>(v + PB), PB * LANES<R>, chunk.steps * (p.N / STATES + 1));
  for (int i = 0; i < PB; i++) {
    xs[i] = read(p.x, task, chunk, v + i, rooms.x[i]);
    const R longest = enter<GATED>(p, task, chunk, v + i, xs[i], rooms, tiles[i]);
    bounded = bounded && longest * rows.fastest < REACH;
  }
  int64_t n = 0;
  const auto go = [&](auto states) {
    constexpr int NB = decltype(states)::value;
    for (; n + NB <= p.N; n += NB) {
      for (int i = 0; i < PB && n && n % RUN == 0; i++) {
        if (GATED) tiles[i].y.next_run(chunk.steps, n == RUN);
        tiles[i].through_b.next_run(chunk.steps, n == RUN);
        tiles[i].through_a.next_run(chunk.steps, n == RUN);
      }
      const int64_t at = (v * p.N + n) * LANES<R>;
      R* block = sums + n * 2 * CHUNK * LANES<R>;
      bounded ? retreat<PB, NB, GATED, true>(tiles, chunk.steps, rows, at, bc + n, p.N, block, soon)
              : retreat<PB, NB, GATED, false>(tiles, chunk.steps, rows, at, bc + n, p.N, block, soon);
    }
  };
  go(Count<STATES>{}), go(Count<1>{});
  for (int i = 0; i < PB; i++) leave<GATED>(p, task, chunk, v + i, xs[i], rooms, tiles[i], totals[v + i]);
}

// db and dc of the chunk: the sums across lanes.
template <typename E, typename R>
void write_sums(const SelectiveScan<E>& p, const Task& task, const Chunk& chunk, const R* sums, R* across) {
  const int64_t layer = task.layer * p.B * p.T * p.G * p.N;
  R *db = p.db.at(task.row, chunk.begin, task.g) + layer, *dc = p.dc.at(task.row, chunk.begin, task.g) + layer;
  int64_t n = 0;
  const auto go = [&](auto states) {
    constexpr int NB = decltype(states)::value;
    for (; n + NB <= p.N; n += NB) {
      sum_rows(sums + n * 2 * CHUNK * LANES<R>, chunk.steps * 2 * NB, across);
      for (int64_t t = 0; t < chunk.steps; t++)
        for (int j = 0; j < NB; j++) {
          db[t * p.db.token + (n + j) * p.db.state] = across[t * 2 * NB + j];
          dc[t * p.dc.token + (n + j) * p.dc.state] = across[t * 2 * NB + NB + j];
        }
    }
  };
  go(Count<STATES>{}), go(Count<1>{});
}

template <bool GATED, typename E, typename R>
void backward(const SelectiveScan<E>& p, const Task& task, Stack<R> scratch) {
  const int64_t N = p.N, V = task.vectors<R>(), NL = N * LANES<R>, piece = task.s * p.segments + task.segment;
  const int64_t state = piece * p.D * N;
  R* const states = scratch.take(5 * V * NL);
  Rows<R> rows{states, states + V * NL, states + 2 * V * NL, states + 3 * V * NL, states + 4 * V * NL};
  R *bc = scratch.take(CHUNK * 2 * N), *sums = scratch.take(CHUNK * 2 * NL), *across = scratch.take(CHUNK * 2 * STATES);
  auto* totals = scratch.template take<Totals<R>>(V);
  auto& rooms = *scratch.template take<Rooms<E>>(1);
  auto* tiles = scratch.template take<BackwardTile<R>>(VECTORS);
  read_states(p.a, N, task, rows.a);
  rows.fastest = read_rates(p.a, N, task, rows.rate);
  read_states(p.dfinal_state ? p.dfinal_state + state : nullptr, N, task, rows.dh);
  memset(rows.da, 0, sizeof(R) * V * NL);
  for (int64_t v = 0; v < V; v++) totals[v] = {};
  for (int64_t i = (task.t1 - 1) / CHUNK; i >= task.t0 / CHUNK && task.t0 < task.t1; i--) {
    const Chunk chunk(p, task, i);
    if (chunk.has_checkpoint)
      checkpoint<false>(p, task, i, rows.h);
    else
      read_states(p.initial_state ? p.initial_state + state : nullptr, N, task, rows.h);
    pack(p, task, chunk, bc);
    memset(sums, 0, sizeof(R) * 2 * CHUNK * NL);
    Soon<E> soon(task, chunk, chunk.begin - CHUNK, p.T, (V / VECTORS + 1) * chunk.steps * (N / STATES + 1),
                 {p.x, p.dt, p.dy, p.z, read_before(p.dx, p.stream), read_before(p.ddt, p.stream),
                  read_before(p.dz, p.stream)});
    int64_t v = 0;
    for (; v + VECTORS <= V; v += VECTORS)
      retreat_all<VECTORS, GATED>(p, task, chunk, v, rooms, tiles, rows, bc, sums, totals, soon);
    for (; v < V; v++) retreat_all<1, GATED>(p, task, chunk, v, rooms, tiles, rows, bc, sums, totals, soon);
    write_sums(p, task, chunk, sums, across);
  }
  if (p.stream) streamed();
  write_states(p.da + state, N, task, rows.da);
  write_states(p.dinitial_state + state, N, task, rows.dh);
  for (int64_t v = 0; v < V; v++) {
    const int64_t at = piece * p.D + task.channel<R>(v);
    store(p.dd + at, totals[v].d.total, task.lanes<R>(v));
    store(p.ddt_bias + at, totals[v].dt_bias.total, task.lanes<R>(v));
  }
}

}  // namespace

template <typename E>
int64_t selective_scan_scratch(const SelectiveScan<E>& p) {
  using R = Real<E>;
  const int64_t V = (p.split + LANES<R> - 1) / LANES<R>, tile = sizeof(BackwardTile<R>) / sizeof(R);
  return (5 * V + 2 * CHUNK) * p.N * LANES<R> + VECTORS * tile + V * 4 * LANES<R> + CHUNK * 2 * (p.N + STATES) +
         sizeof(Rooms<E>) / sizeof(R) + 9 * LANES<R>;
}

template <typename E>
void selective_scan_backward(const SelectiveScan<E>& p, int64_t task, Real<E>* scratch) {
  const FlushSubnormals here;
  const Stack<Real<E>> stack{scratch};
  p.z ? backward<true>(p, Task(p, task), stack) : backward<false>(p, Task(p, task), stack);
}

#define INSTANTIATE(E)                                                               \
  template int64_t selective_scan_scratch(const SelectiveScan<E>&);                  \
  template void selective_scan_backward(const SelectiveScan<E>&, int64_t, Real<E>*);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(double)

}  // namespace ISA
