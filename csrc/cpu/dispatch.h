// Which of the builds of a CPU kernel runs.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cpu {

// The last two, which only some kernels of bfloat16 are built for, are where the compiler knows them.
enum Isa { BASE, AVX2, AVX512, AVX512_BF16, AMX };
constexpr const char* NAMES[] = {"base", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// The processor has AVX512_BF16.
inline bool has_bf16() {
  unsigned a = 0, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
}

// It has AMX with bfloat16, the system saves the tiles, and lets this process use them. Linux is asked for that once.
inline bool has_amx() {
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;     // no xgetbv
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned TILES = 3u << 17;                                     // their shapes and their data
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;              // ARCH_REQ_XCOMP_PERM
  return (low & TILES) == TILES && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

// The best that this machine has. Elsewhere than on x86-64 only base is built.
inline Isa find_best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
#if defined(WITH_AVX512_BF16)
    if (has_bf16()) {
#if defined(WITH_AMX)
      if (has_amx()) return AMX;
#endif
      return AVX512_BF16;
    }
#endif
    return AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return BASE;
}
inline Isa best() {
  static const Isa isa = find_best();
  return isa;
}

inline Isa& current() {
  static Isa isa = best();
  return isa;
}

}  // namespace cpu

// PICK(kernel): base::kernel, avx2::kernel or avx512::kernel.
#if defined(__x86_64__)
#define PICK(...)                              \
  (cpu::current() >= cpu::AVX512 ? avx512::__VA_ARGS__ \
   : cpu::current() == cpu::AVX2 ? avx2::__VA_ARGS__   \
                                 : base::__VA_ARGS__)
#else
#define PICK(...) base::__VA_ARGS__
#endif

// PICK_PRODUCTS(kernel, E): of kernel<E>, which is built for products of bfloat16 too, where E is that.
#if defined(WITH_AMX)
#define PICK_TILES(kernel, E) \
  if (cpu::current() == cpu::AMX) return &amx::kernel<E>;
#else
#define PICK_TILES(kernel, E)
#endif
#if defined(WITH_AVX512_BF16)
#define PICK_PRODUCTS(kernel, E)                                                 \
  [] {                                                                           \
    if constexpr (sizeof(E) == 2) {                                              \
      PICK_TILES(kernel, E)                                                      \
      if (cpu::current() >= cpu::AVX512_BF16) return &avx512_bf16::kernel<E>;    \
    }                                                                            \
    return PICK(kernel<E>);                                                      \
  }()
#else
#define PICK_PRODUCTS(kernel, E) PICK(kernel<E>)
#endif
