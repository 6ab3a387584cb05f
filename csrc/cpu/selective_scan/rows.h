// What a task keeps between chunks: rows of LANES channels of one state each, in scratch. Included by kernels only.
#pragma once

#include "decay.h"
#include "task.h"

namespace ISA {
namespace {

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

// a for exp2: in units of log(2). Returns the largest |rate|, inf where one is positive: a state may grow.
template <typename R>
R read_rates(const R* a, int64_t N, const Task& task, R* rows) {
  R most = 0;
  read_states(a, N, task, rows);
  for (int64_t i = 0; i < task.vectors<R>() * N * LANES<R>; i++) {
    rows[i] *= R(LOG2E);
    most = larger(most, rows[i] > 0 ? R(INFINITY) : -rows[i]);
  }
  return most;
}

// The largest of what was added, inf where one is negative; a NaN is not.
template <typename R>
struct Reach {
  Vec<R> most{};

  INLINE_MEMBER void add(Vec<R> x) {
    const Vec<R> size = x < 0 ? Vec<R>{} + R(INFINITY) : x;
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
  for (int64_t v = 0; v < task.vectors<R>(); v++) {
    R* const first = p.checkpoints + (i * p.B + task.row) * p.N * p.D + task.channel<R>(v);
    const int64_t lanes = task.lanes<R>(v);
    const Strip<R> saved{first, p.D, SAVE && p.stream && whole_lines(first, p.D, lanes)};
    for (int64_t n = 0; n < p.N; n++, rows += LANES<R>)
      SAVE ? saved.put(n, load(rows), lanes) : store(rows, load(saved.at(n), lanes));
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

}  // namespace
}  // namespace ISA
