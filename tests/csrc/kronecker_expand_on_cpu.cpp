// csrc/cuda/kronecker_expand.cu and what calls it, on the CPU: ops of lcikernels_cuda_on_cpu, for lcikernels_cpp has
// kernels of its own for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "../../csrc/op.h"
#include "wgmma_on_cpu.h"
// after it: CUDA source
#include "../../csrc/cuda/kronecker_expand.cu"
// and what registers it, for the CPU
#undef threadIdx
#undef blockIdx
#define CUDA CPU
#define lcikernels_cpp lcikernels_cuda_on_cpu
#include "../../csrc/cuda/kronecker_expand.cpp"

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

void set_gpu(bool warp_groups, int64_t mistake) {
  gpu::has_warp_groups = warp_groups, gpu::mistake = static_cast<gpu::Mistake>(mistake);
}

STABLE_TORCH_LIBRARY(lcikernels_cuda_on_cpu, m) {
  m.def(
      "kronecker_expand_forward(Tensor weight, Tensor write, Tensor read, Tensor? depth, bool added, bool tf32)"
      " -> Tensor");
  m.def(
      "kronecker_expand_backward(Tensor grad_out, Tensor weight, Tensor write, Tensor read, Tensor? depth,"
      " bool added, bool tf32, bool need_weight) -> (Tensor dweight, Tensor dwrite, Tensor dread, Tensor ddepth)");
  m.def("set_gpu(bool warp_groups, int mistake) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lcikernels_cuda_on_cpu, CompositeExplicitAutograd, m) {
  m.impl("set_gpu", TORCH_BOX(&set_gpu));
}
