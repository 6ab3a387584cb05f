// One token: each element of the state is read and written once. The sum over K goes in runs of 16.

#include "../panels.h"
#include "../retention.h"
#include "../turn.h"

namespace ISA {
namespace {

// One token of one head. The output is of the state before it is rounded to S.
template <typename E, typename S>
struct Token {
  using R = Real<E>;
  const E *q, *k, *v;
  Vec<R> decay;
  S* state;

  // The columns of the state are next to each other, its rows `step` apart.
  INLINE_MEMBER void along_rows(const RetentionStep<E>& p, int64_t step, E* o) const {
    for_vectors<R>(p.V, [&](int64_t column, int64_t count) INLINE_LAMBDA {
      S* state = this->state + column;
      const Vec<R> value = load(v + column, count);
      Vec<R> total{};
      for (int64_t row = 0; row < p.K;) {
        Vec<R> run{};
        for (const int64_t end = row + 16 < p.K ? row + 16 : p.K; row < end; row++, state += step) {
          const Vec<R> next = fma(splat(real(k[row])), value, decay * load(state, count));
          store(state, next, count);
          run = fma(splat(real(q[row])), next, run);
        }
        total += run;
      }
      store(o + column, p.scale * total, count);
    });
  }

  // The rows are, its columns `step` apart.
  INLINE_MEMBER void along_columns(const RetentionStep<E>& p, int64_t step, E* o) const {
    constexpr int64_t L = LANES<R>;
    alignas(64) R products[L * L], sums[L];
    for (int64_t first = 0; first < p.V; first += L) {
      const int64_t lanes = p.V - first < L ? p.V - first : L;
      for (int64_t i = 0; i < lanes; i++) {
        S* state = this->state + (first + i) * step;
        const Vec<R> value = splat(real(v[first + i]));
        Vec<R> total{};
        for (int64_t row = 0; row < p.K; row += 16 * L) {
          Vec<R> run{};
          for_vectors<R>(row + 16 * L < p.K ? 16 * L : p.K - row, [&](int64_t at, int64_t count) INLINE_LAMBDA {
            const Vec<R> next = fma(load(k + row + at, count), value, decay * load(state + row + at, count));
            store(state + row + at, next, count);
            run = fma(load(q + row + at, count), next, run);
          });
          total += run;
        }
        store(products + i * L, total);
      }
      sum_rows(products, lanes, sums);
      store(o + first, p.scale * load(sums, lanes), lanes);
    }
  }
};

}  // namespace

template <typename E, typename S>
void retention_step(const RetentionStep<E>& p, const States<S>& states, int64_t task) {
  using R = Real<E>;
  const FlushSubnormals here;
  const int64_t b = task / p.H, h = task % p.H, row = states.strides[1], column = states.strides[2];
  S* const state = states.of(b);
  E* const o = p.o + task * p.V;
  if (!state) {
    for (int64_t i = 0; i < p.V; i++) o[i] = E{};
    return;
  }
  Token<E, S> token;
  token.q = p.q.at(b, 0, h / (p.H / p.Hq));
  token.k = p.k.at(b, 0, h / (p.H / p.Hk));
  token.v = p.v.at(b, 0, h / (p.H / p.Hv));
  token.decay = splat(R(::exp(double(*p.log_decay.at(b, 0, h)))));
  token.state = state + h * states.strides[0];
  if (column == 1 || p.V == 1)
    token.along_rows(p, row, o);
  else
    token.along_columns(p, column, o);
}

#define INSTANTIATE(E, S) template void retention_step(const RetentionStep<E>&, const States<S>&, int64_t);
INSTANTIATE(float, float)
INSTANTIATE(float, bf16)
INSTANTIATE(bf16, float)
INSTANTIATE(bf16, bf16)
INSTANTIATE(double, double)
#undef INSTANTIATE

}  // namespace ISA
