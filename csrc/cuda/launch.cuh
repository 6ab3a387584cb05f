// Launching a kernel, and which kernel a product is.
#pragma once

#include "group_product.cuh"

namespace gpu {

#ifdef __CUDACC__
inline int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, what, device);
  return value;
}
int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

// Capability 9.0, and code for 9.0a in this library: setup.py knows.
bool warp_groups(int device) {
#ifdef WITH_WARP_GROUPS
  return attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
#else
  return false;
#endif
}

// kernel(params) in a grid of blocks x 1 x layers; the name of the error it met, or null.
template <typename Kernel, typename Params>
const char* launch(Kernel kernel, int64_t blocks, int64_t layers, int threads, int shared_bytes, void* stream,
                   Params params) {
  void* arguments[] = {&params};
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess)
    error = cudaLaunchKernel(function, dim3(blocks, 1, layers), threads, arguments, shared_bytes,
                             static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorName(error);
}
#endif

namespace {

int64_t pieces(int64_t size, int64_t of) { return (size + of - 1) / of; }

template <Arithmetic KIND, int TILE>
const char* by_warps(const Product& p, int64_t layers, void* stream) {
  const auto run = [&](auto kernel) {
    const int64_t blocks = pieces(p.rows, TILE) * pieces(p.columns, TILE);
    return launch(kernel, blocks, layers, THREADS, shared_bytes(TILE), stream, p);
  };
  if (p.b.along == Along::DEPTH) return run(product<KIND, TILE, Along::DEPTH, Along::DEPTH>);
  if (p.a.along == Along::DEPTH) return run(product<KIND, TILE, Along::DEPTH, Along::OUTER>);
  return run(product<KIND, TILE, Along::OUTER, Along::OUTER>);
}

template <Arithmetic KIND, int COLUMNS>
const char* by_warp_groups(const Product& p, int64_t layers, void* stream) {
  using Tile = GroupTile<COLUMNS>;
  const auto run = [&](auto kernel) {
    const int64_t blocks = pieces(p.rows, Tile::ROWS) * pieces(p.columns, COLUMNS);
    return launch(kernel, blocks, layers, Tile::THREADS, Tile::SHARED_BYTES, stream, p);
  };
  if (p.b.along == Along::DEPTH) return run(group_product<KIND, COLUMNS, Along::DEPTH, Along::DEPTH>);
  if (p.a.along == Along::DEPTH) return run(group_product<KIND, COLUMNS, Along::DEPTH, Along::OUTER>);
  return run(group_product<KIND, COLUMNS, Along::OUTER, Along::OUTER>);
}

// Large tiles where they give every multiprocessor one; warp groups where rows begin at 16 bytes. A tile 256 wide takes
// 1.5 times as long as one of 128: so many more bytes it reads from the L2 cache, which limits both.
template <Arithmetic KIND>
const char* launch_sized(const Product& p, int64_t layers, int multiprocessors, bool warp_groups, void* stream) {
  const int64_t high = pieces(p.rows, 128) * layers, narrow = pieces(p.columns, 128), wide = pieces(p.columns, 256);
  if (p.rows <= 64 || p.columns <= 64 || high * narrow < multiprocessors) return by_warps<KIND, 64>(p, layers, stream);
  if constexpr (sizeof(typename Kind<KIND>::Element) == 2) {
    if (warp_groups && p.a_vectors && p.b_vectors)
      return high * wide >= multiprocessors && 3 * wide <= 2 * narrow ? by_warp_groups<KIND, 256>(p, layers, stream)
                                                                      : by_warp_groups<KIND, 128>(p, layers, stream);
  }
  return by_warps<KIND, 128>(p, layers, stream);
}

const char* launch(const Product& p, Arithmetic kind, int64_t layers, int multiprocessors, bool warp_groups,
                   void* stream) {
  switch (kind) {
    case Arithmetic::FLOAT32: return by_warps<Arithmetic::FLOAT32, 64>(p, layers, stream);
    case Arithmetic::TF32: return launch_sized<Arithmetic::TF32>(p, layers, multiprocessors, false, stream);
    case Arithmetic::BFLOAT16:
      return launch_sized<Arithmetic::BFLOAT16>(p, layers, multiprocessors, warp_groups, stream);
    default: return launch_sized<Arithmetic::FLOAT16>(p, layers, multiprocessors, warp_groups, stream);
  }
}

}  // namespace
}  // namespace gpu
