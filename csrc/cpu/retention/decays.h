// The decays of a chunk of tokens, in the names of chunk.h. Included by retention's kernels only.
#pragma once

#include "../curves.h"
#include "packing.h"

namespace ISA {
namespace {

// 2^x for CHUNK x <= 0. What rounding x to float loses is 8 ulps of 2^x at x = -17: it is multiplied back. 0 where the
// vectors' exp2 stops, at 1.2e-38: what is forgotten is gone.
template <typename R>
INLINE void powers_of_two(const double* x, R* powers) {
  R rounded[CHUNK], lost[CHUNK];
  for (int64_t i = 0; i < CHUNK; i++) rounded[i] = R(x[i]), lost[i] = R((x[i] - rounded[i]) * 0.6931471805599453);
  for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
    const Vec<R> power = exp2(load(rounded + i)), exact = fma(power, load(lost + i), power);
    store(powers + i, load(rounded + i) < R(sizeof(R) == 4 ? -126 : -1022) ? Vec<R>{} : exact);
  }
}

// Those of one head, kept from chunk to chunk where they do not change.
template <typename R>
struct Decays {
  Panels<R> between;                       // decay[j, i]
  R *in, *out, in_end;
  int64_t tokens;                          // the n that they are for; 0: none

  Decays() = default;
  explicit Decays(Memory<R>& memory)
      : between(memory.panels(CHUNK, CHUNK)), in(memory.take(CHUNK)), out(memory.take(CHUNK)), in_end(0), tokens(0) {}

  // Of n tokens with these rates; `between` where any are read. A token's own rate counts before the token, but after
  // it in a scan from the last one. A rate below -1e3 would swallow its neighbours in the sums, which are float64:
  // beside a decay of e^-100 float32 would leave 1e-5.
  void enter(const Rows<const R>& rates, int64_t n, bool reversed, Reads reads) {
    if (rates.step == 0 && tokens == n) return;
    tokens = n;
    constexpr double HALVINGS = 1.4426950408889634;
    double time[CHUNK], x[CHUNK], now = 0;
    for (int64_t i = 0; i < n; i++) {
      const double rate = *rates.at(i), before = now;
      now += HALVINGS * (rate < -1e3 ? -1e3 : rate);
      time[i] = reversed ? before : now;
    }
    for (int64_t i = n; i < CHUNK; i++) time[i] = NEVER;
    if (reads) find_between(time, n);
    powers_of_two(time, in);
    for (int64_t i = 0; i < CHUNK; i++) x[i] = i < n ? now - time[i] : now;
    powers_of_two(x, out);
    R row[CHUNK];
    x[0] = now;
    powers_of_two(x, row);
    in_end = row[0];
  }

  // faded [j, i] = decay[j, i] x[j, i], or that more. What a decay of 0 hides may be anything.
  void fade(int64_t n, const Panels<R>& x, const Panels<R>& faded, bool more) const {
    for (int64_t j = 0; j < n; j++)
      for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
        const Vec<R> weight = load(between.at(j, i));
        const Vec<R> value = weight == 0 ? Vec<R>{} : weight * load(x.at(j, i));
        store(faded.at(j, i), more ? load(faded.at(j, i)) + value : value);
      }
  }

 private:
  static constexpr double NEVER = -1e6;

  void find_between(const double* time, int64_t n) const {
    double x[CHUNK];
    R row[CHUNK];
    for (int64_t j = 0; j < n; j++) {
      for (int64_t i = 0; i < CHUNK; i++) {
        const double since = time[i] - time[j];  // inside ?: it would be a branch
        x[i] = i < j ? NEVER : since;
      }
      powers_of_two(x, row);
      for (int64_t i = 0; i < CHUNK; i += LANES<R>) store(between.at(j, i), load(row + i));
    }
  }
};

}  // namespace
}  // namespace ISA
