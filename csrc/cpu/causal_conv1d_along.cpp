// Causal convolution on a CPU where tokens lie side by side. Lanes are tokens. The tokens of a run enter rows in L1, a
// row a channel, as far as the run's results reach, and what lies W - 1 tokens apart is what is loaded W - 1 apart.
// Tensors whose channels lie side by side are turned on their way, LANES channels at a time.

#include "causal_conv1d_block.h"

namespace ISA {
namespace {

template <typename E, int TAPS>
struct Along : Block<E, TAPS> {
  using R = Real<E>;
  using Base = Block<E, TAPS>;
  using Base::BLOCK, Base::p, Base::first, Base::channels, Base::filters, Base::sums, Base::windows;
  using Base::W, Base::at, Base::lanes, Base::state, Base::sum_taps;
  static constexpr int64_t L = LANES<R>;

  R *const xs, *const gs;  // [LANES, pitch]: tokens from the W - 1 before a run on; gradients from its first on

  Along(const CausalConv1d<E>& p, int64_t block, R* scratch)
      : Base(p, block, scratch), xs(windows + 4 * W() * 16 + p.TILE * BLOCK), gs(xs + L * p.pitch()) {}

  // rows <- tokens [from, to) of LANES channels, and LANES zeros
  void fill(const Tokens<const E>& x, const Run& run, int64_t from, int64_t to, int64_t c, R* rows) const {
    const int64_t n = to - from;
    if (!x.turned()) turn(at(x, run, from, c), x.token, n, lanes(c), rows, p.pitch());
    for (int64_t i = 0; i < lanes(c); i++, rows += p.pitch()) {
      const E* row = at(x, run, from, c + i);
      if (x.turned()) for_each_vector<R>(n, [&](int64_t t, auto count) { store(rows + t, load(row + t, count)); });
      store(rows + n, Vec<R>{});
    }
  }
  // xs <- tokens [run.from - (W - 1), to), those before the first from the state
  void fill_xs(const Run& run, int64_t to, int64_t c) const {
    const int64_t begin = run.from - (W() - 1), known = begin < run.start ? run.start : begin;
    fill(p.x, run, known, to, c, xs + known - begin);
    for (int64_t i = 0; i < lanes(c); i++)
      for (int64_t t = begin; t < known; t++) {
        const int64_t before = t - run.start + W() - 1;
        xs[i * p.pitch() + t - begin] = p.initial_state ? *state(p.initial_state, run, before, c + i) : 0;
      }
  }

  // The taps of one channel, and their products with tokens.
  struct Filter {
    const Along& block;
    Window<R, TAPS> taps;
    Vec<R> bias;

    INLINE_MEMBER Filter(const Along& block, int64_t c) : block(block), taps(block.windows) {
      for (int64_t w = 0; w < block.W(); w++) taps[w] = splat(block.filters[w * BLOCK + c]);
      bias = splat(block.filters[block.W() * BLOCK + c]);
    }
    INLINE_MEMBER Vec<R> forward(const R* x) {
      return block.sum_taps(block.W(), bias, [&](int64_t w, Vec<R> sum) { return fma(taps[w], load(x + w), sum); });
    }
    INLINE_MEMBER Vec<R> backward(const R* g, Vec<R> first) {
      const R* last = g + block.W() - 1;
      return block.sum_taps(block.W(), first, [&](int64_t w, Vec<R> sum) { return fma(taps[w], load(last - w), sum); });
    }
  };

  // The same tokens of the next channels, on their way to L2.
  INLINE_MEMBER void fetch(const Tokens<const E>& x, const Run& run, int64_t t, int64_t c) const {
    if (x.turned() && c + L < channels) __builtin_prefetch(at(x, run, t, c + L), 0, 2);
  }

  void forward(const Run& run) const {
    for (int64_t c = 0; c < channels; c += L) {
      fill_xs(run, run.to, c);
      for (int64_t i = 0; i < lanes(c); i++) {
        Filter filter(*this, c + i);
        const R* x = xs + i * p.pitch();
        E *const there = at(p.y, run, run.from, c + i), *const y = p.stream ? reinterpret_cast<E*>(gs) : there;
        for_each_vector<R>(run.to - run.from, [&](int64_t t, auto count) {
          fetch(p.x, run, run.from + t, c + i);
          if (!p.stream) fetch(constant(p.y), run, run.from + t, c + i);
          const Vec<R> sum = filter.forward(x + t);
          store(y + t, p.silu ? silu_alone<E>(sum) : sum, count);
        });
        if (p.stream) stream(there, y, run.to - run.from);
      }
    }
    if (p.stream) streamed();
  }

  // What the final state's gradient gives LANES tokens from t on.
  Vec<R> from_state(const Run& run, int64_t t, int64_t c) const {
    Vec<R> sum{};
    for (int64_t j = 0; j < L; j++) {
      const int64_t i = t + j - (run.end - (W() - 1));
      if (i >= 0 && i < W() - 1) sum[j] = *state(p.dfinal_state, run, i, c);
    }
    return sum;
  }

  // g, which holds dy, becomes the gradient before the activation in n tokens, and zero in the W - 1 behind.
  INLINE_MEMBER void differentiate(Filter& filter, const R* x, R* g, int64_t n) const {
    for (int64_t t = 0; p.silu && t < n; t += L) store(g + t, load(g + t) * silu_slope<R>(filter.forward(x + t)));
    for (int64_t t = n; t < n + W() - 1; t += L) store(g + t, Vec<R>{});
  }

  void backward(const Run& run) const {
    const int64_t behind = run.to + W() - 1, reach = behind < run.end ? behind : run.end, own = run.to - run.from;
    for (int64_t c = 0; c < channels; c += L) {
      fill_xs(run, reach, c);
      fill(p.dy, run, run.from, reach, c, gs);
      for (int64_t i = 0; i < lanes(c); i++) {
        Filter filter(*this, c + i);
        R *x = xs + i * p.pitch(), *g = gs + i * p.pitch();
        differentiate(filter, x, g, reach - run.from);
        for (int64_t w = 0; w <= W(); w++) {  // the last of the sums is the bias's
          Vec<R> total{};
          for_each_vector<R>(own, [&](int64_t t, auto count) {
            const Vec<R> gradient = load(g + t, count);
            total = w < W() ? fma(gradient, load(x + t + w), total) : total + gradient;
          });
          sums[w * BLOCK + c + i] += sum<R>(total);
        }
        const bool past = p.stream && p.dx.turned();
        E *const there = at(p.dx, run, run.from, c + i), *const dx = past ? reinterpret_cast<E*>(x) : there;
        for_each_vector<R>(own, [&](int64_t t, auto count) {
          fetch(p.x, run, run.from + t, c + i);
          fetch(p.dy, run, run.from + t, c + i);
          if (!past) fetch(constant(p.dx), run, run.from + t, c + i);
          const bool last = p.dfinal_state && run.from + t + L > run.end - (W() - 1);
          const Vec<R> sum = filter.backward(g + t, last ? from_state(run, run.from + t, c + i) : Vec<R>{});
          p.dx.turned() ? store(dx + t, sum, count) : store(x + t, sum);
        });
        if (past) stream(there, dx, own);
      }
      if (!p.dx.turned()) turn(xs, p.pitch(), lanes(c), own, at(p.dx, run, run.from, c), p.dx.token);
    }
    if (p.stream) streamed();
  }
};

}  // namespace

EXPORT_PASS(forward_along, forward, Along)
EXPORT_PASS(backward_along, backward, Along)

}  // namespace ISA
