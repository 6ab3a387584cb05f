// LiGO's expansion on a GPU: checks, memory and stream around kronecker_expand.cu.

#include "kronecker_expand.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

#include <tuple>

#include "../checks.h"
#include "../op.h"

// torch has it only where it has CUDA: weak, so that this library loads without.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

using namespace op;

constexpr const char* OP = "kronecker_expand";

gpu::Arithmetic kind(const Tensor& weight, bool tf32) {
  switch (weight.scalar_type()) {
    case ScalarType::BFloat16: return gpu::Arithmetic::BFLOAT16;
    case ScalarType::Half: return gpu::Arithmetic::FLOAT16;
    case ScalarType::Float: return tf32 ? gpu::Arithmetic::TF32 : gpu::Arithmetic::FLOAT32;
    default: checks::refuse(OP, "weight", "Float, BFloat16 or Half", toString(weight.scalar_type()));
  }
}

gpu::KroneckerExpand problem(const Tensor& weight, const Tensor& write, const Tensor& read, const Maybe& depth,
                             bool added, bool tf32) {
  gpu::KroneckerExpand p{};
  p.kind = kind(weight, tf32), p.added = added;
  const auto axes = [&](const Tensor& map) { return map.dim() == 2 || (map.dim() == 3 && !added); };
  if (weight.dim() != 3) checks::refuse(OP, "weight", "[L1, m, n]", "shape " + checks::tuple(weight.sizes()));
  if (!axes(write))
    checks::refuse(OP, "write", added ? "[M-m, m]" : "[M, m] or [L1, M, m]", "shape " + checks::tuple(write.sizes()));
  if (!axes(read))
    checks::refuse(OP, "read", added ? "[N-n, n]" : "[N, n] or [L1, N, n]", "shape " + checks::tuple(read.sizes()));
  if (depth && depth->dim() != 2) checks::refuse(OP, "depth", "[L2, L1]", "shape " + checks::tuple(depth->sizes()));
  p.L1 = weight.size(0), p.m = weight.size(1), p.n = weight.size(2);
  p.own_write = write.dim() == 3, p.own_read = read.dim() == 3;
  const int64_t M = write.size(p.own_write), N = read.size(p.own_read);
  p.M = M + added * p.m, p.N = N + added * p.n, p.L2 = depth ? depth->size(0) : p.L1;
  using checks::Axes, checks::Axis;
  const auto require = [&](const char* name, const Tensor& x, bool own, const Axis& out, const Axis& in) {
    checks::require_like(OP, name, x, weight, own ? Axes{{"L1", p.L1}, out, in} : Axes{out, in});
  };
  require("weight", weight, true, {"m", p.m}, {"n", p.n});
  // Of no added units there is nothing to read.
  if (M || !added) require("write", write, p.own_write, {added ? "M-m" : "M", M}, {"m", p.m});
  if (N || !added) require("read", read, p.own_read, {added ? "N-n" : "N", N}, {"n", p.n});
  if (depth) require("depth", *depth, false, {"L2", p.L2}, {"L1", p.L1});
  p.weight = weight.const_data_ptr(), p.write = write.const_data_ptr(), p.read = read.const_data_ptr();
  p.depth = depth ? depth->const_data_ptr() : nullptr;

  const int32_t device = weight.get_device_index();
  if (!aoti_torch_get_current_cuda_stream) checks::refuse(OP, "torch", "one with CUDA", "one without");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &p.stream));
  p.multiprocessors = gpu::multiprocessors(device), p.warp_groups = gpu::warp_groups(device);
  return p;
}

Tensor empty_like(const Tensor& like, const Shape& sizes) {
  return torch::stable::new_empty(like, sizes, like.scalar_type());
}

// Memory that the kernels have to themselves until they are done: torch gives it to others in stream order only.
Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

void launched(const char* error) {
  if (error) throw std::runtime_error(std::string(OP) + ": CUDA refused a kernel: " + error);
}

Tensor forward(const Tensor& weight, const Tensor& write, const Tensor& read, const Maybe& depth, bool added,
               bool tf32) {
  gpu::KroneckerExpand p = problem(weight, write, read, depth, added, tf32);
  Tensor out = empty_like(weight, {p.L2, p.M, p.N}), memory = workspace(weight, gpu::forward_workspace(p));
  p.out = out.mutable_data_ptr(), p.workspace = memory.mutable_data_ptr();
  launched(gpu::forward(p));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& weight, const Tensor& write,
                                                    const Tensor& read, const Maybe& depth, bool added, bool tf32,
                                                    bool need_weight) {
  gpu::KroneckerExpand p = problem(weight, write, read, depth, added, tf32);
  checks::require_like(OP, "grad_out", grad_out, weight, {{"L2", p.L2}, {"M", p.M}, {"N", p.N}});
  const auto like = [&](const Tensor& x, bool needed) {
    return empty_like(weight, needed ? Shape(x.sizes().begin(), x.sizes().end()) : Shape{0});
  };
  Tensor dweight = like(weight, need_weight), dwrite = like(write, true), dread = like(read, true);
  Tensor ddepth = depth ? like(*depth, true) : like(weight, false);
  Tensor memory = workspace(weight, gpu::backward_workspace(p));
  p.need_weight = need_weight;
  p.grad_out = grad_out.const_data_ptr(), p.workspace = memory.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr(), p.dwrite = dwrite.mutable_data_ptr(), p.dread = dread.mutable_data_ptr();
  p.ddepth = ddepth.mutable_data_ptr();
  launched(gpu::backward(p));
  return {dweight, dwrite, dread, ddepth};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcikernels_cpp, CUDA, m) {
  m.impl("kronecker_expand_forward", TORCH_BOX(&forward));
  m.impl("kronecker_expand_backward", TORCH_BOX(&backward));
}
