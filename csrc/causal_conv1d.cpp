// Causal convolution: checks, memory and threads around the kernels in cpu/causal_conv1d.cpp.

#include "cpu/causal_conv1d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "caches.h"
#include "checks.h"
#include "cpu/dispatch.h"
#include "op.h"

namespace {

using namespace op;
using checks::refuse;
using checks::require;

constexpr const char* OP = "causal_conv1d";
constexpr const char* STEP = "causal_conv1d_step";

// [S, D, W - 1]; where W is 1 there is nothing in it.
template <typename E>
const Real<E>* state(const CausalConv1d<E>& p, const char* op, const char* argument, const Maybe& x) {
  if (!x || p.W == 1) return nullptr;
  require(op, argument, *x, {{"S", p.S}, {"D", p.D}, {"W-1", p.W - 1}}, TYPE<Real<E>>);
  return in<Real<E>>(x);
}

// What every pass reads, checked. x is [B, T, D], or [B, D] in a step.
template <typename E>
CausalConv1d<E> problem(const char* op, const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu) {
  using R = Real<E>;
  const bool step = op == STEP;
  if (x.dim() != (step ? 2 : 3)) refuse(op, "x", step ? "[B, D]" : "[B, T, D]", "shape " + checks::tuple(x.sizes()));
  if (weight.dim() != 2) refuse(op, "weight", "[D, W]", "shape " + checks::tuple(weight.sizes()));
  CausalConv1d<E> p{};
  p.B = p.S = x.size(0), p.T = step ? 1 : x.size(1), p.D = x.size(step ? 1 : 2), p.W = weight.size(1);
  p.silu = silu, p.share(torch::stable::get_num_threads());
  checks::Axes axes = {{"B", p.B}, {"T", p.T}, {"D", p.D}};
  if (step) axes.erase(axes.begin() + 1);
  (step ? checks::require_rows : checks::require_tokens)(op, "x", x, axes, TYPE<E>);
  require(op, "weight", weight, {{"D", p.D}, {"W", p.W}}, TYPE<R>);
  if (bias) require(op, "bias", *bias, {{"D", p.D}}, TYPE<R>);
  p.x = tokens<const E>(x), p.weight = in<R>(weight), p.bias = in<R>(bias);
  return p;
}

template <typename E>
CausalConv1d<E> sequences(const Tensor& x, const Tensor& weight, const Maybe& bias, bool silu,
                          const Maybe& initial_state, const Maybe& cu_seqlens) {
  CausalConv1d<E> p = problem<E>(OP, x, weight, bias, silu);
  if (cu_seqlens) {
    if (p.B != 1)
      refuse(OP, "cu_seqlens", "given only with B=1 (packed sequences share one row)", "B=" + std::to_string(p.B));
    checks::require_boundaries(OP, "cu_seqlens", *cu_seqlens, p.T);
    p.S = cu_seqlens->size(0) - 1, p.cu_seqlens = in<int32_t>(cu_seqlens);
  }
  p.initial_state = state(p, OP, "initial_state", initial_state);
  return p;
}

// Whether a pass over so many tensors like x goes past the caches.
template <typename E>
bool streams(const CausalConv1d<E>& p, int64_t tensors) {
  return beyond_caches(tensors * p.B * p.T * p.D * sizeof(E));
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
    checks::require_tokens(OP, "dy", dy, {{"B", p.B}, {"T", p.T}, {"D", p.D}}, TYPE<E>);
    p.dy = tokens<const E>(dy), p.dfinal_state = state(p, OP, "dfinal_state", dfinal_state);
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
    CausalConv1d<E> p = problem<E>(STEP, x, weight, bias, silu);
    return with_state<E>(state, [&](auto number) {
      using S = decltype(number);
      const int64_t slots = state.dim() == 3 ? state.size(2) : 0;
      if (slots < p.W - 1 || (positions && !slots))
        refuse(STEP, "state", "[B, D, slots] with slots at least " + std::to_string(std::max<int64_t>(p.W - 1, positions ? 1 : 0)),
               "shape " + checks::tuple(state.sizes()));
      if (positions) require(STEP, "positions", *positions, {{"B", p.B}}, ScalarType::Long);
      S nothing{};  // of each state without slots
      ConvolutionStates<S> states{{&nothing, in<int64_t>(state_indices)}, slots, in<int64_t>(positions)};
      if (slots)
        static_cast<States<S>&>(states) =
            op::states<S>(STEP, state, {{"B", p.B}, {"D", p.D}, {"slots", slots}}, state_indices);
      else if (state_indices)
        require(STEP, "state_indices", *state_indices, {{"B", p.B}}, ScalarType::Long);
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
