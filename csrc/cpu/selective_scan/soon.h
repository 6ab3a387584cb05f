// What a task reads next, fetched while it computes. Included by the kernels only.
#pragma once

#include "task.h"

namespace ISA {
namespace {

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

// What is to be written, as far as it is read into the caches first.
template <typename E>
Tokens<const E> read_before(const Tokens<E>& x, bool stream) {
  return stream && !x.turned() ? Tokens<const E>{} : constant(x);
}

// What comes next, too far apart for the hardware to see it coming. Where channels lie side by side the rows of the
// next chunk; where tokens do those of the next vectors: of a whole chunk's, which often lie 2^n bytes apart, L2 would
// keep a few.
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

}  // namespace
}  // namespace ISA
