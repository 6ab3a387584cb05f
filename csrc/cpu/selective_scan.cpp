// Selective scan on a CPU: one lane per channel, sequential in time, the states of a few n at a time in registers.
//
//   delta = softplus(dt + dt_bias)                       h[n] = exp(delta a[n]) h[n] + delta x b[n]
//   y     = (sum_n c[n] h[n] + d x) silu(z)
//
// A task owns one sequence and up to `split` channels of one group. It walks the sequence in chunks of 32 tokens:
// what does not depend on n (delta, u = delta x, y) is laid out for the chunk in L1, then each block of states
// crosses it. The backward walks the chunks in reverse; inside a chunk it recomputes exp(delta a) and h from the
// state that enters. dB and dC are summed over a task's channels lane by lane, then across lanes: the same order in
// every run.

#include "vec.h"

#include "selective_scan.h"

namespace ISA {
namespace {

constexpr int64_t CHUNK = SelectiveScan::CHUNK;

// The channels [d0, d1) of group g in the tokens [t0, t1) of a row: sequence s.
struct Task {
  int64_t s, g, layer, d0, d1, row, t0, t1;

  Task(const SelectiveScan& p, int64_t index) {
    const int64_t width = p.D / p.G;
    layer = index % p.splits();
    g = index / p.splits() % p.G;
    s = index / p.splits() / p.G;
    d0 = g * width + layer * p.split;
    d1 = d0 + p.split < (g + 1) * width ? d0 + p.split : (g + 1) * width;
    row = p.cu_seqlens ? 0 : s;
    t0 = p.cu_seqlens ? p.cu_seqlens[s] : 0;
    t1 = p.cu_seqlens ? p.cu_seqlens[s + 1] : p.T;
  }
  int64_t vectors() const { return (d1 - d0 + LANES - 1) / LANES; }
  int64_t channel(int64_t v) const { return d0 + v * LANES; }
  int64_t lanes(int64_t v) const { return d1 - channel(v) < LANES ? d1 - channel(v) : LANES; }
};

int64_t max_vectors(const SelectiveScan& p) { return (p.split + LANES - 1) / LANES; }

// The tokens of chunk i that belong to the task. Chunks are counted along the row, so that ceil(T / CHUNK)
// checkpoints are enough for any sequences: one that begins inside a chunk enters it with its initial state.
struct Chunk {
  int64_t begin, steps, token;   // token: of the B T in all
  bool has_checkpoint;

  Chunk(const SelectiveScan& p, const Task& task, int64_t i) {
    begin = i * CHUNK < task.t0 ? task.t0 : i * CHUNK;
    steps = ((i + 1) * CHUNK < task.t1 ? (i + 1) * CHUNK : task.t1) - begin;
    token = task.row * p.T + begin;
    has_checkpoint = begin == i * CHUNK;
  }
};

float* checkpoint(const SelectiveScan& p, const Task& task, int64_t i, int64_t n, int64_t channel) {
  return p.checkpoints + ((i * p.B + task.row) * p.N + n) * p.D + channel;
}

INLINE Vec optional(const float* p, int64_t at, int64_t lanes) { return p ? load(p + at, lanes) : Vec{}; }

INLINE Vec step_size(const SelectiveScan& p, int64_t at, Vec bias, int64_t lanes) {
  const Vec raw = load(p.dt + at, lanes) + bias;
  return p.dt_softplus ? softplus(raw) : raw;
}

// rows [v, n] of LANES channels <- the task's channels of state [D, N] (null: zeros), and back
void read_states(const float* state, const SelectiveScan& p, const Task& task, float* rows) {
  for (int64_t v = 0; v < task.vectors(); v++)
    for (int64_t n = 0; n < p.N; n++, rows += LANES)
      store(rows, state ? gather(state + task.channel(v) * p.N + n, p.N, task.lanes(v)) : Vec{});
}
void write_states(float* state, const SelectiveScan& p, const Task& task, const float* rows) {
  for (int64_t v = 0; v < task.vectors(); v++)
    for (int64_t n = 0; n < p.N; n++, rows += LANES)
      scatter(state + task.channel(v) * p.N + n, p.N, load(rows), task.lanes(v));
}

// A sum over n for each token of a chunk, in runs of RUN states: 256 states lose 16 + 16 roundings, not 256.
constexpr int64_t RUN = 16;

struct SumOverStates {
  float run[CHUNK * LANES], before[CHUNK * LANES];

  INLINE_MEMBER void start(int64_t t, Vec value) {
    store(run + t * LANES, value);
    store(before + t * LANES, Vec{});
  }
  INLINE_MEMBER Vec total(int64_t t) const { return load(before + t * LANES) + load(run + t * LANES); }
  INLINE_MEMBER void next_run(int64_t steps) {
    for (int64_t t = 0; t < steps; t++) {
      store(before + t * LANES, total(t));
      store(run + t * LANES, Vec{});
    }
  }
};

struct ForwardTile {
  float delta[CHUNK * LANES], u[CHUNK * LANES];
  SumOverStates y;
};

// States n .. n + NB of LANES channels through one chunk.
template <int NB>
INLINE void advance(ForwardTile& tile, int64_t steps, const float* a, float* h, const float* b, const float* c,
                    int64_t stride) {
  Log2e A[NB];
  Vec H[NB];
  for (int j = 0; j < NB; j++) A[j] = times_log2e(load(a + j * LANES)), H[j] = load(h + j * LANES);
  for (int64_t t = 0; t < steps; t++, b += stride, c += stride) {
    const Vec delta = load(tile.delta + t * LANES), u = load(tile.u + t * LANES);
    Vec y = load(tile.y.run + t * LANES);
    for (int j = 0; j < NB; j++) {
      H[j] = exp_of_product(delta, A[j]) * H[j] + u * b[j];
      y += H[j] * c[j];
    }
    store(tile.y.run + t * LANES, y);
  }
  for (int j = 0; j < NB; j++) store(h + j * LANES, H[j]);
}

void forward(const SelectiveScan& p, const Task& task, float* scratch) {
  alignas(64) ForwardTile tile;
  const int64_t N = p.N, GN = p.G * N;
  float *h = scratch, *a = h + max_vectors(p) * N * LANES;
  read_states(p.a, p, task, a);
  read_states(p.initial_state ? p.initial_state + task.s * p.D * N : nullptr, p, task, h);
  for (int64_t i = task.t0 / CHUNK; i * CHUNK < task.t1; i++) {
    const Chunk chunk(p, task, i);
    const float *b = p.b + chunk.token * GN + task.g * N, *c = p.c + chunk.token * GN + task.g * N;
    for (int64_t v = 0; v < task.vectors(); v++) {
      const int64_t channel = task.channel(v), lanes = task.lanes(v);
      const Vec bias = optional(p.dt_bias, channel, lanes), skip = optional(p.d, channel, lanes);
      float *hv = h + v * N * LANES, *av = a + v * N * LANES;
      if (p.checkpoints && chunk.has_checkpoint)
        for (int64_t n = 0; n < N; n++) store(checkpoint(p, task, i, n, channel), load(hv + n * LANES), lanes);
      for (int64_t t = 0; t < chunk.steps; t++) {
        const int64_t at = (chunk.token + t) * p.D + channel;
        __builtin_prefetch(p.x + at + CHUNK * p.D);  // rows are too far apart for the hardware: 14 % at D = 1536
        __builtin_prefetch(p.dt + at + CHUNK * p.D);
        const Vec x = load(p.x + at, lanes), delta = step_size(p, at, bias, lanes);
        store(tile.delta + t * LANES, delta);
        store(tile.u + t * LANES, delta * x);
        tile.y.start(t, p.d ? skip * x : Vec{});
      }
      for (int64_t n = 0; n < N;) {
        if (n && n % RUN == 0) tile.y.next_run(chunk.steps);
        const int64_t row = n * LANES, left = N - n;
        if (left >= 8) advance<8>(tile, chunk.steps, av + row, hv + row, b + n, c + n, GN), n += 8;
        else if (left >= 2) advance<2>(tile, chunk.steps, av + row, hv + row, b + n, c + n, GN), n += 2;
        else advance<1>(tile, chunk.steps, av + row, hv + row, b + n, c + n, GN), n += 1;
      }
      for (int64_t t = 0; t < chunk.steps; t++) {
        const int64_t at = (chunk.token + t) * p.D + channel;
        Vec y = tile.y.total(t);
        if (p.z) y *= silu(load(p.z + at, lanes));
        store(p.y + at, y, lanes);
      }
    }
  }
  write_states(p.final_state + task.s * p.D * N, p, task, h);
}

// dy is the gradient before the gate; through_b = sum_n dh b, through_a = sum_n dh exp(delta a) h[t-1] a.
struct BackwardTile {
  float delta[CHUNK * LANES], u[CHUNK * LANES], dy[CHUNK * LANES];
  SumOverStates y, through_b, through_a;
};

// Rows [vector, n] of LANES channels: a, the state that enters the chunk, dh behind it, and what da has summed.
struct Rows {
  float *a, *h, *dh, *da;
};

// What the channels of a task add to db and dc, lane by lane, for NB states.
template <int NB>
struct Sums {
  float db[CHUNK * NB * LANES], dc[CHUNK * NB * LANES];
};

// NB states of LANES channels (rows from `at` on): forwards through the chunk, then backwards.
template <int NB, bool GATED>
INLINE void retreat(BackwardTile& tile, int64_t steps, const Rows& rows, int64_t at, const float* b, const float* c,
                    int64_t stride, Sums<NB>& sums) {
  alignas(64) float e[CHUNK * NB * LANES], h[(CHUNK + 1) * NB * LANES];
  Log2e A2[NB];
  Vec A[NB], H[NB], DH[NB], DA[NB];
  for (int j = 0; j < NB; j++) {
    A[j] = load(rows.a + at + j * LANES), A2[j] = times_log2e(A[j]), H[j] = load(rows.h + at + j * LANES);
    DH[j] = load(rows.dh + at + j * LANES), DA[j] = Vec{};
    store(h + j * LANES, H[j]);
  }
  for (int64_t t = 0; t < steps; t++) {
    const Vec delta = load(tile.delta + t * LANES), u = load(tile.u + t * LANES);
    for (int j = 0; j < NB; j++) {
      const Vec E = exp_of_product(delta, A2[j]);
      H[j] = E * H[j] + u * b[t * stride + j];
      store(e + (t * NB + j) * LANES, E);
      store(h + ((t + 1) * NB + j) * LANES, H[j]);
    }
    if (GATED) {
      Vec y = load(tile.y.run + t * LANES);
      for (int j = 0; j < NB; j++) y += H[j] * c[t * stride + j];
      store(tile.y.run + t * LANES, y);
    }
  }
  for (int64_t t = steps - 1; t >= 0; t--) {
    const Vec delta = load(tile.delta + t * LANES), u = load(tile.u + t * LANES), dy = load(tile.dy + t * LANES);
    Vec through_b = load(tile.through_b.run + t * LANES), through_a = load(tile.through_a.run + t * LANES);
    for (int j = 0; j < NB; j++) {
      const int64_t i = (t * NB + j) * LANES;
      DH[j] += dy * c[t * stride + j];
      store(sums.dc + i, load(sums.dc + i) + dy * load(h + i + NB * LANES));
      store(sums.db + i, load(sums.db + i) + u * DH[j]);
      through_b += DH[j] * b[t * stride + j];
      DH[j] *= load(e + i);
      const Vec decayed = DH[j] * load(h + i);
      through_a += decayed * A[j];
      DA[j] += decayed * delta;
    }
    store(tile.through_b.run + t * LANES, through_b);
    store(tile.through_a.run + t * LANES, through_a);
  }
  for (int j = 0; j < NB; j++) {
    store(rows.dh + at + j * LANES, DH[j]);
    store(rows.da + at + j * LANES, load(rows.da + at + j * LANES) + DA[j]);
  }
}

// States n .. n + NB of every channel of the task through one chunk; then db and dc across lanes.
template <int NB, bool GATED>
void retreat_all(const SelectiveScan& p, const Task& task, const Chunk& chunk, int64_t n, BackwardTile* tiles,
                 const Rows& rows) {
  alignas(64) Sums<NB> sums;
  memset(&sums, 0, sizeof sums);
  const int64_t GN = p.G * p.N, at = chunk.token * GN + task.g * p.N + n;
  for (int64_t v = 0; v < task.vectors(); v++) {
    if (n && n % RUN == 0) {
      tiles[v].y.next_run(chunk.steps);
      tiles[v].through_b.next_run(chunk.steps);
      tiles[v].through_a.next_run(chunk.steps);
    }
    retreat<NB, GATED>(tiles[v], chunk.steps, rows, (v * p.N + n) * LANES, p.b + at, p.c + at, GN, sums);
  }
  const int64_t layer = task.layer * p.B * p.T * GN + at;
  for (int64_t t = 0; t < chunk.steps; t++)
    for (int j = 0; j < NB; j++) {
      p.db[layer + t * GN + j] = sum(load(sums.db + (t * NB + j) * LANES));
      p.dc[layer + t * GN + j] = sum(load(sums.dc + (t * NB + j) * LANES));
    }
}

// Into the tile: what the chunk needs of LANES channels and does not depend on n.
template <bool GATED>
void enter(const SelectiveScan& p, const Chunk& chunk, int64_t channel, int64_t lanes, BackwardTile& tile) {
  const Vec bias = optional(p.dt_bias, channel, lanes), skip = optional(p.d, channel, lanes);
  for (int64_t t = 0; t < chunk.steps; t++) {
    const int64_t at = (chunk.token + t) * p.D + channel;
    const Vec x = load(p.x + at, lanes), delta = step_size(p, at, bias, lanes);
    Vec dy = load(p.dy + at, lanes);
    if (GATED) dy *= silu(load(p.z + at, lanes));
    store(tile.delta + t * LANES, delta);
    store(tile.u + t * LANES, delta * x);
    store(tile.dy + t * LANES, dy);
    tile.y.start(t, p.d ? skip * x : Vec{});
    tile.through_b.start(t, Vec{});
    tile.through_a.start(t, Vec{});
  }
}

// Out of the tile: the gradients of x, dt and z; dd and ddt_bias add up.
template <bool GATED>
void leave(const SelectiveScan& p, const Chunk& chunk, int64_t channel, int64_t lanes, const BackwardTile& tile,
           float* dd, float* ddt_bias) {
  const Vec bias = optional(p.dt_bias, channel, lanes), skip = optional(p.d, channel, lanes);
  ExactSum sum_d, sum_bias;
  for (int64_t t = 0; t < chunk.steps; t++) {
    const int64_t at = (chunk.token + t) * p.D + channel;
    const Vec x = load(p.x + at, lanes), dy = load(tile.dy + t * LANES), delta = load(tile.delta + t * LANES);
    const Vec through_b = tile.through_b.total(t), through_a = tile.through_a.total(t);
    Vec dx = delta * through_b, ddt = x * through_b + through_a;
    if (p.d) dx += skip * dy;
    if (p.dt_softplus) ddt *= sigmoid(load(p.dt + at, lanes) + bias);
    if (GATED) {
      const Vec z = load(p.z + at, lanes), s = sigmoid(z), slope = s * (z * (1.0f - s) + 1.0f);
      store(p.dz + at, load(p.dy + at, lanes) * tile.y.total(t) * slope, lanes);
    }
    store(p.dx + at, dx, lanes);
    store(p.ddt + at, ddt, lanes);
    sum_d.add(dy * x);
    sum_bias.add(ddt);
  }
  store(dd, load(dd) + sum_d.total);
  store(ddt_bias, load(ddt_bias) + sum_bias.total);
}

template <bool GATED>
void backward(const SelectiveScan& p, const Task& task, float* scratch) {
  const int64_t N = p.N, vectors = task.vectors(), size = max_vectors(p) * N * LANES, width = max_vectors(p) * LANES;
  const Rows rows{scratch, scratch + size, scratch + 2 * size, scratch + 3 * size};
  float *dd = scratch + 4 * size, *ddt_bias = dd + width;
  BackwardTile* tiles = reinterpret_cast<BackwardTile*>(ddt_bias + width);
  const int64_t state = task.s * p.D * N;
  read_states(p.a, p, task, rows.a);
  read_states(p.dfinal_state ? p.dfinal_state + state : nullptr, p, task, rows.dh);
  memset(rows.da, 0, 4 * (size + 2 * width));
  for (int64_t i = (task.t1 - 1) / CHUNK; i >= task.t0 / CHUNK && task.t0 < task.t1; i--) {
    const Chunk chunk(p, task, i);
    if (!chunk.has_checkpoint) read_states(p.initial_state ? p.initial_state + state : nullptr, p, task, rows.h);
    for (int64_t v = 0; v < vectors; v++) {
      const int64_t channel = task.channel(v), lanes = task.lanes(v);
      if (chunk.has_checkpoint)
        for (int64_t n = 0; n < N; n++)
          store(rows.h + (v * N + n) * LANES, load(checkpoint(p, task, i, n, channel), lanes));
      enter<GATED>(p, chunk, channel, lanes, tiles[v]);
    }
    int64_t n = 0;
    for (; n + 2 <= N; n += 2) retreat_all<2, GATED>(p, task, chunk, n, tiles, rows);
    for (; n < N; n++) retreat_all<1, GATED>(p, task, chunk, n, tiles, rows);
    for (int64_t v = 0; v < vectors; v++)
      leave<GATED>(p, chunk, task.channel(v), task.lanes(v), tiles[v], dd + v * LANES, ddt_bias + v * LANES);
  }
  write_states(p.da + state, p, task, rows.da);
  write_states(p.dinitial_state + state, p, task, rows.dh);
  for (int64_t v = 0; v < vectors; v++) {
    const int64_t at = task.s * p.D + task.channel(v);
    store(p.dd + at, load(dd + v * LANES), task.lanes(v));
    store(p.ddt_bias + at, load(ddt_bias + v * LANES), task.lanes(v));
  }
}

}  // namespace

int64_t selective_scan_scratch(const SelectiveScan& p, bool backward) {
  const int64_t rows = max_vectors(p) * p.N * LANES;
  return backward ? 4 * rows + max_vectors(p) * (2 * LANES + sizeof(BackwardTile) / 4) : 2 * rows;
}

void selective_scan_forward(const SelectiveScan& p, int64_t begin, int64_t end, float* scratch) {
  const FlushSubnormals here;
  for (int64_t i = begin; i < end; i++) forward(p, Task(p, i), scratch);
}

void selective_scan_backward(const SelectiveScan& p, int64_t begin, int64_t end, float* scratch) {
  const FlushSubnormals here;
  for (int64_t i = begin; i < end; i++)
    p.z ? backward<true>(p, Task(p, i), scratch) : backward<false>(p, Task(p, i), scratch);
}

}  // namespace ISA
