// Which of the three builds of a CPU kernel runs.
#pragma once

namespace cpu {

enum Isa { BASE, AVX2, AVX512 };
constexpr const char* NAMES[] = {"base", "avx2", "avx512"};

// The best that this machine has. Elsewhere than on x86-64 only base is built.
inline Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return BASE;
}

inline Isa& current() {
  static Isa isa = best();
  return isa;
}

}  // namespace cpu

// PICK(kernel): base::kernel, avx2::kernel or avx512::kernel.
#if defined(__x86_64__)
#define PICK(...)                              \
  (cpu::current() == cpu::AVX512 ? avx512::__VA_ARGS__ \
   : cpu::current() == cpu::AVX2 ? avx2::__VA_ARGS__   \
                                 : base::__VA_ARGS__)
#else
#define PICK(...) base::__VA_ARGS__
#endif
