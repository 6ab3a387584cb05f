// csrc/cuda/wgmma.cuh on one core: products of a warp group, as strict as PTX allows a GPU to be.
//
// Products see of shared memory what a thread has shown to them, and nothing else. From their start until a wait for
// them, sums are NaN, and a copy to what they read is an error, as is a start without the fence before it.
#pragma once

#include "cuda_on_cpu.h"

#define __CUDA_ARCH_FEAT_SM90_ALL

namespace gpu {

inline void show() {
  if (mistake == NOT_SHOWN) return;
  for (const void* x : current->arrivals) memcpy(shown + (static_cast<const char*>(x) - shared), x, 16);
  current->arrivals.clear();
}

inline void begin_products() { current->fenced = mistake != NOT_FENCED; }
inline void commit_products() { current->product_groups++; }

template <int LEFT>
void finished() {
  current->fenced = false;
  std::vector<Products>& running = current->products;
  const int last = current->product_groups - LEFT - (mistake == PRODUCTS_LEFT);
  size_t done = 0;
  for (; done < running.size() && running[done].group < last; done++) {
    for (size_t i = 0; i < current->sums.size(); i++) current->sums[i] += running[done].sums[i];
    for (int line : running[done].reads) readers[line]--;
  }
  running.erase(running.begin(), running.begin() + done);
  if (done && running.empty()) std::copy(current->sums.begin(), current->sums.end(), current->sums_of);
}

template <int COUNT>
void hold(float (&)[COUNT]) {}

// A matrix of 16-bit numbers, 16 deep, in shared memory: PTX's "matrix descriptor". Lines of as many bytes as the
// swizzle, eight of them in a row; where depth is contiguous a line is one of outer, else one of depth.
struct Described {
  uint64_t bits;
  bool transposed;

  uint32_t field(int first) const { return static_cast<uint32_t>(bits >> first & 0x3fff) << 4; }
  // Byte of shared memory.
  uint32_t at(int outer, int depth) const {
    const int mode = bits >> 62, line = 256 >> mode;  // 1: 128 bytes, 2: 64, 3: 32
    require(mode, "an operand without swizzle");
    require((bits >> 49 & 7) == 0 && !(transposed && field(0) % (8 * line)), "an operand that begins within a pattern");
    const uint32_t leading = field(16), stride = field(32), start = field(0);
    const int wide = line / 2;  // numbers of a line
    const uint32_t along_outer = outer / wide * leading + outer % wide * 2 + depth / 8 * stride + depth % 8 * line;
    const uint32_t along_depth = outer / 8 * stride + outer % 8 * line + depth * 2;
    const uint32_t x = start + (transposed ? along_outer : along_depth);
    return x ^ ((x >> 7 & (line / 16 - 1)) << 4);
  }
};

struct GroupLane {
  Described a, b;
  unsigned warp;
  std::vector<float> sums;
  std::vector<int> reads;
};

// A warp's 16 rows of a group's 64. Lane 4g + t has of each 8 columns (g, 2t), (g, 2t + 1), then (g + 8, 2t) and so on.
template <Arithmetic KIND, int COLUMNS>
void multiply_group(void* const (&lanes)[WARP]) {
  GroupLane& first = *static_cast<GroupLane*>(lanes[0]);
  static float a[16][16], b[16][COLUMNS];
  std::vector<bool> read(SHARED / 16);
  const auto number_at = [&](uint32_t at) {
    uint16_t x = 0x7fff;
    require(at + 2 <= SHARED, "an operand outside of shared memory");
    if (at + 2 <= SHARED) memcpy(&x, shown + at, 2), read[at / 16] = true;
    return number<KIND>(x);
  };
  for (int k = 0; k < 16; k++) {
    for (int r = 0; r < 16; r++) a[r][k] = number_at(first.a.at(first.warp % 4 * 16 + r, k));
    for (int c = 0; c < COLUMNS; c++) b[k][c] = number_at(first.b.at(c, k));
  }
  for (size_t i = 0; i < read.size(); i++)
    if (read[i]) first.reads.push_back(i), readers[i]++;
  static double c[16][COLUMNS];
  memset(c, 0, sizeof c);
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < COLUMNS; n++) c[r][n] += double{a[r][k]} * b[k][n];
  for (int l = 0; l < WARP; l++) {
    GroupLane& lane = *static_cast<GroupLane*>(lanes[l]);
    require(lane.a.bits == first.a.bits && lane.b.bits == first.b.bits, "lanes multiply different operands");
    for (int i = 0; i < COLUMNS / 2; i++)
      lane.sums[i] = static_cast<float>(c[l / 4 + i / 2 % 2 * 8][i / 4 * 8 + l % 4 * 2 + i % 2]);
  }
}

template <Arithmetic KIND, bool A_TRANSPOSED, bool B_TRANSPOSED, int COUNT>
void multiply(float (&c)[COUNT], uint64_t a, uint64_t b) {
  require(current->fenced, "products that no fence came before");
  const uint64_t wrong = mistake == SWIZZLE   ? uint64_t{3} << 62  // 64 bytes
                         : mistake == LEADING ? uint64_t{1024 >> 4} << 16
                         : mistake == STRIDE  ? uint64_t{1024 >> 4} << 32
                                              : 0;
  const Described as{a ^ wrong, A_TRANSPOSED}, bs{b ^ wrong, B_TRANSPOSED};
  GroupLane lane = {as, bs, thread.x / WARP, std::vector<float>(COUNT), {}};
  meet(multiply_group<KIND, 2 * COUNT>, &lane);
  if (current->products.empty()) {
    current->sums_of = c, current->sums.assign(c, c + COUNT);
    for (float& x : c) x = NAN;
  }
  require(current->sums_of == c, "two matrices of sums at once");
  current->products.push_back({std::move(lane.sums), std::move(lane.reads), current->product_groups});
}

// Whether the GPU that is emulated has all this.
inline bool has_warp_groups = false;
inline bool warp_groups(int) { return has_warp_groups; }

}  // namespace gpu
