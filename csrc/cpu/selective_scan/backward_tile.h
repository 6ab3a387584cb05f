// A vector of channels on its way back through a chunk: what of it does not depend on the state. Included by kernels
// only.
#pragma once

#include "rows.h"

namespace ISA {
namespace {

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

// Into the tile of vector v: what the chunk needs and does not depend on n. Returns the reach of delta.
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

}  // namespace
}  // namespace ISA
