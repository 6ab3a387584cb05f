// Causal convolution: memory and threads around the kernels in cpu/causal_conv1d.cpp.

#include "cpu/causal_conv1d.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "caches.h"
#include "cpu/dispatch.h"
#include "op.h"

namespace {

using namespace op;

constexpr const char* OP = "causal_conv1d";
constexpr const char* STEP = "causal_conv1d_step";

// [S, D, W - 1]; where W is 1 there is nothing in it.
template <typename E>
const Real<E>* state(const CausalConv1d<E>& p, const Maybe& x) {
  return p.W > 1 ? in<Real<E>>(x) : nullptr;
}

// What every pass reads. x is [B, T, D], or [B, D] in a step.
template <typename E>
CausalConv1d<E> problem(const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu) {
  CausalConv1d<E> p{};
  p.B = p.S = x.size(0), p.T = x.dim() == 2 ? 1 : x.size(1), p.D = x.size(x.dim() - 1), p.W = weight.size(1);
  p.silu = silu, p.share(torch::stable::get_num_threads());
  p.x = tokens<const E>(x), p.weight = in<Real<E>>(weight), p.bias = in<Real<E>>(bias);
  return p;
}

template <typename E>
CausalConv1d<E> sequences(const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu,
                          const Maybe& initial_state, const Maybe& cu_seqlens) {
  CausalConv1d<E> p = problem<E>(x, weight, bias, silu);
  if (cu_seqlens) p.S = cu_seqlens->size(0) - 1, p.cu_seqlens = in<int32_t>(cu_seqlens);
  p.initial_state = state(p, initial_state);
  return p;
}

// Whether a pass over so many tensors like x goes past the caches.
template <typename E>
bool streams(const CausalConv1d<E>& p, int64_t tensors) {
  return beyond_caches(tensors * p.B * p.T * p.D * sizeof(E), 4);
}

// Vector operations in all tasks of a pass that needs `each` for a vector of 16.
template <typename E>
int64_t work(const CausalConv1d<E>& p, int64_t each) {
  return p.B * p.T * p.D / 16 * each;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu,
                                   const Maybe& initial_state, const Maybe& cu_seqlens) {
  return with_element(OP, "x", x, [&](auto element) {
    using E = decltype(element);
    CausalConv1d<E> p = sequences<E>(x, weight, bias, silu, initial_state, cu_seqlens);
    Tensor y = empty_as<E>(x), final_state = empty<Real<E>>(x, {p.S, p.D, p.W - 1});
    p.y = tokens<E>(y), p.final_state = out<Real<E>>(final_state), p.stream = streams(p, 2);
    const auto kernel = p.x.turned() ? PICK(causal_conv1d_forward_along<E>) : PICK(causal_conv1d_forward<E>);
    parallel(p.tasks(), work(p, p.W + 20), p.scratch() * sizeof(Real<E>),
             [&](int64_t task, void* scratch) { kernel(p, task, static_cast<Real<E>*>(scratch)); });
    return std::make_tuple(y, final_state);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Maybe& dfinal_state, const Tensor& x,
                                                    const Tensor& weight, const Maybe& bias, bool silu,
                                                    const Maybe& initial_state, const Maybe& cu_seqlens) {
  return with_element(OP, "x", x, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    CausalConv1d<E> p = sequences<E>(x, weight, bias, silu, initial_state, cu_seqlens);
    p.dy = tokens<const E>(dy), p.dfinal_state = state(p, dfinal_state);
    Tensor dx = empty_as<E>(x), dinitial_state = empty<R>(x, {p.S, p.D, p.W - 1});
    Tensor dweight = empty<R>(x, {p.B * p.segments(), p.D, p.W}), dbias = empty<R>(x, {p.B * p.segments(), p.D});
    p.dx = tokens<E>(dx), p.dinitial_state = out<R>(dinitial_state);
    p.dweight = out<R>(dweight), p.dbias = out<R>(dbias), p.stream = streams(p, 3);
    const bool along = p.x.turned() || p.dy.turned();
    const auto kernel = along ? PICK(causal_conv1d_backward_along<E>) : PICK(causal_conv1d_backward<E>);
    parallel(p.tasks(), work(p, 3 * p.W + 25), p.scratch() * sizeof(R),
             [&](int64_t task, void* scratch) { kernel(p, task, static_cast<R*>(scratch)); });
    return std::make_tuple(dx, total(dweight), bias ? total(dbias) : empty<R>(x, {0}), dinitial_state);
  });
}

Tensor step(const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu, const Tensor& state,
            const Maybe& state_indices, const Maybe& positions) {
  return with_element(STEP, "x", x, [&](auto element) {
    using E = decltype(element);
    CausalConv1d<E> p = problem<E>(x, weight, bias, silu);
    return with_state<E>(state, [&](auto number) {
      using S = decltype(number);
      S nothing{};  // of each state without slots
      ConvolutionStates<S> states{op::states<S>(state, state_indices), state.size(2), in<int64_t>(positions)};
      if (!states.slots) states.memory = &nothing, states.row = 0;
      Tensor y = empty<E>(x, {p.B, p.D});
      p.y = tokens<E>(y);
      const auto kernel = PICK(causal_conv1d_step<E, S>);
      parallel(p.B * p.blocks(), work(p, 2 * p.W + 20), p.scratch() * sizeof(Real<E>),
               [&](int64_t task, void* scratch) { kernel(p, states, task, static_cast<Real<E>*>(scratch)); });
      return y;
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcikernels_cpp, CPU, m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&backward));
  m.impl("causal_conv1d_step", TORCH_BOX(&step));
}
