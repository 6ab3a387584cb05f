// The same products of 16-bit numbers on an H100 or H200, by groups of four warps whose products run while the next
// stage is asked for.
//
// A block of two groups makes 128 rows of C, each group 64 of them in one instruction a step. While the products of a
// stage run, those of the stage before end, and its slot is filled again: two stages multiply, the others arrive.
#pragma once

#include <type_traits>

#include "product.cuh"
#include "wgmma.cuh"

namespace gpu {

// A stage in shared memory: blocks of 64 lines of 128 bytes, 64 of outer times 64 of depth. Chunks of 16 bytes change
// places in a line by its number, as the swizzle of 128 bytes has them, which wants blocks at multiples of 1024.
template <int OUTER, int THREADS, Along CONTIGUOUS>
struct Swizzled {
  using Element = uint16_t;
  static constexpr Along ALONG = CONTIGUOUS;
  static constexpr int DEPTH = 64, LINE = 128, BLOCK = 64 * LINE, EIGHT = 8 * LINE;
  static constexpr int BYTES = OUTER / 64 * BLOCK;
  static constexpr int STEP = ALONG == Along::DEPTH ? 32 : 2 * EIGHT;  // to the next 16 of depth

  // From `from` on, of which `outer` and `depth` are left; zeros beyond. Rows are vectors. Eight threads fill a line,
  // and the next one LINES further on.
  static __device__ void load(char* stage, const Element* from, int64_t row, int64_t outer, int64_t depth, bool) {
    constexpr int LINES = THREADS / 8;
    const int first = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const Element* x = from + first * row + chunk * 8;
    char* to = stage + first * LINE + (chunk ^ first % 8) * 16;
    const int64_t lines = (ALONG == Along::DEPTH ? outer : depth) - first;
    const int64_t numbers = (ALONG == Along::DEPTH ? depth : outer) - chunk * 8;
    const auto each = [&](auto limited) {
#pragma unroll
      for (int line = 0; line < OUTER; line += LINES) {
        const int block = ALONG == Along::DEPTH ? 0 : line / 64 * 64;
        const int64_t left = line - block < lines ? max(int64_t{0}, min(numbers - block, int64_t{8})) : 0;
        const Element* next = x + (line - block) * row + block;
        if (limited.value) copy(to + line * LINE, left ? next : from, 2 * static_cast<int>(left));
        else copy(to + line * LINE, next, 16);
      }
    };
    // Inside of a matrix without the limits, which are half of all instructions.
    if (outer >= OUTER && depth >= DEPTH) each(std::false_type());
    else each(std::true_type());
  }

  // Of 16 deep, `step` of four, from a block of the stage on: where they are, from one block to the next, from eight
  // lines to the next eight, and the swizzle.
  static __device__ uint64_t descriptor(const char* block, int step) {
    const uint64_t start = address(block + step * STEP) >> 4 & 0x3fff;
    return start | uint64_t{BLOCK >> 4} << 16 | uint64_t{EIGHT >> 4} << 32 | uint64_t{1} << 62;
  }
};

template <int COLUMNS>
struct GroupTile {
  static constexpr int ROWS = 128, THREADS = 256;
  static constexpr int BLOCKS = COLUMNS == 256 ? 1 : 2;  // on a multiprocessor
  static constexpr int STAGES = COLUMNS == 256 ? 4 : 3;
  static constexpr int STAGE_BYTES = (ROWS + COLUMNS) * 128, SHARED_BYTES = STAGES * STAGE_BYTES;
};

template <Arithmetic KIND, int COLUMNS, Along A_ALONG, Along B_ALONG>
__global__ void __launch_bounds__(GroupTile<COLUMNS>::THREADS, GroupTile<COLUMNS>::BLOCKS)
    group_product(const Product p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // other GPUs have no such instructions, and launch.cuh does not come here
  using Tile = GroupTile<COLUMNS>;
  using A = Swizzled<Tile::ROWS, Tile::THREADS, A_ALONG>;
  using B = Swizzled<COLUMNS, Tile::THREADS, B_ALONG>;
  constexpr int STAGES = Tile::STAGES;
  static_assert(Tile::STAGE_BYTES == A::BYTES + B::BYTES);
  static_assert(Tile::SHARED_BYTES >= Tile::ROWS * COLUMNS * 4, "the tile is staged where the operands were");

  // Neighbouring blocks share columns of B.
  const int64_t tiles = (p.rows + Tile::ROWS - 1) / Tile::ROWS, z = blockIdx.z;
  const int64_t row = blockIdx.x % tiles * Tile::ROWS, column = blockIdx.x / tiles * COLUMNS;
  Feed<A, B> feed(p, z, row, column);
  const int warp = threadIdx.x / 32, group = warp / 4;
  float sums[COLUMNS / 2] = {};
  for (int slot = 0; slot < STAGES - 2; slot++) feed.ask(shared + slot * Tile::STAGE_BYTES);
  int slot = 0;
  for (int64_t i = feed.stages(); i > 0; i--) {
    arrived<STAGES - 3>();
    show();
    __syncthreads();  // all threads' copies are there, and the products of the stage before the last are finished
    const char* stage = shared + slot * Tile::STAGE_BYTES;
    begin_products();
#pragma unroll
    for (int step = 0; step < A::DEPTH / Kind<KIND>::STEP; step++)
      multiply<KIND, A_ALONG == Along::OUTER, B_ALONG == Along::OUTER>(
          sums, A::descriptor(stage + group * A::BLOCK, step), B::descriptor(stage + A::BYTES, step));
    commit_products();
    feed.ask(shared + (slot + STAGES - 2) % STAGES * Tile::STAGE_BYTES);
    finished<1>();
    slot = (slot + 1) % STAGES;
  }
  arrived<0>();
  finished<0>();
  hold(sums);
  __syncthreads();

  const int lane = threadIdx.x % 32, high = warp * 16 + lane / 4, wide = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; i++) *staged<COLUMNS>(high + i / 2 % 2 * 8, wide + i / 4 * 8 + i % 2) = sums[i];
  __syncthreads();
  store<KIND, Tile::ROWS, COLUMNS, Tile::THREADS>(p, z, row, column);
#endif
}

}  // namespace gpu
