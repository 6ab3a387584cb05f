// One token of the selective scan on a CPU.

#include "rows.h"

namespace ISA {
namespace {

constexpr int64_t STEP_CHANNELS = SelectiveScan<float>::STEP_CHANNELS;

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

template <typename E, typename S>
void selective_scan_step(const SelectiveScan<E>& p, const States<S>& states, int64_t task) {
  const FlushSubnormals here;
  step(p, states, task);
}

#define INSTANTIATE(E, S) template void selective_scan_step(const SelectiveScan<E>&, const States<S>&, int64_t);
INSTANTIATE(float, float)
INSTANTIATE(float, bf16)
INSTANTIATE(bf16, float)
INSTANTIATE(bf16, bf16)
INSTANTIATE(double, double)

}  // namespace ISA
