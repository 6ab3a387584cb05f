// What one thread of this machine can do with operands in registers: FMAs, and the 2^(x y) that the scan's kernel uses.
// Compiled by limits.py for the machine's best instruction set.

#include "curves.h"

// The compiler must take `value` for new, and may not leave out what computed it.
#if defined(__x86_64__)
#define OPAQUE(value) asm volatile("" : "+x"(value))
#else
#define OPAQUE(value) asm volatile("" : "+w"(value))
#endif

// Both run n rounds and return how many flops, or exps, that was.
extern "C" int64_t fma_flops(int64_t n) {
  constexpr int CHAINS = 12;                                               // latency 4 x 2 pipes, and some
  ISA::Floats sum[CHAINS] = {}, slope = ISA::splat(0.5f), offset = ISA::splat(1.0f);
  OPAQUE(slope);
  OPAQUE(offset);
  for (int j = 0; j < CHAINS; j++) OPAQUE(sum[j]);                         // or it sees that all are equal and computes one
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < CHAINS; j++) sum[j] = ISA::fma(sum[j], slope, offset);
  for (int j = 0; j < CHAINS; j++) OPAQUE(sum[j]);
  return n * CHAINS * ISA::LANES<float> * 2;
}

extern "C" int64_t exps(int64_t n) {
  ISA::Floats x = ISA::splat(-0.7f);
  for (int64_t i = 0; i < n; i++) {
    OPAQUE(x);
    ISA::Floats y = ISA::exp2_of_product<true>(x, x);
    OPAQUE(y);
  }
  return n * ISA::LANES<float>;
}
