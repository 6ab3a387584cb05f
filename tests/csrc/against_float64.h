// Numbers as tensors hold them, and results held against float64. Included by every_kernel.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "elements.h"
#if defined(THREADS)
#include "on_threads.h"
#endif

namespace {

using Exact = std::vector<double>;

thread_local uint64_t seed = 1;
double uniform() {  // in [-1, 1)
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(seed) >> 11) / double(int64_t{1} << 52);
}

// Numbers as a tensor of E holds them, and the same in float64.
template <typename E>
E element(double x) {
  if constexpr (std::is_same_v<E, bf16>) {
    const float f = float(x);
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    return E(x);
  }
}
double number(double x) { return x; }
double number(float x) { return x; }
double number(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

bool counting = false, shortened = false, twice = false;
std::atomic<int> failures{0};

template <typename E>
struct Memory {
  std::vector<E> data;
  Exact exact;

  Memory() {}
  explicit Memory(int64_t size, double scale = 1, double shift = 0) : data(size - shortened), exact(size) {
    for (int64_t i = 0; i < size; i++) {
      const E x = element<E>(uniform() * scale + shift);
      exact[i] = number(x);
      if (i < int64_t(data.size())) data[i] = x;
    }
  }
  operator E*() { return data.data(); }
};
// Not written yet: NaN.
template <typename E>
std::vector<E> unwritten(int64_t size) {
  return std::vector<E>(size, element<E>(NAN));
}

// 64-byte aligned, and not a byte more: NaN.
template <typename R>
std::unique_ptr<R, void (*)(void*)> scratch(int64_t numbers) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, numbers * sizeof(R))) abort();
  memset(memory, -1, numbers * sizeof(R));
  return {static_cast<R*>(memory), free};
}

// Of sums of `terms` products: float64 to 1e-12, float32 to what so many roundings add up to, bfloat16 to one of its
// own, and float32 to that as well where what is multiplied is rounded to it.
constexpr double BF16 = 3.9e-3;
template <typename E>
void check(const char* what, const std::vector<E>& got, const Exact& want, double terms, bool of_bf16 = false) {
  if (counting) return;
  double most = 0, error = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const double off = std::fabs(number(got[i]) - want[i]);
    most = std::fmax(most, std::fabs(want[i]));
    if (!(off <= error)) error = off;  // a NaN is an error
  }
  const double ulp = sizeof(E) == 8 ? 1e-12 : std::sqrt(terms) * 2.4e-7 + (sizeof(E) == 2 || of_bf16 ? BF16 : 0);
  const bool fits = error <= ulp * most && got.size() == want.size();
  failures += !fits;
  std::printf("%s %s, %d bytes an element: error %.1e of %.1e\n", fits ? "ok" : "FAILED", what, int(sizeof(E)),
              error / most, ulp);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double softplus(double x) { return x > 30 ? x : std::log1p(std::exp(x)); }
double silu(double x) { return x * sigmoid(x); }
double silu_slope(double x) { return sigmoid(x) * (1 + x * (1 - sigmoid(x))); }

#if defined(THREADS)
template <typename R, typename Kernel>
void run(int64_t tasks, int64_t numbers, Kernel kernel) {
  op::parallel(tasks << twice, int64_t{1} << 40, numbers * sizeof(R),
               [&](int64_t task, void* memory) { kernel(task >> twice, static_cast<R*>(memory)); });
}

template <typename F>
void at_once(F f) {
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; i++) callers.emplace_back(f);
  for (std::thread& x : callers) x.join();
}
#else
template <typename R, typename Kernel>
void run(int64_t tasks, int64_t numbers, Kernel kernel) {
  auto memory = scratch<R>(numbers);
  for (int again = 0; again < (counting ? 20 : 1); again++)
    for (int64_t task = 0; task < tasks; task++) {
      if (!counting) memory = scratch<R>(numbers);
      kernel(task, memory.get());
    }
}

template <typename F>
void at_once(F f) {
  f();
}
#endif

}  // namespace
