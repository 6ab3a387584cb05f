// Mixes of layers, and totals of parts: two small kernels around the products.
#pragma once

#include "product.cuh"

namespace gpu {

// y[i] = sum_j depth[i, j] x[j], matrices [rows, columns]. Without depth layer z of the grid is copied.
struct Mix {
  Operand depth, x;
  void* y;
  int64_t y_row, y_layer;
  int64_t to, from, rows, columns;
};

template <typename Element, int COUNT>
struct alignas(COUNT * sizeof(Element)) Vector {
  Element x[COUNT];
};

// A thread makes COUNT numbers of a row, 16 bytes or one, of every new layer, SOME layers at a time. Without tensor
// cores: memory takes an H200 1.8 times as long as the multiplications of 12 layers mixed into 24, and for one new
// layer a tile would be empty but for a row.
template <Arithmetic KIND, int COUNT>
__global__ void __launch_bounds__(THREADS) mix(const Mix p) {
  using Element = typename Kind<KIND>::Element;
  using Numbers = Vector<Element, COUNT>;
  constexpr int SOME = 4;
  const int64_t i = blockIdx.x * int64_t{THREADS} + threadIdx.x, across = p.columns / COUNT;
  const int64_t row = i / across, column = i % across * COUNT, z = blockIdx.z;
  if (row >= p.rows) return;
  const Element* depth = static_cast<const Element*>(p.depth.data);
  const int64_t older = p.depth.along == Along::DEPTH ? 1 : p.depth.row;
  const int64_t newer = p.depth.along == Along::DEPTH ? p.depth.row : 1;
  const Element* x = static_cast<const Element*>(p.x.data) + z * p.x.layer + row * p.x.row + column;
  Element* y = static_cast<Element*>(p.y) + z * p.y_layer + row * p.y_row + column;
  for (int64_t first = 0; first < p.to; first += SOME) {
    float sums[SOME][COUNT] = {};
#pragma unroll 4
    for (int64_t j = 0; j < p.from; j++) {
      const Numbers old = *reinterpret_cast<const Numbers*>(x + j * p.x.layer);
#pragma unroll
      for (int s = 0; s < SOME; s++) {
        const int64_t to = min(first + s, p.to - 1);  // the last one again, where no more are left
        const float d = depth ? stored<KIND>(depth[to * newer + j * older]) : 1;
#pragma unroll
        for (int e = 0; e < COUNT; e++) sums[s][e] += d * stored<KIND>(old.x[e]);
      }
    }
#pragma unroll
    for (int s = 0; s < SOME; s++) {
      Numbers mixed;
#pragma unroll
      for (int e = 0; e < COUNT; e++) mixed.x[e] = nearest<KIND>(sums[s][e]);
      if (first + s < p.to) *reinterpret_cast<Numbers*>(y + (first + s) * p.y_layer) = mixed;
    }
  }
}

// y[r, c] = sum_z parts[z, r, c], in order.
struct Total {
  const float* parts;
  void* y;
  int64_t layers, rows, columns, y_row;
};

template <Arithmetic KIND>
__global__ void __launch_bounds__(THREADS) total(const Total p) {
  const int64_t i = blockIdx.x * int64_t{THREADS} + threadIdx.x, size = p.rows * p.columns;
  if (i >= size) return;
  float sum = 0;
#pragma unroll 32  // as many loads under way
  for (int64_t z = 0; z < p.layers; z++) sum += p.parts[z * size + i];
  using Element = typename Kind<KIND>::Element;
  static_cast<Element*>(p.y)[i / p.columns * p.y_row + i % p.columns] = nearest<KIND>(sum);
}

}  // namespace gpu
