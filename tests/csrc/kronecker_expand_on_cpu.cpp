// csrc/cuda/kronecker_expand.cu and what calls it, on the CPU: lcikernels_cpp's ops for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "../../csrc/op.h"
#include "cuda_on_cpu.h"
// after it: CUDA source
#include "../../csrc/cuda/kronecker_expand.cu"
// and what registers it, for the CPU
#undef threadIdx
#undef blockIdx
#define CUDA CPU
#include "../../csrc/cuda/kronecker_expand.cpp"

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
