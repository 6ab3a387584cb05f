// What a task of the selective scan walks over, and how a vector of channels gets in and out where tokens or channels lie
// side by side. Included by the kernels only.
#pragma once

#include "../selective_scan.h"

#include "../turn.h"

namespace ISA {
namespace {

constexpr int64_t CHUNK = SelectiveScan<float>::CHUNK;

// How many states and vectors of channels the registers hold: 32 of them with AVX-512, 16 otherwise.
constexpr int FORWARD_STATES = BYTES == 64 ? 8 : 4, STATES = 2, VECTORS = BYTES == 64 ? 2 : 1;

// The channels [d0, d1) of group g in the tokens [t0, t1) of a row: a segment of sequence s.
struct Task {
  int64_t s, segment, g, layer, d0, d1, row, t0, t1;
  bool last;

  template <typename E>
  Task(const SelectiveScan<E>& p, int64_t index) {
    const int64_t width = p.D / p.G;
    layer = index % p.splits();
    g = index / p.splits() % p.G;
    segment = p.segment(index);
    s = index / p.splits() / p.G / p.segments;
    d0 = g * width + layer * p.split;
    d1 = d0 + p.split < (g + 1) * width ? d0 + p.split : (g + 1) * width;
    row = p.cu_seqlens ? 0 : s;
    last = segment + 1 == p.segments;
    t0 = (p.cu_seqlens ? p.cu_seqlens[s] : 0) + segment * p.length;
    t1 = !last ? t0 + p.length : p.cu_seqlens ? p.cu_seqlens[s + 1] : p.T;
  }
  template <typename R>
  int64_t vectors() const {
    return (d1 - d0 + LANES<R> - 1) / LANES<R>;
  }
  template <typename R>
  int64_t channel(int64_t v) const {
    return d0 + v * LANES<R>;
  }
  template <typename R>
  int64_t lanes(int64_t v) const {
    return d1 - channel<R>(v) < LANES<R> ? d1 - channel<R>(v) : LANES<R>;
  }
};

// The tokens of chunk i that belong to the task. Chunks are counted along the row, so that ceil(T / CHUNK)
// checkpoints are enough for any sequences: one that begins inside a chunk enters it with its initial state.
struct Chunk {
  int64_t begin, steps;
  bool has_checkpoint;

  template <typename E>
  Chunk(const SelectiveScan<E>& p, const Task& task, int64_t i) {
    begin = i * CHUNK < task.t0 ? task.t0 : i * CHUNK;
    steps = ((i + 1) * CHUNK < task.t1 ? (i + 1) * CHUNK : task.t1) - begin;
    has_checkpoint = begin == i * CHUNK;
  }
};

// A vector of channels in the tokens of a chunk: `step` elements from one to the next.
template <typename E>
struct Strip {
  E* first;
  int64_t step;

  INLINE_MEMBER E* at(int64_t t) const { return first + t * step; }
};

// Memory for the strips of tensors whose channels lie apart.
template <typename E>
struct Rooms {
  using Room = E[CHUNK * LANES<Real<E>>];
  Room x[VECTORS], dt, y, z;  // a backward: dx in y
};

// Vector v of x, turned into `room` where channels lie apart.
template <typename E>
Strip<const E> read(const Tokens<const E>& x, const Task& task, const Chunk& chunk, int64_t v, E* room) {
  using R = Real<E>;
  const E* first = x.at(task.row, chunk.begin, task.channel<R>(v));
  if (!x.turned()) return {first, x.token};
  turn(first, x.channel, task.lanes<R>(v), chunk.steps, room, LANES<R>);
  return {room, LANES<R>};
}

// Where vector v of x is to be written, and then: it has been.
template <typename E>
Strip<E> open(const Tokens<E>& x, const Task& task, const Chunk& chunk, int64_t v, E* room) {
  if (x.turned()) return {room, LANES<Real<E>>};
  return {x.at(task.row, chunk.begin, task.channel<Real<E>>(v)), x.token};
}
template <typename E>
void close(const Tokens<E>& x, const Task& task, const Chunk& chunk, int64_t v, const E* room) {
  using R = Real<E>;
  if (!x.data || !x.turned()) return;
  E* first = x.at(task.row, chunk.begin, task.channel<R>(v));
  turn(room, LANES<R>, chunk.steps, task.lanes<R>(v), first, x.channel);
}

}  // namespace
}  // namespace ISA
