// Selective scan on a CPU: one lane per channel, sequential in time, the states of a few n at a time in registers.
//
//   delta = softplus(dt + dt_bias)                       h[n] = exp(delta a[n]) h[n] + u b[n],  u = delta x
//   y     = (sum_n c[n] h[n] + d x) silu(z)
//
// A task owns one segment of a sequence and up to `split` channels of one group. It walks in chunks of 32 tokens, and
// in a chunk vector by vector of channels: x, dt, ... enter a tile that stays in L1, each block of states crosses it, y
// leaves. The backward walks the chunks in reverse; inside a chunk it recomputes exp(delta a) and h from the state that
// enters. dB and dC are summed over a task's channels lane by lane, then across lanes: the same order in every run.

#include "selective_scan_task.h"

namespace ISA {
namespace {

constexpr int64_t STEP_CHANNELS = SelectiveScan<float>::STEP_CHANNELS;
constexpr double LOG2E = 1.4426950408889634;

// Pieces of a task's scratch.
template <typename R>
struct Stack {
  R* top;
  R* take(int64_t count) {
    R* piece = top;
    top += (count + LANES<R> - 1) / LANES<R> * LANES<R>;
    return piece;
  }
  template <typename Piece>
  Piece* take(int64_t count) {
    return reinterpret_cast<Piece*>(take(count * (sizeof(Piece) + sizeof(R) - 1) / sizeof(R)));
  }
};

template <typename R>
Vec<R> optional(const R* p, int64_t at, int64_t lanes) {
  return p ? load(p + at, lanes) : Vec<R>{};
}

// rows [v, n] of LANES channels <- the task's channels of a state [D, N] (null: zeros), and back
template <typename R>
void read_states(const R* state, int64_t N, const Task& task, R* rows) {
  memset(rows, 0, sizeof(R) * task.vectors<R>() * N * LANES<R>);
  if (!state) return;
  for (int64_t d = task.d0; d < task.d1; d++)
    for (int64_t n = 0, i = d - task.d0; n < N; n++)
      rows[(i / LANES<R> * N + n) * LANES<R> + i % LANES<R>] = state[d * N + n];
}
template <typename R>
void write_states(R* state, int64_t N, const Task& task, const R* rows) {
  for (int64_t d = task.d0; d < task.d1; d++)
    for (int64_t n = 0, i = d - task.d0; n < N; n++)
      state[d * N + n] = rows[(i / LANES<R> * N + n) * LANES<R> + i % LANES<R>];
}

// y if it is larger: a NaN is not.
template <typename R>
R larger(R x, R y) {
  return y > x ? y : x;
}

// a for exp2: in units of log(2). Returns the largest |rate|.
template <typename R>
R read_rates(const R* a, int64_t N, const Task& task, R* rows) {
  R most = 0;
  read_states(a, N, task, rows);
  for (int64_t i = 0; i < task.vectors<R>() * N * LANES<R>; i++) {
    rows[i] *= R(LOG2E);
    most = larger(most, larger(rows[i], -rows[i]));
  }
  return most;
}

// The largest |x| of what was added; a NaN is not.
template <typename R>
struct Reach {
  Vec<R> most{};

  INLINE_MEMBER void add(Vec<R> x) {
    const Vec<R> size = x < 0 ? -x : x;
    most = size > most ? size : most;
  }
  R largest() const {
    R value = 0;
    for (int64_t i = 0; i < LANES<R>; i++) value = larger<R>(value, most[i]);
    return value;
  }
};

// The states that enter chunk i, from the checkpoints or to them.
template <bool SAVE, typename E, typename R>
void checkpoint(const SelectiveScan<E>& p, const Task& task, int64_t i, R* rows) {
  for (int64_t v = 0; v < task.vectors<R>(); v++)
    for (int64_t n = 0; n < p.N; n++, rows += LANES<R>) {
      R* saved = p.checkpoints + ((i * p.B + task.row) * p.N + n) * p.D + task.channel<R>(v);
      if (SAVE)
        store(saved, load(rows), task.lanes<R>(v));
      else
        store(rows, load(saved, task.lanes<R>(v)));
    }
}

// to [t, 2, N] <- b or c of the chunk's tokens.
template <typename E, typename R>
void pack(const Projected<const E>& from, int64_t N, const Task& task, const Chunk& chunk, R* to) {
  const E* first = from.at(task.row, chunk.begin, task.g);
  const int64_t token = from.token, state = from.state;
  if (token == 1 && state != 1) return turn(first, state, N, chunk.steps, to, 2 * N);
  for (int64_t t = 0; t < chunk.steps; t++)
    for (int64_t n = 0; n < N; n++) to[t * 2 * N + n] = real(first[t * token + n * state]);
}
template <typename E, typename R>
void pack(const SelectiveScan<E>& p, const Task& task, const Chunk& chunk, R* bc) {
  pack(p.b, p.N, task, chunk, bc);
  pack(p.c, p.N, task, chunk, bc + p.N);
}

template <typename R>
struct ForwardTile {
  R delta[CHUNK * LANES<R>], u[CHUNK * LANES<R>], y[CHUNK * LANES<R>];
};

// Vector v of the task's channels. `total`, unless null, takes the sum of delta. Returns the largest |delta|.
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
  const Strip<E> ys = open(p.y, task, chunk, v, rooms.y);
  for (int64_t t = 0; t < chunk.steps; t++) {
    Vec<R> y = load(tile.y + t * LANES<R>);
    if (zs.first) y *= silu(load(zs.at(t), lanes));
    store(ys.at(t), y, lanes);
  }
  close(p.y, task, chunk, v, rooms.y);
}

// States n .. n + NB of LANES channels through one chunk: a, h [NB, LANES], bc [t, 2, N].
template <int NB, bool OUTPUT, bool BOUNDED, typename E, typename R>
INLINE void advance(ForwardTile<R>& tile, int64_t steps, const R* a, R* h, const R* bc, int64_t n, int64_t N,
                    Soon<E>& soon) {
  Vec<R> A[NB], H[NB];
  for (int j = 0; j < NB; j++) A[j] = load(a + j * LANES<R>), H[j] = load(h + j * LANES<R>);
  bc += n;
  for (int64_t t = 0; t < steps; t++, bc += 2 * N) {
    soon.fetch();
    const Vec<R> delta = load(tile.delta + t * LANES<R>), u = load(tile.u + t * LANES<R>);
    Vec<R> y{};
    for (int j = 0; j < NB; j++) {
      H[j] = exp2_of_product<BOUNDED>(delta, A[j]) * H[j] + u * bc[j];
      if (OUTPUT) y += H[j] * bc[N + j];
    }
    if (OUTPUT) store(tile.y + t * LANES<R>, load(tile.y + t * LANES<R>) + y);
  }
  for (int j = 0; j < NB; j++) store(h + j * LANES<R>, H[j]);
}

// What is left of a state that crosses the segment: exp(a times the sum of delta).
template <typename E, typename R>
void write_left(const SelectiveScan<E>& p, const Task& task, R* a, const R* steps) {
  for (int64_t v = 0; v < task.vectors<R>(); v++)
    for (int64_t n = 0; n < p.N; n++) {
      R* row = a + (v * p.N + n) * LANES<R>;
      store(row, exp2(load(row) * load(steps + v * LANES<R>)));
    }
  write_states(p.left + (task.s * p.segments + task.segment) * p.D * p.N, p.N, task, a);
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
    Soon<E> soon(task, chunk, chunk.begin + CHUNK, p.T, V * blocks,
                 {p.x, p.dt, OUTPUT ? constant(p.y) : Tokens<const E>{}, OUTPUT ? p.z : Tokens<const E>{}});
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
    if (task.last) write_states(p.final_state + task.s * p.D * N, N, task, h);
    return;
  }
  write_states(p.added + state, N, task, h);
  write_left(p, task, a, steps);
}

// A sum over n for each token of a chunk, in runs of RUN states: 256 states lose 16 + 16 roundings, not 256.
constexpr int64_t RUN = 16;

template <typename R>
struct SumOverStates {
  R run[CHUNK * LANES<R>], before[CHUNK * LANES<R>];

  INLINE_MEMBER void start(int64_t t, Vec<R> value) { store(run + t * LANES<R>, value); }
  INLINE_MEMBER void next_run(int64_t steps, bool first) {
    for (int64_t i = 0; i < steps * LANES<R>; i++) before[i] = first ? run[i] : before[i] + run[i], run[i] = 0;
  }
  // of N states
  INLINE_MEMBER Vec<R> total(int64_t t, int64_t N) const {
    const Vec<R> last = load(run + t * LANES<R>);
    return N > RUN ? load(before + t * LANES<R>) + last : last;
  }
};

// dy is the gradient before the gate; through_b = sum_n dh b, through_a = sum_n dh exp(delta a) h[t-1] a.
template <typename R>
struct BackwardTile {
  R delta[CHUNK * LANES<R>], u[CHUNK * LANES<R>], dy[CHUNK * LANES<R>];
  R slope[CHUNK * LANES<R>];             // of softplus
  R gate[CHUNK * LANES<R>];              // what dz is for y = 1
  SumOverStates<R> y, through_b, through_a;
};

// Into the tile of vector v: what the chunk needs and does not depend on n. Returns the largest |delta|.
template <bool GATED, typename E, typename R>
R enter(const SelectiveScan<E>& p, const Task& task, const Chunk& chunk, int64_t v, const Strip<const E>& xs,
        Rooms<E>& rooms, BackwardTile<R>& tile) {
  const int64_t channel = task.channel<R>(v), lanes = task.lanes<R>(v);
  const Strip<const E> dts = read(p.dt, task, chunk, v, rooms.dt), dys = read(p.dy, task, chunk, v, rooms.y);
  const Strip<const E> zs = GATED ? read(p.z, task, chunk, v, rooms.z) : Strip<const E>{};
  const Vec<R> bias = optional(p.dt_bias, channel, lanes), skip = optional(p.d, channel, lanes);
  Reach<R> reach;
  for (int64_t t = 0; t < chunk.steps; t++) {
    const Vec<R> x = load(xs.at(t), lanes), raw = load(dts.at(t), lanes) + bias;
    Vec<R> dy = load(dys.at(t), lanes), delta = raw;
    if (p.dt_softplus) {
      const Curve<Vec<R>> curve = softplus_curve(raw);
      delta = curve.value;
      store(tile.slope + t * LANES<R>, curve.slope);
    }
    if (GATED) {
      const Curve<Vec<R>> gate = silu_curve(load(zs.at(t), lanes));
      store(tile.gate + t * LANES<R>, dy * gate.slope);
      dy *= gate.value;
      tile.y.start(t, skip * x);
    }
    reach.add(delta);
    store(tile.delta + t * LANES<R>, delta);
    store(tile.u + t * LANES<R>, delta * x);
    store(tile.dy + t * LANES<R>, dy);
    tile.through_b.start(t, Vec<R>{});
    tile.through_a.start(t, Vec<R>{});
  }
  return reach.largest();
}

// Rows [v, n] of LANES channels: a, the same for exp2, the state that enters the chunk, dh behind it, the sum for da.
template <typename R>
struct Rows {
  R *a, *rate, *h, *dh, *da;
  R fastest;                             // the largest |rate|
};

// PB vectors of channels, NB states of each: forwards through the chunk, then backwards. `at` is the first state's row;
// bc [t, 2, N]; sums [t, 2, NB, LANES] take what they add to db and dc.
template <int PB, int NB, bool GATED, bool BOUNDED, typename E, typename R>
INLINE void retreat(BackwardTile<R>* tiles, int64_t steps, const Rows<R>& rows, int64_t at, const R* bc, int64_t n,
                    int64_t N, R* sums, Soon<E>& soon) {
  constexpr int64_t L = LANES<R>;
  alignas(64) R e[CHUNK][PB][NB][L], h[CHUNK + 1][PB][NB][L];
  Vec<R> A[PB][NB], RATE[PB][NB], H[PB][NB], DH[PB][NB], DA[PB][NB];
  for (int i = 0; i < PB; i++)
    for (int j = 0; j < NB; j++) {
      const int64_t row = at + (i * N + j) * L;
      A[i][j] = load(rows.a + row), RATE[i][j] = load(rows.rate + row), H[i][j] = load(rows.h + row);
      DH[i][j] = load(rows.dh + row), DA[i][j] = Vec<R>{};
      store(h[0][i][j], H[i][j]);
    }
  bc += n;
  for (int64_t t = 0; t < steps; t++) {
    soon.fetch();
    for (int i = 0; i < PB; i++) {
      const Vec<R> delta = load(tiles[i].delta + t * L), u = load(tiles[i].u + t * L);
      Vec<R> y{};
      for (int j = 0; j < NB; j++) {
        const Vec<R> left = exp2_of_product<BOUNDED>(delta, RATE[i][j]);
        H[i][j] = left * H[i][j] + u * bc[t * 2 * N + j];
        store(e[t][i][j], left);
        store(h[t + 1][i][j], H[i][j]);
        if (GATED) y += H[i][j] * bc[t * 2 * N + N + j];
      }
      if (GATED) store(tiles[i].y.run + t * L, load(tiles[i].y.run + t * L) + y);
    }
  }
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
        const Vec<R> before = load(h[t][i][j]);
        DH[i][j] += dy[i] * c;
        dc += dy[i] * H[i][j];
        db += u[i] * DH[i][j];
        through_b[i] += DH[i][j] * b;
        DH[i][j] *= load(e[t][i][j]);
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
  const Strip<E> dxs = open(p.dx, task, chunk, v, rooms.y), ddts = open(p.ddt, task, chunk, v, rooms.dt);
  const Strip<E> dzs = GATED ? open(p.dz, task, chunk, v, rooms.z) : Strip<E>{};
  const Vec<R> skip = optional(p.d, channel, lanes);
  ExactSum<R> sum_d, sum_bias;
  for (int64_t t = 0; t < chunk.steps; t++) {
    const Vec<R> x = load(xs.at(t), lanes), dy = load(tile.dy + t * LANES<R>);
    const Vec<R> through_b = tile.through_b.total(t, p.N);
    Vec<R> ddt = x * through_b + tile.through_a.total(t, p.N);
    if (p.dt_softplus) ddt *= load(tile.slope + t * LANES<R>);
    if (GATED) store(dzs.at(t), load(tile.gate + t * LANES<R>) * tile.y.total(t, p.N), lanes);
    store(dxs.at(t), load(tile.delta + t * LANES<R>) * through_b + skip * dy, lanes);
    store(ddts.at(t), ddt, lanes);
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
      bounded ? retreat<PB, NB, GATED, true>(tiles, chunk.steps, rows, at, bc, n, p.N, block, soon)
              : retreat<PB, NB, GATED, false>(tiles, chunk.steps, rows, at, bc, n, p.N, block, soon);
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
                 {p.x, p.dt, p.dy, p.z, constant(p.dx), constant(p.ddt), constant(p.dz)});
    int64_t v = 0;
    for (; v + VECTORS <= V; v += VECTORS)
      retreat_all<VECTORS, GATED>(p, task, chunk, v, rooms, tiles, rows, bc, sums, totals, soon);
    for (; v < V; v++) retreat_all<1, GATED>(p, task, chunk, v, rooms, tiles, rows, bc, sums, totals, soon);
    write_sums(p, task, chunk, sums, across);
  }
  write_states(p.da + state, N, task, rows.da);
  write_states(p.dinitial_state + state, N, task, rows.dh);
  for (int64_t v = 0; v < V; v++) {
    const int64_t at = piece * p.D + task.channel<R>(v);
    store(p.dd + at, totals[v].d.total, task.lanes<R>(v));
    store(p.ddt_bias + at, totals[v].dt_bias.total, task.lanes<R>(v));
  }
}

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

// One token: lanes are states, so that the state is read and written as it lies in memory. In groups of LANES channels.
template <typename E, typename S, typename R = Real<E>>
void step(const SelectiveScan<E>& p, const States<S>& states, int64_t task) {
  constexpr int64_t L = LANES<R>;
  const int64_t N = p.N, width = p.D / p.G, blocks = (p.D + STEP_CHANNELS - 1) / STEP_CHANNELS, row = task / blocks;
  const int64_t begin = task % blocks * STEP_CHANNELS, end = begin + STEP_CHANNELS < p.D ? begin + STEP_CHANNELS : p.D;
  const int64_t group = begin / width;
  int64_t next = (group + 1) * width;
  const R* a = p.a + begin * N;
  const E *b = p.b + (row * p.G + group) * N, *c = p.c + (row * p.G + group) * N;
  const int64_t channel = states.strides[0];
  S* state = states.of(row);
  if (!state) {
    for (int64_t d = begin; d < end; d++) p.y[row * p.D + d] = E{};
    return;
  }
  state += begin * channel;
  for (int64_t d0 = begin; d0 < end; d0 += L) {
    const int64_t lanes = end - d0 < L ? end - d0 : L, at = row * p.D + d0;
    const Vec<R> x = load(p.x + at, lanes), raw = load(p.dt + at, lanes) + optional(p.dt_bias, d0, lanes);
    alignas(64) R delta[L], u[L], y[L], products[L * L];
    const Vec<R> step = p.dt_softplus ? softplus(raw) : raw;
    store(delta, step);
    store(u, step * x);
    for (int64_t i = 0; i < lanes; i++) {
      if (d0 + i == next) b += N, c += N, next += width;
      Vec<R> product{};
      for_each_vector<R>(N, [&](int64_t n, auto count) {
        const Vec<R> decay = exp2(load(a + n, count) * R(LOG2E) * delta[i]);
        const Vec<R> h = decay * load(state + n, count) + load(b + n, count) * u[i];
        store(state + n, h, count);
        product += h * load(c + n, count);
      });
      store(products + i * L, product);
      a += N, state += channel;
    }
    sum_rows(products, lanes, y);
    Vec<R> out = load(y, lanes) + optional(p.d, d0, lanes) * x;
    if (p.z) out *= silu(load(p.z + at, lanes));
    store(p.y + at, out, lanes);
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
void selective_scan_forward(const SelectiveScan<E>& p, int64_t task, Real<E>* scratch) {
  const FlushSubnormals here;
  forward<true>(p, Task(p, task), Stack<Real<E>>{scratch});
}
template <typename E>
void selective_scan_crossing(const SelectiveScan<E>& p, int64_t task, Real<E>* scratch) {
  const FlushSubnormals here;
  forward<false>(p, Task(p, task), Stack<Real<E>>{scratch});
}
template <typename E>
void selective_scan_backward(const SelectiveScan<E>& p, int64_t task, Real<E>* scratch) {
  const FlushSubnormals here;
  const Stack<Real<E>> stack{scratch};
  p.z ? backward<true>(p, Task(p, task), stack) : backward<false>(p, Task(p, task), stack);
}
template <typename E>
void selective_scan_crossing_back(const SelectiveScan<E>& p, int64_t task, Real<E>* scratch) {
  const FlushSubnormals here;
  const Stack<Real<E>> stack{scratch};
  p.z ? crossing_back<true>(p, Task(p, task), stack) : crossing_back<false>(p, Task(p, task), stack);
}
template <typename E, typename S>
void selective_scan_step(const SelectiveScan<E>& p, const States<S>& states, int64_t task) {
  const FlushSubnormals here;
  step(p, states, task);
}

#define INSTANTIATE(E)                                                                    \
  template int64_t selective_scan_scratch(const SelectiveScan<E>&);                       \
  template void selective_scan_forward(const SelectiveScan<E>&, int64_t, Real<E>*);       \
  template void selective_scan_backward(const SelectiveScan<E>&, int64_t, Real<E>*);      \
  template void selective_scan_crossing(const SelectiveScan<E>&, int64_t, Real<E>*);      \
  template void selective_scan_crossing_back(const SelectiveScan<E>&, int64_t, Real<E>*); \
  template void selective_scan_step(const SelectiveScan<E>&, const States<Real<E>>&, int64_t);
#define WITH_16_BITS(E) template void selective_scan_step(const SelectiveScan<E>&, const States<bf16>&, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(double)
WITH_16_BITS(float)
WITH_16_BITS(bf16)

}  // namespace ISA
