// What every op needs between torch and its kernels: memory, element types, threads.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/elements.h"
#include "cpu/states.h"
#include "cpu/tokens.h"

namespace op {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

template <typename Element>
inline constexpr ScalarType TYPE = ScalarType::Float;
template <>
inline constexpr ScalarType TYPE<double> = ScalarType::Double;
template <>
inline constexpr ScalarType TYPE<bf16> = ScalarType::BFloat16;

template <typename Element>
Element* out(const Tensor& x) {
  return static_cast<Element*>(x.mutable_data_ptr());
}
template <typename Element>
const Element* in(const Tensor& x) {
  return static_cast<const Element*>(x.const_data_ptr());
}
template <typename Element>
const Element* in(const Maybe& x) {
  return x ? in<Element>(*x) : nullptr;
}

// Asks for large pages where memory of several MB holds them whole, before it is touched for the first time.
inline void in_large_pages(void* memory, int64_t bytes) {
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory), first = (start + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (start + bytes) / PAGE * PAGE;
  if (first + PAGE < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

template <typename Element>
Tensor empty(const Tensor& like, const Shape& sizes) {
  const Tensor x = torch::stable::new_empty(like, sizes, TYPE<Element>);
  in_large_pages(x.mutable_data_ptr(), x.numel() * sizeof(Element));
  return x;
}

// Whether x [B, T, ..., D] lies as [B, ..., D, T]: as channels_first in lcikernels/ops/checks.py.
inline bool channels_first(const Tensor& x) { return x.dim() > 2 && x.stride(1) == 1 && x.stride(x.dim() - 1) != 1; }

// Memory for what x's [B, T, D] likes are written to, dense, in the order that x lies in.
template <typename Element>
Tensor empty_as(const Tensor& x) {
  if (!channels_first(x)) return empty<Element>(x, {x.size(0), x.size(1), x.size(2)});
  return torch::stable::transpose(empty<Element>(x, {x.size(0), x.size(2), x.size(1)}), 1, 2);
}

// x [B, T, D] where it lies, or one token of each row, [B, D].
template <typename Element>
Tokens<Element> tokens(const Tensor& x) {
  auto* data = const_cast<Element*>(in<std::remove_const_t<Element>>(x));
  if (x.dim() == 2) return {data, x.stride(0), 0, 1};
  return {data, x.stride(0), x.stride(1), x.size(2) == 1 ? 1 : x.stride(2)};
}
template <typename Element>
Tokens<Element> tokens(const Maybe& x) {
  return x ? tokens<Element>(*x) : Tokens<Element>{};
}

// x [B, T, heads, width] where it lies, with a contiguous last axis, or one token of each row, [B, heads, width].
template <typename Element>
Heads<const Element> heads(const Tensor& x) {
  if (x.dim() == 3) return {in<Element>(x), x.stride(0), 0, x.stride(1)};
  return {in<Element>(x), x.stride(0), x.stride(1), x.stride(2)};
}

// The sum over the first axis, in order.
inline Tensor total(const Tensor& layers) {
  const Shape first = {0};
  return layers.size(0) == 1 ? torch::stable::select(layers, 0, 0) : torch::stable::sum(layers, first);
}

// f(Element{}) for the element type of the activations `x`.
template <typename F>
auto with_element(const char* name, const char* argument, const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bf16{});
    default: checks::refuse(name, argument, "Float, Double or BFloat16", toString(x.scalar_type()));
  }
}

// f(S{}) for the element type of the states of a step: of its arithmetic, E's, or bfloat16.
template <typename E, typename F>
auto with_state(const Tensor& state, F f) {
  if constexpr (sizeof(Real<E>) == sizeof(float))
    if (state.scalar_type() == ScalarType::BFloat16) return f(bf16{});
  return f(Real<E>{});
}

// The states [B, ...] of B tokens, or those of [S, ...] that `rows` names for them, none where that is negative.
template <typename S>
States<S> states(const Tensor& state, const Maybe& rows) {
  States<S> states{out<S>(state), in<int64_t>(rows), state.stride(0), {}};
  for (int64_t i = 1; i < state.dim(); i++) states.strides[i - 1] = state.stride(i);
  return states;
}

// Memory of the calling thread, 64-byte aligned, kept for the next call: fresh pages cost 0.25 us a KiB.
inline void* scratch(int64_t bytes) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset(new char[bytes + 64]);
    size = bytes;
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
}

// kernel(task, scratch) for each task, on torch's threads; each takes the next task when it has done one, so that a
// thread that the machine holds up does less. `work` is what all tasks do, in vector operations: below 20000, some
// 10 us, waking another thread costs more than it does.
template <typename Kernel>
void parallel(int64_t tasks, int64_t work, int64_t scratch_bytes, Kernel kernel) {
  std::atomic<int64_t> next{0};
  const auto worker = [&](int64_t, int64_t) {
    void* memory = scratch(scratch_bytes);
    for (int64_t task; (task = next++) < tasks;) kernel(task, memory);
  };
  const int64_t threads = std::min<int64_t>({tasks, torch::stable::get_num_threads(), 1 + work / 20000});
  if (threads < 2) return worker(0, 1);
  torch::stable::parallel_for(0, threads, 1, worker);
}

}  // namespace op
