// What the causal convolution's two kernels share. Included by them only.
#pragma once

#include "causal_conv1d.h"

#include "sigmoids.h"
#include "stream.h"
#include "turn.h"

namespace ISA {
namespace {

template <typename E>
INLINE Vec<Real<E>> gather(const E* p, int64_t stride, int64_t count) {
  Vec<Real<E>> v{};
  for (int64_t i = 0; i < count; i++) v[i] = real(p[i * stride]);
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
  E* const tile;     // [TILE, BLOCK]: results on their way past the caches

  Block(const CausalConv1d<E>& p, int64_t block, R* scratch)
      : p(p), first(block * p.block), channels(p.D - first < p.block ? p.D - first : p.block), filters(scratch),
        sums(filters + (W() + 1) * BLOCK), trail(sums + (W() + 1) * BLOCK), windows(trail + W() * BLOCK),
        tile(reinterpret_cast<E*>(windows + 4 * W() * 16)) {
    const int64_t W = this->W();
    for (int64_t c = 0; c < channels; c++)
      for (int64_t w = 0; w < W; w++) filters[w * BLOCK + c] = p.weight[(first + c) * W + w];
    for (int64_t c = 0; c < channels; c++) filters[W * BLOCK + c] = p.bias ? p.bias[first + c] : 0;
  }

  INLINE_MEMBER int64_t W() const { return TAPS ? TAPS : p.W; }
  INLINE_MEMBER int64_t lanes(int64_t c) const { return channels - c < LANES<R> ? channels - c : LANES<R>; }

  template <typename Element>
  INLINE_MEMBER Element* at(const Tokens<Element>& x, const Run& run, int64_t t, int64_t c) const {
    return x.at(run.row, t, first + c);
  }
  // The same of channels that lie side by side.
  template <typename Element>
  INLINE_MEMBER Element* in_row(const Tokens<Element>& x, const Run& run, int64_t t, int64_t c) const {
    return x.data + run.row * x.row + t * x.token + first + c;
  }
  INLINE_MEMBER Vec<R> vector(const Tokens<const E>& x, const Run& run, int64_t t, int64_t c) const {
    return x.turned() ? gather(at(x, run, t, c), x.channel, lanes(c)) : load(at(x, run, t, c), lanes(c));
  }
  template <typename Number>
  INLINE_MEMBER Number* state(Number* states, const Run& run, int64_t i, int64_t c) const {
    return states + (run.sequence * p.D + first + c) * (W() - 1) + i;
  }

  // Token t of a sequence, or of the state before it. ROWS: channels are known to lie side by side.
  template <bool ROWS>
  INLINE_MEMBER Vec<R> token(const Run& run, int64_t t, int64_t c) const {
    if (t >= run.start) return ROWS ? load(in_row(p.x, run, t, c), lanes(c)) : vector(p.x, run, t, c);
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
  template <bool ROWS>
  INLINE_MEMBER void enter(Window<R, TAPS>& window, const Run& run, int64_t t, int64_t c) const {
    for (int64_t w = 1; w < W(); w++) window[w] = token<ROWS>(run, t - W() + w, c);
  }
  INLINE_MEMBER void enter(Window<R, TAPS>& window, const R* rows, int64_t c) const {
    for (int64_t w = 0; w < W(); w++) window[w] = load(rows + w * BLOCK + c);
  }
  INLINE_MEMBER void leave(Window<R, TAPS>& window, R* rows, int64_t c) const {
    for (int64_t w = 0; w < W(); w++) store(rows + w * BLOCK + c, window[w]);
  }

  void final_state(const Run& run) {
    for (int64_t c = 0; c < channels; c += LANES<R>)
      for (int64_t i = 0; i < W() - 1; i++)
        scatter(state(p.final_state, run, i, c), W() - 1, token<false>(run, run.end - (W() - 1) + i, c), lanes(c));
  }

  // The gradient of the tokens before the start.
  void initial_state(const Run& run) {
    const int64_t length = run.end - run.start;
    for (int64_t c = 0; c < channels; c += LANES<R>) {
      Window<R, TAPS> x(windows), taps(windows + W() * LANES<R>), g(windows + 2 * W() * LANES<R>);
      enter<false>(x, run, run.start, c);
      enter(taps, filters, c);
      const Vec<R> bias = load(filters + W() * BLOCK + c);
      for (int64_t i = 0; i < W() - 1; i++) {
        g[i] = Vec<R>{};
        if (i < length) {
          slide(x, token<false>(run, run.start + i, c));
          g[i] = vector(p.dy, run, run.start + i, c);
          if (p.silu) g[i] *= silu_slope<R>(convolve(x, taps, bias));
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

// A task of a pass: of a Block that can do a run.
template <typename Pass, typename E>
void forward(const CausalConv1d<E>& p, int64_t task, Real<E>* scratch) {
  Pass block(p, task % p.blocks(), scratch);
  const int64_t layer = task / p.blocks(), layers = p.B * p.segments();
  if (layer >= layers) return block.final_state(whole(p, layer - layers));
  const int64_t from = layer % p.segments() * p.SEGMENT, to = from + p.SEGMENT < p.T ? from + p.SEGMENT : p.T;
  for_each_run(p, layer / p.segments(), from, to, [&](const Run& run) { block.forward(run); });
}

template <typename Pass, typename E>
void backward(const CausalConv1d<E>& p, int64_t task, Real<E>* scratch) {
  Pass block(p, task % p.blocks(), scratch);
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

}  // namespace
}  // namespace ISA

// causal_conv1d_{pass}: by Passes for p.W taps.
#define EXPORT_PASS(name, pass, Passes)                                                           \
  template <typename E>                                                                           \
  void causal_conv1d_##name(const CausalConv1d<E>& p, int64_t task, Real<E>* scratch) {           \
    const FlushSubnormals flush;                                                                  \
    switch (p.W) {                                                                                \
      case 1: return pass<Passes<E, 1>>(p, task, scratch);                                        \
      case 2: return pass<Passes<E, 2>>(p, task, scratch);                                        \
      case 3: return pass<Passes<E, 3>>(p, task, scratch);                                        \
      case 4: return pass<Passes<E, 4>>(p, task, scratch);                                        \
      default: return pass<Passes<E, 0>>(p, task, scratch);                                       \
    }                                                                                             \
  }                                                                                               \
  template void causal_conv1d_##name(const CausalConv1d<float>&, int64_t, float*);                \
  template void causal_conv1d_##name(const CausalConv1d<bf16>&, int64_t, float*);                 \
  template void causal_conv1d_##name(const CausalConv1d<double>&, int64_t, double*);
