// Instructions of compute capability 9.0a: a group of four warps multiplies matrices in shared memory, and its threads
// go on. tests/csrc/wgmma_on_cpu.h has the same functions for a CPU.
#pragma once

#include "mma.cuh"

#ifdef __CUDACC__
namespace gpu {

// What this thread wrote to shared memory is there for products that begin after the next barrier.
__device__ inline void show() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before products add to sums that this thread has read or written.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the last `LEFT` groups are done: they read nothing any more, and after the last the sums are there.
template <int LEFT>
__device__ inline void finished() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// No use of the sums moves to before this.
template <int COUNT>
__device__ inline void hold(float (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// c [64, N] += a [64, 16] b [16, N], N / 2 sums a thread. Lane 4g + t of warp w holds of each 8 columns (16w + g, 2t),
// (16w + g, 2t + 1) and the same 8 rows below. Operands are TRANSPOSED where depth is not their contiguous axis.
template <Arithmetic KIND, bool A_TRANSPOSED, bool B_TRANSPOSED, int COUNT>
__device__ inline void multiply(float (&c)[COUNT], uint64_t a, uint64_t b) {
  static_assert(COUNT == 64 || COUNT == 128, "m64n128 and m64n256");
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define FIFTY TEN() TEN(1) TEN(2) TEN(3) TEN(4)
#define IN4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define IN16(i) IN4(i), IN4(i + 4), IN4(i + 8), IN4(i + 12)
#define IN64(i) IN16(i), IN16(i + 16), IN16(i + 32), IN16(i + 48)
#define WGMMA(type, n, sums, operands, ...)                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" sums "}, " operands            \
               : __VA_ARGS__                                                                                      \
               : "l"(a), "l"(b), "n"(A_TRANSPOSED), "n"(B_TRANSPOSED))
#define SIZED(type)                                                                                               \
  if constexpr (COUNT == 64)                                                                                      \
    WGMMA(type, "128", FIFTY TEN(5) "%60, %61, %62, %63", "%64, %65, 1, 1, 1, %66, %67;", IN64(0));               \
  else                                                                                                            \
    WGMMA(type, "256", FIFTY TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)                                   \
          "%120, %121, %122, %123, %124, %125, %126, %127", "%128, %129, 1, 1, 1, %130, %131;", IN64(0), IN64(64))
  if constexpr (KIND == Arithmetic::BFLOAT16) SIZED("bf16");
  if constexpr (KIND == Arithmetic::FLOAT16) SIZED("f16");
#undef SIZED
#undef WGMMA
#undef IN64
#undef IN16
#undef IN4
#undef FIFTY
#undef TEN
}

}  // namespace gpu
#endif
