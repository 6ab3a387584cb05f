// Causal convolution on a CPU. Lanes are channels. A task walks its tokens TILE at a time, in each tile vector by vector:
// the window of W tokens slides through registers, and memory is read along its rows.

#include "causal_conv1d.h"

#include "vec.h"

namespace ISA {
namespace {

constexpr int64_t TILE = 8;

template <typename R>
INLINE Vec<R> gather(const R* p, int64_t stride, int64_t count) {
  Vec<R> v{};
  for (int64_t i = 0; i < count; i++) v[i] = p[i * stride];
  return v;
}
template <typename R>
INLINE void scatter(R* p, int64_t stride, Vec<R> v, int64_t count) {
  for (int64_t i = 0; i < count; i++) p[i * stride] = v[i];
}

// Tokens [from, to) of a row, all of one sequence, which is tokens [start, end) of it.
struct Run {
  int64_t row, sequence, start, end, from, to;
};

// W vectors: registers where W is known, memory where it is not (TAPS = 0).
template <typename R, int TAPS>
struct Window {
  Vec<R> values[TAPS];
  INLINE_MEMBER explicit Window(R*) {}
  INLINE_MEMBER Vec<R>& operator[](int64_t w) { return values[w]; }
};
template <typename R>
struct Window<R, 0> {
  Vec<R>* const values;
  INLINE_MEMBER explicit Window(R* memory) : values(reinterpret_cast<Vec<R>*>(memory)) {}
  INLINE_MEMBER Vec<R>& operator[](int64_t w) { return values[w]; }
};

// A block of channels, [first, first + channels).
template <typename E, int TAPS>
struct Block {
  using R = Real<E>;
  static constexpr int64_t BLOCK = CausalConv1d<E>::BLOCK;

  const CausalConv1d<E>& p;
  const int64_t first, channels;
  R* const filters;  // [W + 1, BLOCK]: the taps, then the biases
  R* const sums;     // [W + 1, BLOCK]: their gradients
  R* const trail;    // [W, BLOCK]: the gradients before the activation of the latest W tokens
  R* const windows;  // 4 W vectors

  Block(const CausalConv1d<E>& p, int64_t block, R* scratch)
      : p(p), first(block * BLOCK), channels(p.D - first < BLOCK ? p.D - first : BLOCK), filters(scratch),
        sums(filters + (W() + 1) * BLOCK), trail(sums + (W() + 1) * BLOCK), windows(trail + W() * BLOCK) {
    const int64_t W = this->W();
    for (int64_t c = 0; c < channels; c++)
      for (int64_t w = 0; w < W; w++) filters[w * BLOCK + c] = p.weight[(first + c) * W + w];
    for (int64_t c = 0; c < channels; c++) filters[W * BLOCK + c] = p.bias ? p.bias[first + c] : 0;
  }

  INLINE_MEMBER int64_t W() const { return TAPS ? TAPS : p.W; }
  INLINE_MEMBER int64_t lanes(int64_t c) const { return channels - c < LANES<R> ? channels - c : LANES<R>; }

  template <typename Element>
  INLINE_MEMBER Element* at(Element* tensor, const Run& run, int64_t t, int64_t c) const {
    return tensor + (run.row * p.T + t) * p.D + first + c;
  }
  template <typename Number>
  INLINE_MEMBER Number* state(Number* states, const Run& run, int64_t i, int64_t c) const {
    return states + (run.sequence * p.D + first + c) * (W() - 1) + i;
  }

  // Token t of a sequence, or of the state before it.
  INLINE_MEMBER Vec<R> token(const Run& run, int64_t t, int64_t c) const {
    if (t >= run.start) return load(p.x + run.row * p.x_row + t * p.x_token + first + c, lanes(c));
    if (!p.initial_state) return Vec<R>{};
    return gather(state(p.initial_state, run, t - run.start + W() - 1, c), W() - 1, lanes(c));
  }

  // first + `count` terms: term(w, sum) adds one. Hundreds lose the roundings of a run of 16.
  template <typename F>
  INLINE_MEMBER Vec<R> sum_taps(int64_t count, Vec<R> first, F term) const {
    if (TAPS) {
      for (int64_t w = 0; w < count; w++) first = term(w, first);
      return first;
    }
    ExactSum<R> sum{first};
    for (int64_t begin = 0; begin < count; begin += 16) {
      Vec<R> run{};
      for (int64_t w = begin; w < count && w < begin + 16; w++) run = term(w, run);
      sum.add(run);
    }
    return sum.total;
  }
  INLINE_MEMBER Vec<R> convolve(Window<R, TAPS>& x, Window<R, TAPS>& taps, Vec<R> bias) const {
    return sum_taps(W(), bias, [&](int64_t w, Vec<R> sum) { return fma(taps[w], x[w], sum); });
  }
  INLINE_MEMBER void slide(Window<R, TAPS>& window, Vec<R> next) const {
    for (int64_t w = 0; w + 1 < W(); w++) window[w] = window[w + 1];
    window[W() - 1] = next;
  }
  // The tokens before t, to be slid.
  INLINE_MEMBER void enter(Window<R, TAPS>& window, const Run& run, int64_t t, int64_t c) const {
    for (int64_t w = 1; w < W(); w++) window[w] = token(run, t - W() + w, c);
  }
  INLINE_MEMBER void enter(Window<R, TAPS>& window, const R* rows, int64_t c) const {
    for (int64_t w = 0; w < W(); w++) window[w] = load(rows + w * BLOCK + c);
  }
  INLINE_MEMBER void leave(Window<R, TAPS>& window, R* rows, int64_t c) const {
    for (int64_t w = 0; w < W(); w++) store(rows + w * BLOCK + c, window[w]);
  }

  template <typename Count>
  INLINE_MEMBER void forward(const Run& run, int64_t t, int64_t end, int64_t c, Count count) {
    Window<R, TAPS> x(windows), taps(windows + W() * LANES<R>);
    enter(x, run, t, c);
    enter(taps, filters, c);
    const Vec<R> bias = load(filters + W() * BLOCK + c);
    const int64_t x_token = p.x_token, D = p.D;
    const bool activate = p.silu;
    const E* next = p.x + run.row * p.x_row + t * x_token + first + c;
    E* y = at(p.y, run, t, c);
    for (int64_t steps = end - t; steps; steps--, next += x_token, y += D) {
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
    enter(x, run, t, c);
    enter(taps, filters, c);
    enter(g, trail, c);
    const Vec<R> bias = load(filters + W() * BLOCK + c);
    Vec<R> dbias{};
    if (OWN)
      for (int64_t w = 0; w < W(); w++) dtaps[w] = Vec<R>{};
    const int64_t x_token = p.x_token, D = p.D, reach = run.from + W() - 1;
    const bool activate = p.silu;
    const E* next = p.x + run.row * p.x_row + t * x_token + first + c;
    const E* dy = at(p.dy, run, t, c);
    E* dx = at(p.dx, run, t - (W() - 1), c);
    for (; t < end; t++, next += x_token, dy += D, dx += D) {
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

  void final_state(const Run& run) {
    for (int64_t c = 0; c < channels; c += LANES<R>)
      for (int64_t i = 0; i < W() - 1; i++)
        scatter(state(p.final_state, run, i, c), W() - 1, token(run, run.end - (W() - 1) + i, c), lanes(c));
  }

  // The gradient of the tokens before the start.
  void initial_state(const Run& run) {
    const int64_t length = run.end - run.start;
    for (int64_t c = 0; c < channels; c += LANES<R>) {
      Window<R, TAPS> x(windows), taps(windows + W() * LANES<R>), g(windows + 2 * W() * LANES<R>);
      enter(x, run, run.start, c);
      enter(taps, filters, c);
      const Vec<R> bias = load(filters + W() * BLOCK + c);
      for (int64_t i = 0; i < W() - 1; i++) {
        g[i] = Vec<R>{};
        if (i < length) {
          slide(x, token(run, run.start + i, c));
          g[i] = load(at(p.dy, run, run.start + i, c), lanes(c));
          if (p.silu) g[i] *= silu_curve(convolve(x, taps, bias)).slope;
        }
        Vec<R> dstate{};
        if (i >= length && p.dfinal_state)
          dstate = gather(state(p.dfinal_state, run, i - length, c), W() - 1, lanes(c));
        dstate = sum_taps(i + 1, dstate, [&](int64_t w, Vec<R> sum) { return fma(taps[w], g[i - w], sum); });
        scatter(state(p.dinitial_state, run, i, c), W() - 1, dstate, lanes(c));
      }
    }
  }
};

// f(run) for each sequence of a row that has tokens in [from, to).
template <typename E, typename F>
INLINE void for_each_run(const CausalConv1d<E>& p, int64_t row, int64_t from, int64_t to, F f) {
  if (!p.cu_seqlens) return f(Run{row, row, 0, p.T, from, to});
  int64_t s = 0;
  for (int64_t beyond = p.S; s + 1 < beyond;) {  // the last sequence that starts at `from` or before
    const int64_t middle = (s + beyond) / 2;
    (p.cu_seqlens[middle] <= from ? s : beyond) = middle;
  }
  for (; s < p.S && p.cu_seqlens[s] < to; s++) {
    const int64_t start = p.cu_seqlens[s], end = p.cu_seqlens[s + 1];
    if (start < end) f(Run{row, s, start, end, start < from ? from : start, end < to ? end : to});
  }
}

// All of sequence s.
template <typename E>
Run whole(const CausalConv1d<E>& p, int64_t s) {
  if (!p.cu_seqlens) return {s, s, 0, p.T, 0, p.T};
  return {0, s, p.cu_seqlens[s], p.cu_seqlens[s + 1], p.cu_seqlens[s], p.cu_seqlens[s + 1]};
}

template <typename E, int TAPS>
void forward(const CausalConv1d<E>& p, int64_t task, Real<E>* scratch) {
  Block<E, TAPS> block(p, task % p.blocks(), scratch);
  const int64_t layer = task / p.blocks(), layers = p.B * p.segments();
  if (layer >= layers) return block.final_state(whole(p, layer - layers));
  const int64_t from = layer % p.segments() * p.SEGMENT, to = from + p.SEGMENT < p.T ? from + p.SEGMENT : p.T;
  for_each_run(p, layer / p.segments(), from, to, [&](const Run& run) { block.forward(run); });
}

template <typename E, int TAPS>
void backward(const CausalConv1d<E>& p, int64_t task, Real<E>* scratch) {
  Block<E, TAPS> block(p, task % p.blocks(), scratch);
  const int64_t W = block.W(), layer = task / p.blocks(), layers = p.B * p.segments();
  if (layer >= layers) return block.initial_state(whole(p, layer - layers));
  for (int64_t i = 0; i < (W + 1) * p.BLOCK; i++) block.sums[i] = 0;
  const int64_t from = layer % p.segments() * p.SEGMENT, to = from + p.SEGMENT < p.T ? from + p.SEGMENT : p.T;
  for_each_run(p, layer / p.segments(), from, to, [&](const Run& run) { block.backward(run); });
  for (int64_t c = 0; c < block.channels; c++) {
    const int64_t channel = layer * p.D + block.first + c;
    for (int64_t w = 0; w < W; w++) p.dweight[channel * W + w] = block.sums[w * p.BLOCK + c];
    p.dbias[channel] = block.sums[W * p.BLOCK + c];
  }
}

// One token: y = activation(bias + weight . [state, x]), and the state moves on. SLOTS: of states that are dense and not
// circular, which takes two thirds of the time; 0: of any.
template <int TAPS, int SLOTS, typename E, typename S>
void step(const CausalConv1d<E>& p, const ConvolutionStates<S>& states, int64_t task, Real<E>* scratch) {
  using R = Real<E>;
  const int64_t W = TAPS ? TAPS : p.W, first = task % p.blocks() * p.BLOCK, b = task / p.blocks();
  const int64_t channels = p.D - first < p.BLOCK ? p.D - first : p.BLOCK;
  const int64_t slots = SLOTS ? SLOTS : states.slots;
  const int64_t channel = SLOTS ? SLOTS : states.strides[0], slot = SLOTS ? 1 : states.strides[1];
  E* y = p.y + b * p.D + first;
  S* state = states.of(b);
  if (!state) {
    for (int64_t c = 0; c < channels; c++) y[c] = E{};
    return;
  }
  state += first * channel;
  const E* x = p.x + b * p.x_row + first;
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

// The kernel for p.W taps.
#define EXPORT(kernel)                                                                            \
  template <typename E>                                                                           \
  void causal_conv1d_##kernel(const CausalConv1d<E>& p, int64_t task, Real<E>* scratch) {         \
    const FlushSubnormals flush;                                                                  \
    switch (p.W) {                                                                                \
      case 1: return kernel<E, 1>(p, task, scratch);                                              \
      case 2: return kernel<E, 2>(p, task, scratch);                                              \
      case 3: return kernel<E, 3>(p, task, scratch);                                              \
      case 4: return kernel<E, 4>(p, task, scratch);                                              \
      default: return kernel<E, 0>(p, task, scratch);                                             \
    }                                                                                             \
  }                                                                                               \
  template void causal_conv1d_##kernel(const CausalConv1d<float>&, int64_t, float*);              \
  template void causal_conv1d_##kernel(const CausalConv1d<bf16>&, int64_t, float*);               \
  template void causal_conv1d_##kernel(const CausalConv1d<double>&, int64_t, double*);
EXPORT(forward)
EXPORT(backward)
#undef EXPORT

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
