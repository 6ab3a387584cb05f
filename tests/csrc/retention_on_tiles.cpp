// Retention of bfloat16 as it is built for AMX, on tiles in plain C++: lcikernels_cpp's ops as lcikernels_tiles.
#include "tiles_on_cpu.h"
// after it: the kernels for AMX
#define __AMX_BF16__ 1
#include "../../csrc/cpu/retention/backward.cpp"
#include "../../csrc/cpu/retention/crossing.cpp"
#include "../../csrc/cpu/retention/forward.cpp"
#include "../../csrc/cpu/retention/step.cpp"
// and what registers them: none of the other kernels
#include "../../csrc/cpu/dispatch.h"
#undef PICK
#undef PICK_PRODUCTS
#define PICK(...) amx::__VA_ARGS__
#define PICK_PRODUCTS(kernel, E)                           \
  [] {                                                     \
    if constexpr (sizeof(E) == 2)                          \
      return &amx::kernel<E>;                              \
    else                                                   \
      return static_cast<decltype(&amx::kernel<E>)>(0);    \
  }()
#define lcikernels_cpp lcikernels_tiles
#include "../../csrc/library.cpp"
#include "../../csrc/retention.cpp"

// Of the calling thread: how many products it has done, and configurations of tiles that it has not released.
extern "C" __attribute__((visibility("default"))) int64_t tile_products() { return tiles::state.products; }
extern "C" __attribute__((visibility("default"))) int64_t tiles_in_use() { return tiles::state.configured; }
