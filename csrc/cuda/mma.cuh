// Instructions of a GPU from compute capability 8.0 on that C++ has no words for. tests/csrc/cuda_on_cpu.h has the same
// functions for a CPU, and says which lane of a warp holds what.
#pragma once

#include "kronecker_expand.h"

#ifdef __CUDACC__
namespace gpu {

__device__ inline uint32_t address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes to shared memory, both ends 16-byte aligned: `bytes` of them read, zeros after these. They arrive late.
__device__ inline void copy(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
// Ends a group of this thread's copies.
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last `LEFT` groups of this thread have arrived.
template <int LEFT>
__device__ inline void arrived() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8 x 8 matrices of 16 bits, or 8 x 4 of 32: lanes 8q to 8q+7 point at the 16-byte rows of the q-th.
__device__ inline void matrices(uint32_t (&x)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address(shared))
               : "memory");
}
__device__ inline void transposed_matrices(uint32_t (&x)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address(shared))
               : "memory");
}

// c [16, 8] += a [16, K] b [K, 8]: K is 16 for 16 bits, 8 for tf32, of which the last 13 bits are not looked at.
template <Arithmetic KIND>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define MMA(shape)                                                                                            \
  asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (KIND == Arithmetic::BFLOAT16) MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  if constexpr (KIND == Arithmetic::FLOAT16) MMA("m16n8k16.row.col.f32.f16.f16.f32");
  if constexpr (KIND == Arithmetic::TF32) MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#undef MMA
}

__device__ inline float value(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t bits(float x) { return __float_as_uint(x); }

// What is stored of a float32 sum.
template <Arithmetic KIND>
__device__ inline auto nearest(float x) {
  if constexpr (KIND == Arithmetic::TF32 || KIND == Arithmetic::FLOAT32) {
    return bits(x);
  } else {
    uint16_t half;
    if constexpr (KIND == Arithmetic::BFLOAT16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(x));
    if constexpr (KIND == Arithmetic::FLOAT16) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
  }
}

// That float32 again.
template <Arithmetic KIND, typename Element>
__device__ inline float stored(Element x) {
  if constexpr (KIND == Arithmetic::BFLOAT16) return value(uint32_t{x} << 16);
  if constexpr (KIND == Arithmetic::FLOAT16) {
    float whole;
    asm("cvt.f32.f16 %0, %1;" : "=f"(whole) : "h"(x));
    return whole;
  }
  if constexpr (sizeof(Element) == 4) return value(x);
}

}  // namespace gpu
#endif
