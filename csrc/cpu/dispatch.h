// Which of the three builds of a CPU kernel this machine runs.
#pragma once

namespace cpu {

enum Isa { BASE, AVX2, AVX512 };

inline Isa isa() {
#if defined(__x86_64__)
  static const Isa found = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
      return AVX512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? AVX2 : BASE;
  }();
  return found;
#else
  return BASE;
#endif
}

}  // namespace cpu

// PICK(kernel): base::kernel, avx2::kernel or avx512::kernel. Elsewhere than on x86-64 only base is built.
#if defined(__x86_64__)
#define PICK(kernel) (cpu::isa() == cpu::AVX512 ? avx512::kernel : cpu::isa() == cpu::AVX2 ? avx2::kernel : base::kernel)
#else
#define PICK(kernel) base::kernel
#endif
