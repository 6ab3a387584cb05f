// Causal convolution on a CPU. Lanes are channels. A task walks its tokens TILE at a time, in each tile vector by
// vector: the window of W tokens slides through registers, and memory is read along its rows.

#include "causal_conv1d_block.h"

namespace ISA {
namespace {

// Channels in lanes.
template <typename E, int TAPS>
struct Channels : Block<E, TAPS> {
  using R = Real<E>;
  using Base = Block<E, TAPS>;
  using Base::Base, Base::BLOCK, Base::p, Base::channels, Base::filters, Base::sums, Base::trail, Base::windows;
  using Base::tile;
  using Base::W, Base::in_row, Base::state, Base::enter, Base::leave, Base::slide, Base::convolve, Base::sum_taps;
  static constexpr int64_t TILE = CausalConv1d<E>::TILE;
  static constexpr int GROUP = TAPS ? AT_ONCE : 1, BACK = TAPS ? 2 : 1;  // tokens whose activations are taken at once

  // Where a tile's rows go, and how far apart they are.
  struct Rows {
    E* data;
    int64_t step;
  };
  INLINE_MEMBER Rows rows(const Tokens<E>& y, const Run& run, int64_t t) const {
    return p.stream ? Rows{tile, BLOCK} : Rows{in_row(y, run, t, 0), y.token};
  }
  // Rows [from, to) of a tile that begins at t.
  INLINE_MEMBER void leave_tile(const Tokens<E>& y, const Run& run, int64_t t, int64_t from, int64_t to) const {
    for (int64_t row = from; p.stream && row < to; row++)
      stream(in_row(y, run, row, 0), tile + (row - t) * BLOCK, channels);
  }

  template <typename Lanes>
  INLINE_MEMBER void forward(const Run& run, int64_t t, int64_t end, int64_t c, Rows to, Lanes count) {
    Window<R, TAPS> x(windows), taps(windows + W() * LANES<R>);
    this->template enter<true>(x, run, t, c);
    enter(taps, filters, c);
    const Vec<R> bias = load(filters + W() * BLOCK + c);
    const int64_t token = p.x.token, step = to.step;
    const bool activate = p.silu;
    const E* next = in_row(p.x, run, t, c);
    E* y = to.data + c;
    const auto tokens = [&](auto some) {
      constexpr int U = decltype(some)::value;
      Vec<R> sums[U];
      for (int u = 0; u < U; u++, next += token) {
        __builtin_prefetch(next + TILE * token);
        slide(x, load(next, count));
        sums[u] = convolve(x, taps, bias);
      }
      if (activate) silu_each<E>(sums);
      for (int u = 0; u < U; u++, y += step) store(y, sums[u], count);
    };
    for (; t + GROUP <= end; t += GROUP) tokens(Count<GROUP>{});
    for (; t < end; t++) tokens(Count<1>{});
  }

  // Tokens [t, end) of a run; the results are of W - 1 tokens before.
  template <typename Lanes>
  INLINE_MEMBER void backward(const Run& run, int64_t t, int64_t end, int64_t c, Rows to, Lanes count) {
    Window<R, TAPS> x(windows), taps(windows + W() * LANES<R>), g(windows + 2 * W() * LANES<R>);
    Window<R, TAPS> dtaps(windows + 3 * W() * LANES<R>);
    this->template enter<true>(x, run, t, c);
    enter(taps, filters, c);
    enter(g, trail, c);
    const Vec<R> bias = load(filters + W() * BLOCK + c);
    Vec<R> dbias{};
    for (int64_t w = 0; w < W(); w++) dtaps[w] = Vec<R>{};
    const int64_t x_token = p.x.token, dy_token = p.dy.token, step = to.step, reach = run.from + W() - 1;
    const bool activate = p.silu;
    const E* next = in_row(p.x, run, t, c);
    const E* dy = in_row(p.dy, run, t, c);
    E* dx = to.data + c;
    const auto tokens = [&](auto some) {
      constexpr int U = decltype(some)::value;
      Window<R, TAPS> late = x;  // where taps are in registers
      Vec<R> now[U], slopes[U], values[U];
      for (int u = 0; u < U; u++, next += x_token) {
        __builtin_prefetch(next + TILE * x_token);
        slide(x, now[u] = load(next, count));
        slopes[u] = convolve(x, taps, bias);
      }
      if (activate) silu_curve_each<R>(slopes, values);
      for (int u = 0; u < U; u++, dy += dy_token, dx += step) {
        __builtin_prefetch(dy + TILE * dy_token);
        const Vec<R> gradient = activate ? load(dy, count) * slopes[u] : load(dy, count);
        if (TAPS) slide(late, now[u]);
        slide(g, gradient);
        dbias += gradient;
        for (int64_t w = 0; w < W(); w++) dtaps[w] = fma(gradient, late[w], dtaps[w]);
        if (t + u < reach) continue;
        const auto term = [&](int64_t w, Vec<R> sum) { return fma(taps[w], g[W() - 1 - w], sum); };
        store(dx, sum_taps(W(), Vec<R>{}, term), count);
      }
    };
    for (; t < end && t < reach; t++) tokens(Count<1>{});
    for (; t + BACK <= end; t += BACK) tokens(Count<BACK>{});
    for (; t < end; t++) tokens(Count<1>{});
    leave(g, trail, c);
    for (int64_t w = 0; w < W(); w++) {
      R* const sum = sums + w * BLOCK + c;
      store(sum, load(sum) + dtaps[w]);
    }
    store(sums + W() * BLOCK + c, load(sums + W() * BLOCK + c) + dbias);
  }

  // The last W - 1 results of a run, into which gradients reach back of the tokens behind it, and of its final state.
  template <typename Lanes>
  INLINE_MEMBER void behind(const Run& run, int64_t c, Lanes count) {
    Window<R, TAPS> x(windows), taps(windows + W() * LANES<R>), g(windows + 2 * W() * LANES<R>);
    this->template enter<true>(x, run, run.to, c);
    enter(taps, filters, c);
    enter(g, trail, c);
    const Vec<R> bias = load(filters + W() * BLOCK + c);
    for (int64_t t = run.to; t < run.to + W() - 1; t++) {
      Vec<R> gradient[1] = {}, value[1];
      if (t < run.end) {
        slide(x, load(in_row(p.x, run, t, c), count));
        gradient[0] = convolve(x, taps, bias);
        p.silu ? silu_curve_each<R>(gradient, value) : void(gradient[0] = splat(R(1)));
        gradient[0] *= load(in_row(p.dy, run, t, c), count);
      }
      slide(g, gradient[0]);
      if (t - (W() - 1) < run.from) continue;
      Vec<R> sum{};
      if (t >= run.end && p.dfinal_state) sum = gather(state(p.dfinal_state, run, t - run.end, c), W() - 1, count);
      sum = sum_taps(W(), sum, [&](int64_t w, Vec<R> sum) { return fma(taps[w], g[W() - 1 - w], sum); });
      store(in_row(p.dx, run, t - (W() - 1), c), sum, count);
    }
  }

  void forward(const Run& run) {
    for (int64_t t = run.from, end; t < run.to; t = end) {
      end = t + TILE < run.to ? t + TILE : run.to;
      const Rows to = rows(p.y, run, t);
      for_each_vector<R>(channels, [&](int64_t c, auto count) { forward(run, t, end, c, to, count); });
      leave_tile(p.y, run, t, t, end);
    }
    if (p.stream) streamed();
  }

  void backward(const Run& run) {
    for (int64_t i = 0; i < W() * BLOCK; i++) trail[i] = 0;
    const int64_t ahead = W() - 1;
    for (int64_t t = run.from, end; t < run.to; t = end) {
      end = t + TILE < run.to ? t + TILE : run.to;
      const Rows to = rows(p.dx, run, t - ahead);
      for_each_vector<R>(channels, [&](int64_t c, auto count) { backward(run, t, end, c, to, count); });
      leave_tile(p.dx, run, t - ahead, t - ahead < run.from ? run.from : t - ahead, end - ahead);
    }
    if (p.stream) streamed();
    for_each_vector<R>(channels, [&](int64_t c, auto count) { behind(run, c, count); });
  }
};

// One token: y = activation(bias + weight . [state, x]), and the state moves on. SLOTS: of states that are dense and
// not circular, which takes two thirds of the time; 0: of any.
template <int TAPS, int SLOTS, typename E, typename S>
void step(const CausalConv1d<E>& p, const ConvolutionStates<S>& states, int64_t task, Real<E>* scratch) {
  using R = Real<E>;
  const int64_t W = TAPS ? TAPS : p.W, first = task % p.blocks() * p.block, b = task / p.blocks();
  const int64_t channels = p.D - first < p.block ? p.D - first : p.block;
  const int64_t slots = SLOTS ? SLOTS : states.slots;
  const int64_t channel = SLOTS ? SLOTS : states.strides[0], slot = SLOTS ? 1 : states.strides[1];
  E* y = p.y.at(b, 0, first);
  S* state = states.of(b);
  if (!state) {
    for (int64_t c = 0; c < channels; c++) y[c] = E{};
    return;
  }
  state += first * channel;
  const E* x = p.x.at(b, 0, first);
  const R* weight = p.weight + first * W;
  const bool circular = !SLOTS && states.positions;
  const int64_t newest = circular ? (states.positions[b] % slots + slots) % slots : slots;  // slots: none yet
  const int64_t oldest = newest < W - 1 ? newest - (W - 1) + slots : newest - (W - 1);
  int64_t past[TAPS ? TAPS : 1];  // where the W - 1 tokens before lie
  for (int64_t w = 0; w < TAPS - 1; w++) past[w] = (oldest + w < slots ? oldest + w : oldest + w - slots) * slot;
  for (int64_t c = 0; c < channels; c++, state += channel) {
    const R now = real(x[c]);
    R sum = (p.bias ? p.bias[first + c] : 0) + weight[c * W + W - 1] * now;
    if (TAPS) {
      for (int64_t w = 0; w < W - 1; w++) sum += weight[c * W + w] * real(state[past[w]]);
    } else {  // as a sum of floats, 600 would be 11 ulps off
      double total = sum;
      for (int64_t w = 0, at = oldest; w < W - 1; w++, at = at + 1 < slots ? at + 1 : 0)
        total += double(weight[c * W + w]) * real(state[at * slot]);
      sum = total;
    }
    if (newest < slots) {
      put(state + newest * slot, now);
    } else {
      for (int64_t s = 0; s < slots - 1; s++) state[s * slot] = state[(s + 1) * slot];
      if (slots) put(state + (slots - 1) * slot, now);
    }
    scratch[c] = sum;
  }
  for (int64_t c = 0; c < channels; c += LANES<R>) {
    const Vec<R> sum = load(scratch + c);
    store(y + c, p.silu ? silu_alone<E>(sum) : sum, channels - c < LANES<R> ? channels - c : LANES<R>);
  }
}

}  // namespace

EXPORT_PASS(forward, forward, Channels)
EXPORT_PASS(backward, backward, Channels)

template <typename E, typename S>
void causal_conv1d_step(const CausalConv1d<E>& p, const ConvolutionStates<S>& states, int64_t task, Real<E>* scratch) {
  const FlushSubnormals flush;
  const bool dense = !states.positions && states.strides[0] == states.slots && states.strides[1] == 1;
  switch (p.W) {
    case 1: return step<1, 0>(p, states, task, scratch);
    case 2: return step<2, 0>(p, states, task, scratch);
    case 3: return step<3, 0>(p, states, task, scratch);
    case 4: return dense && states.slots == 3   ? step<4, 3>(p, states, task, scratch)
                   : dense && states.slots == 4 ? step<4, 4>(p, states, task, scratch)
                                                : step<4, 0>(p, states, task, scratch);
    default: return step<0, 0>(p, states, task, scratch);
  }
}
#define EXPORT(E, S) \
  template void causal_conv1d_step(const CausalConv1d<E>&, const ConvolutionStates<S>&, int64_t, Real<E>*);
EXPORT(float, float)
EXPORT(float, bf16)
EXPORT(bf16, float)
EXPORT(bf16, bf16)
EXPORT(double, double)
#undef EXPORT

}  // namespace ISA
