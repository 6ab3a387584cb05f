// A block of a GPU on one core: CUDA source that is compiled as C++ after this header runs as it would there, as far as
// its results can tell.
//
// Each thread is a fiber, and runs until it has to wait. A warp goes as far as it can before the next one starts, the
// last one first after every other barrier, so that a missing barrier shows. Lanes of a warp meet where PTX has them do
// something together. Copies to shared memory arrive when they are waited for and not before, and shared memory that
// nobody wrote is NaN. A misaligned address, or lanes that wait for different things, are an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/cuda/kronecker_expand.h"

#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Index {
  unsigned x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
template <typename T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

namespace gpu {

constexpr int MOST_THREADS = 1024, WARP = 32, STACK = 1 << 16, SHARED = 227 << 10, CANARY = 64;
alignas(1024) char shared[SHARED + CANARY];
char shown[SHARED];                 // of it to products of warp groups
int readers[SHARED / 16];           // of its chunks, among these
Index block, thread;                // blockIdx, threadIdx of the fiber that runs
const char* failure = nullptr;      // of this launch
// A mistake that every kernel makes, for tests that it is seen.
enum Mistake { NONE, COPIES_LEFT, PRODUCTS_LEFT, NOT_SHOWN, NOT_FENCED, SWIZZLE, LEADING, STRIDE } mistake = NONE;

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};
struct Products {                   // of a warp group, a lane's share
  std::vector<float> sums;
  std::vector<int> reads;
  int group;
};
struct Fiber {
  enum { NEW, READY, AT_BARRIER, WITH_WARP, DONE } state;
  std::unique_ptr<char[]> stack{new char[STACK]};
  jmp_buf here;
  std::vector<Copy> copies;               // under way
  int groups;                             // committed
  std::vector<void*> arrivals;            // copies that products of warp groups do not see yet
  std::vector<Products> products;         // under way
  int product_groups;                     // committed
  bool fenced;                            // since the last wait
  float* sums_of;                         // where they add to; NaN until they are done
  std::vector<float> sums;                // what is there
  void (*together)(void* const (&lanes)[WARP]);
  void* lane;                             // what this lane brings to it

  void reset() {
    state = NEW, groups = product_groups = 0, fenced = false;
    copies.clear(), arrivals.clear(), products.clear();
  }
};

std::vector<Fiber> fibers;
Fiber* current;
jmp_buf scheduler;
ucontext_t home;
void (*run_thread)();

inline void wait(decltype(Fiber::state) what) {
  Fiber* self = current;
  self->state = what;
  const Index index = thread;
  if (!_setjmp(self->here)) _longjmp(scheduler, 1);
  thread = index;
}

inline void require(bool fits, const char* otherwise) {
  if (!fits && !failure) failure = otherwise;
}

inline void begin() {
  run_thread();
  current->state = Fiber::DONE;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned index) {
  current = &fibers[index];
  if (_setjmp(scheduler)) return;
  if (current->state == Fiber::READY) _longjmp(current->here, 1);
  thread = {index, 0, 0};
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = current->stack.get();
  start.uc_stack.ss_size = STACK - index % 32 * 320;  // or all stacks would lie in the same few sets of the cache
  start.uc_link = &home;
  makecontext(&start, begin, 0);
  setcontext(&start);
}

// All threads of one block, until they are done or will never be.
inline void run_block(unsigned threads, int shared_bytes) {
  memset(shared, 0xff, sizeof(shared));  // NaN in every type
  memset(shown, 0xff, sizeof(shown));
  memset(readers, 0, sizeof(readers));
  for (unsigned i = 0; i < threads; i++) fibers[i].reset();
  const unsigned warps = threads / WARP;
  bool backwards = false;
  for (;;) {
    for (unsigned w = 0; w < warps; w++) {
      const unsigned first = (backwards ? warps - 1 - w : w) * WARP;
      for (bool met = true; met;) {
        met = true;
        for (unsigned i = first; i < first + WARP; i++) {
          if (fibers[i].state <= Fiber::READY) resume(i);
          met = met && fibers[i].state == Fiber::WITH_WARP && fibers[i].together == fibers[first].together;
        }
        if (!met) break;
        void* lanes[WARP];
        for (int i = 0; i < WARP; i++) lanes[i] = fibers[first + i].lane, fibers[first + i].state = Fiber::READY;
        fibers[first].together(lanes);
      }
    }
    unsigned done = 0, waiting = 0;
    for (unsigned i = 0; i < threads; i++)
      done += fibers[i].state == Fiber::DONE, waiting += fibers[i].state == Fiber::AT_BARRIER;
    if (done == threads) break;
    if (done + waiting < threads) return require(false, "lanes of a warp wait for different things");
    for (unsigned i = 0; i < threads; i++)
      if (fibers[i].state == Fiber::AT_BARRIER) fibers[i].state = Fiber::READY;
    backwards = !backwards;
  }
  for (int i = shared_bytes; i < shared_bytes + CANARY; i++)
    require(shared[i] == char(0xff), "written beyond shared memory");
}

inline bool in_shared(const void* x) { return x >= shared && x < shared + SHARED; }
inline uint32_t address(const void* x) { return static_cast<uint32_t>(static_cast<const char*>(x) - shared); }
inline bool is_aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }

inline void copy(void* to, const void* from, int bytes) {
  require(is_aligned(to) && is_aligned(from) && in_shared(to), "cp.async of an address that does not fit");
  require(bytes >= 0 && bytes <= 16, "cp.async of more than 16 bytes");
  require(!readers[(static_cast<char*>(to) - shared) / 16], "cp.async to what products read");
  current->copies.push_back({to, from, bytes, current->groups});
}
inline void commit() { current->groups++; }
template <int LEFT>
void arrived() {
  size_t later = 0;
  for (const Copy& x : current->copies) {
    if (x.group >= current->groups - LEFT - (mistake == COPIES_LEFT)) {
      current->copies[later++] = x;
      continue;
    }
    memset(x.to, 0, 16);
    if (x.bytes) memcpy(x.to, x.from, x.bytes);  // else from may be null
    current->arrivals.push_back(x.to);
  }
  current->copies.resize(later);
}

inline void meet(void (*together)(void* const (&)[WARP]), void* lane) {
  current->together = together, current->lane = lane;
  wait(Fiber::WITH_WARP);
}

struct Matrices {
  uint32_t* x;
  const char* row;
};
// Matrix q has its rows where lanes 8q to 8q + 7 point. Lane l gets words l % 4 of its row l / 4, or, transposed,
// columns l / 4 of its rows 2 (l % 4) and 2 (l % 4) + 1.
template <bool TRANSPOSED>
void load(void* const (&lanes)[WARP]) {
  const auto row = [&](int q, int r) { return static_cast<Matrices*>(lanes[8 * q + r])->row; };
  for (int l = 0; l < WARP; l++) {
    require(is_aligned(row(l / 8, l % 8)) && in_shared(row(l / 8, l % 8)), "ldmatrix of an address that does not fit");
    for (int q = 0; q < 4; q++) {
      uint16_t halves[2];
      for (int e = 0; e < 2; e++) {
        const int r = TRANSPOSED ? 2 * (l % 4) + e : l / 4, c = TRANSPOSED ? l / 4 : 2 * (l % 4) + e;
        memcpy(halves + e, row(q, r) + 2 * c, 2);
      }
      memcpy(static_cast<Matrices*>(lanes[l])->x + q, halves, 4);
    }
  }
}
inline void matrices(uint32_t (&x)[4], const void* row) {
  Matrices lane = {x, static_cast<const char*>(row)};
  meet(load<false>, &lane);
}
inline void transposed_matrices(uint32_t (&x)[4], const void* row) {
  Matrices lane = {x, static_cast<const char*>(row)};
  meet(load<true>, &lane);
}

inline float value(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
template <Arithmetic KIND>
float number(uint32_t x) {
  if (KIND == Arithmetic::BFLOAT16) return value(x << 16);
  if (KIND == Arithmetic::TF32) return value(x & ~0x1fffu);  // sign, exponent and the first 10 bits of 23
  const uint32_t size = x & 0x7fff, sign = (x & 0x8000) << 16;
  if (size >= 0x7c00) return value(sign | size << 13 | 0x7f800000);
  return value(bits(value(size << 13) * 0x1p112f) | sign);
}
template <Arithmetic KIND>
auto nearest(float x) {
  if constexpr (KIND == Arithmetic::BFLOAT16) {
    return static_cast<uint16_t>(x != x ? 0x7fff : (bits(x) + 0x7fff + (bits(x) >> 16 & 1)) >> 16);
  } else if constexpr (KIND == Arithmetic::FLOAT16) {
    const uint16_t sign = bits(x) >> 16 & 0x8000;
    const double size = std::fabs(double{x});
    if (x != x) return uint16_t{0x7fff};
    if (size >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
    int exponent;
    std::frexp(size, &exponent);                                 // size < 2 ^ exponent
    const int unit = size < 0x1p-14 ? -24 : exponent - 11;
    const int units = std::nearbyint(std::ldexp(size, -unit));   // to even; 2048 are 1024 of the next power's
    return static_cast<uint16_t>(sign | (((unit + 24) << 10) + units));
  } else {
    return bits(x);
  }
}

template <Arithmetic KIND, typename Element>
float stored(Element x) {
  if constexpr (sizeof(Element) == 4) return value(x);
  return number<KIND>(x);
}

struct Mma {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
// Lane 4g + t holds of a rows g (registers 0, 2) and g + 8 (1, 3), of b column g, of c columns 2t and 2t + 1 in rows g
// (0, 1) and g + 8 (2, 3). Depths: 16 bits 2t and 2t + 1, 8 more in the registers after the first two (of a) or one (of
// b); 32 bits t, and 4 more there.
template <Arithmetic KIND>
void multiply(void* const (&lanes)[WARP]) {
  constexpr int PACKED = KIND == Arithmetic::TF32 ? 1 : 2, DEPTH = 8 * PACKED;
  float a[16][DEPTH], b[DEPTH][8];
  for (int l = 0; l < WARP; l++) {
    const Mma& lane = *static_cast<Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < PACKED; e++) {
      const auto part = [&](uint32_t x) { return number<KIND>(PACKED == 1 ? x : x >> 16 * e & 0xffff); };
      for (int i = 0; i < 4; i++) a[g + i % 2 * 8][PACKED * t + e + i / 2 * DEPTH / 2] = part(lane.a[i]);
      for (int i = 0; i < 2; i++) b[PACKED * t + e + i * DEPTH / 2][g] = part(lane.b[i]);
    }
  }
  double c[16][8] = {};
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < DEPTH; k++)
      for (int n = 0; n < 8; n++) c[r][n] += double{a[r][k]} * b[k][n];
  for (int l = 0; l < WARP; l++)
    for (int i = 0; i < 4; i++)
      static_cast<Mma*>(lanes[l])->c[i] += static_cast<float>(c[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2]);
}
template <Arithmetic KIND>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma lane = {c, a, {b0, b1}};
  meet(multiply<KIND>, &lane);
}

template <typename Kernel, typename Params>
const char* launch(Kernel kernel, int64_t blocks, int64_t layers, int threads, int shared_bytes, void*,
                   const Params& p) {
  if (blocks < 1 || blocks >= 1ll << 31 || layers < 1 || layers > 65535 || shared_bytes > SHARED)
    return "cudaErrorInvalidConfiguration";
  if (fibers.empty()) fibers.resize(MOST_THREADS);
  static Kernel running;
  static const Params* params;
  running = kernel, params = &p;
  run_thread = [] { running(*params); };
  failure = nullptr;
  for (block.z = 0; block.z < layers; block.z++)
    for (block.x = 0; block.x < blocks; block.x++) run_block(threads, shared_bytes);
  return failure;
}

inline int multiprocessors(int) { return 2; }

}  // namespace gpu

#define threadIdx gpu::thread
#define blockIdx gpu::block
inline void __syncthreads() { gpu::wait(gpu::Fiber::AT_BARRIER); }
