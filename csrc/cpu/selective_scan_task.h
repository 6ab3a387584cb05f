// What a task of the selective scan walks over, and how a vector of channels gets in and out where tokens or channels lie
// side by side. Included by the kernels only.
#pragma once

#include "selective_scan.h"

#include "curves.h"
#include "turn.h"

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
    segment = index / p.splits() / p.G % p.segments;
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

// Memory on its way to L2, some lines at a time: fetched all at once they would wait for each other.
template <typename E>
struct Lines {
  struct Block {
    const E* first;
    int64_t step, rows, width;
  } blocks[7];
  int64_t count = 0, total = 0, per_step = 0, block = 0, row = 0, at = 0;

  void add(const E* first, int64_t step, int64_t rows, int64_t width) {
    blocks[count++] = {first, step, rows, width};
    total += rows * (width / LINE + 1);
  }
  // In so many steps.
  void spread(int64_t steps) { per_step = total / steps + 1; }
  INLINE_MEMBER void fetch() {
    if (block == count) return;
    for (int64_t i = 0; i < per_step; i++) {
      const Block& now = blocks[block];
      __builtin_prefetch(now.first + row * now.step + at, 0, 2);
      if ((at += LINE) < now.width) continue;
      at = 0;
      if (++row < now.rows) continue;
      row = 0;
      if (++block == count) return;
    }
  }
  static constexpr int64_t LINE = 64 / sizeof(E);
};

// What comes next, too far apart for the hardware to see it coming. Of tokens side by side the rows of the next chunk;
// of channels side by side those of the next vectors: of a whole chunk's, which often lie 2^n bytes apart, L2 would keep
// a few.
template <typename E>
struct Soon {
  Lines<E> chunk, vectors;
  Tokens<const E> turned[7];
  int64_t count = 0;
  const Task& task;
  const Chunk& now;

  // From token `next` of the row on, in so many steps.
  Soon(const Task& task, const Chunk& now, int64_t next, int64_t T, int64_t steps, const Tokens<const E> (&from)[7])
      : task(task), now(now) {
    for (const Tokens<const E>& x : from) {
      if (!x.data) continue;
      if (x.turned())
        turned[count++] = x;
      else if (next >= 0 && next + CHUNK <= T)
        chunk.add(x.at(task.row, next, task.d0), x.token, CHUNK, task.d1 - task.d0);
    }
    chunk.spread(steps);
  }
  // The channels from `channel` on, `width` of them, are next, in so many steps.
  void next(int64_t channel, int64_t width, int64_t steps) {
    vectors = {};
    if (!count || channel >= task.d1) return;
    for (int64_t i = 0; i < count; i++)
      vectors.add(turned[i].at(task.row, now.begin, channel), turned[i].channel,
                  task.d1 - channel < width ? task.d1 - channel : width, now.steps);
    vectors.spread(steps);
  }
  INLINE_MEMBER void fetch() {
    chunk.fetch();
    vectors.fetch();
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
