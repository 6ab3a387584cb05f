// What tensors hold, and what kernels compute with. No torch here: kernel files include this.
#pragma once

#include <cstdint>

struct bf16 {
  uint16_t bits;
};

// The arithmetic of an element type: float32 inside where activations are bfloat16.
template <typename Element>
struct Arithmetic {
  using Real = Element;
};
template <>
struct Arithmetic<bf16> {
  using Real = float;
};
template <typename Element>
using Real = typename Arithmetic<Element>::Real;
