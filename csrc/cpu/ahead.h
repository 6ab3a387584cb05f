// Memory that a kernel will read soon. Included by kernel files only.
#pragma once

#include "vec.h"

namespace ISA {
namespace {

// Rows on their way to L2 while tiles compute. They lie far apart, where no hardware prefetcher follows: 6 % of
// retention's forward pass at H = 4, K = 128, V = 256, with large pages 11 %.
struct Ahead {
  struct Block {
    const char* row;
    int64_t step, bytes, rows;
  } blocks[6];
  int64_t count = 0;
  // With each tile. Rows of bfloat16 have half of them: 8 then take 2 to 4 % less than 16 in retention's backward pass.
#if defined(__AVX512BF16__)
  static constexpr int64_t LINES = 8;
#else
  static constexpr int64_t LINES = 16;
#endif

  template <typename E>
  void add(const E* first, int64_t step, int64_t rows, int64_t width) {
    const int64_t size = sizeof(E);
    blocks[count++] = {(const char*)first, step * size, width * size, rows};
  }
  void fetch() {
    for (int64_t lines = 0; lines < LINES && count;) {
      Block& last = blocks[count - 1];
      for (int64_t byte = 0; byte < last.bytes; byte += 64, lines++) __builtin_prefetch(last.row + byte, 0, 2);
      last.row += last.step;
      if (--last.rows == 0) count--;
    }
  }
};

}  // namespace
}  // namespace ISA
