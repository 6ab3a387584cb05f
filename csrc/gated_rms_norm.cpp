// Gated RMS norm: memory and threads around the kernels in cpu/gated_rms_norm.cpp.

#include "cpu/gated_rms_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "caches.h"
#include "cpu/dispatch.h"
#include "op.h"

namespace {

using namespace op;

constexpr const char* OP = "gated_rms_norm";

template <typename E>
GatedRmsNorm<E> problem(const Tensor& x, const Maybe& gate, const Maybe& weight, const Maybe& bias, double eps,
                        int64_t groups, bool gate_first, bool silu, bool centred) {
  GatedRmsNorm<E> p{};
  p.rows = x.size(0), p.D = x.size(1), p.eps = eps, p.groups = groups, p.channels = p.D / groups;
  p.gate_first = gate_first, p.silu = silu, p.centred = centred;
  p.x_row = x.stride(0), p.gate_row = gate ? gate->stride(0) : 0;
  p.x = in<E>(x), p.gate = in<E>(gate), p.weight = in<Real<E>>(weight), p.bias = in<Real<E>>(bias);
  return p;
}

// Vector operations in all tasks of a pass that needs `each` for a vector of 16.
template <typename E>
int64_t work(const GatedRmsNorm<E>& p, int64_t each) {
  return p.rows * p.groups * p.width() / 16 * each;
}

Tensor forward(const Tensor& x, const Maybe& gate, const Maybe& weight, const Maybe& bias, double eps, int64_t groups,
               bool gate_first, bool silu, bool centred) {
  return with_element(OP, "x", x, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    GatedRmsNorm<E> p = problem<E>(x, gate, weight, bias, eps, groups, gate_first, silu, centred);
    Tensor y = empty<E>(x, {p.rows, p.D});
    p.y = out<E>(y), p.stream = beyond_caches((gate ? 3 : 2) * p.rows * p.D * sizeof(E), 4);
    const auto kernel = PICK(gated_rms_norm_forward<E>);
    parallel(p.tasks(), work(p, gate ? 25 : 5), p.scratch() * sizeof(R),
             [&](int64_t task, void* scratch) { kernel(p, task, static_cast<R*>(scratch)); });
    return y;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Maybe& gate,
                                                    const Maybe& weight, const Maybe& bias, double eps, int64_t groups,
                                                    bool gate_first, bool silu, bool centred) {
  return with_element(OP, "x", x, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    GatedRmsNorm<E> p = problem<E>(x, gate, weight, bias, eps, groups, gate_first, silu, centred);
    p.dy = in<E>(dy);
    Tensor dx = empty<E>(x, {p.rows, p.D}), dgate = gate ? empty<E>(x, {p.rows, p.D}) : empty<E>(x, {0});
    Tensor dweight = weight ? empty<R>(x, {p.tasks(), p.D}) : empty<E>(x, {0});
    Tensor dbias = bias ? empty<R>(x, {p.tasks(), p.D}) : empty<E>(x, {0});
    p.dx = out<E>(dx), p.stream = beyond_caches((gate ? 5 : 3) * p.rows * p.D * sizeof(E), 4);
    if (gate) p.dgate = out<E>(dgate);
    if (weight) p.dweight = out<R>(dweight);
    if (bias) p.dbias = out<R>(dbias);
    const auto kernel = PICK(gated_rms_norm_backward<E>);
    parallel(p.tasks(), work(p, gate ? 40 : 15), p.backward_scratch() * sizeof(R),
             [&](int64_t task, void* scratch) { kernel(p, task, static_cast<R*>(scratch)); });
    return std::make_tuple(dx, dgate, weight ? total(dweight) : dweight, bias ? total(dbias) : dbias);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcikernels_cpp, CPU, m) {
  m.impl("gated_rms_norm_forward", TORCH_BOX(&forward));
  m.impl("gated_rms_norm_backward", TORCH_BOX(&backward));
}
