// The states that a step advances, of any strides, in the type of its arithmetic or as bfloat16. No torch here: kernel
// files include this.
#pragma once

#include <cstdint>

template <typename S>
struct States {
  S* memory;
  const int64_t* rows;             // [B]: token b has state rows[b], none where that is negative; null: its own
  int64_t row, strides[3];         // elements from a state to the next, and along its axes

  // Of token b; null where it has none. Always inlined: no copy of it is left that needs AVX-512.
  __attribute__((always_inline)) S* of(int64_t b) const {
    const int64_t i = rows ? rows[b] : b;
    return i < 0 ? nullptr : memory + i * row;
  }
};
