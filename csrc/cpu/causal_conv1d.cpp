// Causal convolution on a CPU. Lanes are channels. A task walks its tokens TILE at a time, in each tile vector by vector:
// the window of W tokens slides through registers, and memory is read along its rows.

#include "causal_conv1d_block.h"

namespace ISA {
namespace {

constexpr int64_t TILE = 8;

// Channels in lanes.
template <typename E, int TAPS>
struct Channels : Block<E, TAPS> {
  using R = Real<E>;
  using Base = Block<E, TAPS>;
  using Base::Base, Base::BLOCK, Base::p, Base::channels, Base::filters, Base::sums, Base::trail, Base::windows;
  using Base::W, Base::in_row, Base::state, Base::enter, Base::leave, Base::slide, Base::convolve, Base::sum_taps;

  template <typename Count>
  INLINE_MEMBER void forward(const Run& run, int64_t t, int64_t end, int64_t c, Count count) {
    Window<R, TAPS> x(windows), taps(windows + W() * LANES<R>);
    this->template enter<true>(x, run, t, c);
    enter(taps, filters, c);
    const Vec<R> bias = load(filters + W() * BLOCK + c);
    const int64_t x_token = p.x.token, y_token = p.y.token;
    const bool activate = p.silu;
    const E* next = in_row(p.x, run, t, c);
    E* y = in_row(p.y, run, t, c);
    for (int64_t steps = end - t; steps; steps--, next += x_token, y += y_token) {
      slide(x, load(next, count));
      const Vec<R> sum = convolve(x, taps, bias);
      store(y, activate ? silu_to<E>(sum) : sum, count);
    }
  }

  // Tokens [t, end) of a run where OWN, else of the W - 1 tokens behind it, whose gradients reach back into it.
  template <bool OWN, typename Count>
  INLINE_MEMBER void backward(const Run& run, int64_t t, int64_t end, int64_t c, Count count) {
    Window<R, TAPS> x(windows), taps(windows + W() * LANES<R>), g(windows + 2 * W() * LANES<R>);
    Window<R, TAPS> dtaps(windows + 3 * W() * LANES<R>);
    this->template enter<true>(x, run, t, c);
    enter(taps, filters, c);
    enter(g, trail, c);
    const Vec<R> bias = load(filters + W() * BLOCK + c);
    Vec<R> dbias{};
    if (OWN)
      for (int64_t w = 0; w < W(); w++) dtaps[w] = Vec<R>{};
    const int64_t x_token = p.x.token, dy_token = p.dy.token, dx_token = p.dx.token, reach = run.from + W() - 1;
    const bool activate = p.silu;
    const E* next = in_row(p.x, run, t, c);
    const E* dy = in_row(p.dy, run, t, c);
    E* dx = in_row(p.dx, run, t - (W() - 1), c);
    for (; t < end; t++, next += x_token, dy += dy_token, dx += dx_token) {
      Vec<R> gradient{};
      if (OWN || t < run.end) {
        slide(x, load(next, count));
        gradient = load(dy, count);
        if (activate) gradient *= silu_curve(convolve(x, taps, bias)).slope;
      }
      slide(g, gradient);
      if (OWN) {
        dbias += gradient;
        for (int64_t w = 0; w < W(); w++) dtaps[w] = fma(gradient, x[w], dtaps[w]);
      }
      if (t < reach) continue;
      Vec<R> sum{};
      if (!OWN && t >= run.end && p.dfinal_state)
        sum = gather(state(p.dfinal_state, run, t - run.end, c), W() - 1, count);
      sum = sum_taps(W(), sum, [&](int64_t w, Vec<R> sum) { return fma(taps[w], g[W() - 1 - w], sum); });
      store(dx, sum, count);
    }
    if (!OWN) return;
    leave(g, trail, c);
    for (int64_t w = 0; w < W(); w++) {
      R* const sum = sums + w * BLOCK + c;
      store(sum, load(sum) + dtaps[w]);
    }
    store(sums + W() * BLOCK + c, load(sums + W() * BLOCK + c) + dbias);
  }

  void forward(const Run& run) {
    for (int64_t t = run.from; t < run.to; t += TILE)
      for_each_vector<R>(channels, [&](int64_t c, auto count) {
        forward(run, t, t + TILE < run.to ? t + TILE : run.to, c, count);
      });
  }

  void backward(const Run& run) {
    for (int64_t i = 0; i < W() * BLOCK; i++) trail[i] = 0;
    for (int64_t t = run.from; t < run.to; t += TILE)
      for_each_vector<R>(channels, [&](int64_t c, auto count) {
        backward<true>(run, t, t + TILE < run.to ? t + TILE : run.to, c, count);
      });
    for_each_vector<R>(channels, [&](int64_t c, auto count) {
      backward<false>(run, run.to, run.to + W() - 1, c, count);
    });
  }
};

// One token: y = activation(bias + weight . [state, x]), and the state moves on. SLOTS: of states that are dense and not
// circular, which takes two thirds of the time; 0: of any.
template <int TAPS, int SLOTS, typename E, typename S>
void step(const CausalConv1d<E>& p, const ConvolutionStates<S>& states, int64_t task, Real<E>* scratch) {
  using R = Real<E>;
  const int64_t W = TAPS ? TAPS : p.W, first = task % p.blocks() * p.BLOCK, b = task / p.blocks();
  const int64_t channels = p.D - first < p.BLOCK ? p.D - first : p.BLOCK;
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
  const int64_t newest = !SLOTS && states.positions ? (states.positions[b] % slots + slots) % slots : slots;  // slots: none yet
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
    store(y + c, p.silu ? silu_to<E>(sum) : sum, channels - c < LANES<R> ? channels - c : LANES<R>);
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
