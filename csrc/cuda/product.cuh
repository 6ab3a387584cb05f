// C[z] = sum_s A[z, s] B[z, s]: products of stacks of matrices.
//
// A is [rows, depth], B [depth, columns]. A block of 128 threads makes one TILE x TILE of C. Both operands are the same
// to it: `outer` (rows of A, columns of B) times `depth`, either of which is the contiguous axis in memory. 64 bytes of
// depth a stage, four stages in flight; sums are float32, in an order that depends on nothing but the sizes and the
// GPU.
#pragma once

#include "mma.cuh"

namespace gpu {

// The axis of an operand whose elements are neighbours in memory.
enum class Along { DEPTH, OUTER };

// Strides in elements. The row is what the contiguous axis makes.
struct Operand {
  const void* data;
  int64_t row, layer, segment;
  Along along;
};

struct Product {
  Operand a, b;
  void* c;                      // elements, or float32 where `sum`
  int64_t c_row, c_layer;
  Operand plus;                 // elements that a product is added to before it is rounded; may be c, or null
  int64_t rows, columns;
  int64_t depth, whole_depth;   // of a segment, and of all segments together: the last may be shorter
  int64_t segments;             // of all layers where `split`, else of each
  int64_t split;                // 0, or segments of each layer: layer z sums segments z * split and on
  bool a_vectors, b_vectors, c_vectors;  // rows begin at multiples of 16 bytes; those of c and plus
  bool sum, add;                // C is float32; C += where `add`
};

template <Arithmetic KIND>
struct Kind {
  using Element = uint16_t;
  static constexpr int STEP = 16;  // depth of one instruction
};
template <>
struct Kind<Arithmetic::TF32> {
  using Element = uint32_t;
  static constexpr int STEP = 8;
};
template <>
struct Kind<Arithmetic::FLOAT32> {
  using Element = uint32_t;
  static constexpr int STEP = 4;
};

constexpr int THREADS = 128, STAGES = 4, STAGE_BYTES = 64;  // a stage is 64 bytes deep
constexpr int AT_ONCE = 3;  // blocks of the small tile on a multiprocessor, at least
constexpr int shared_bytes(int tile) { return STAGES * 2 * tile * STAGE_BYTES; }

// tf32 products see the first 10 bits of a fraction: that would make numbers smaller by half a unit on average, and all
// products by 0.07 %. So they are made larger before, by 0.35 to 0.7 units, half a unit on average. What has only 10
// bits stays what it is, and so do NaN and infinity.
constexpr float BEFORE_A_CUT = 1 + 0.35f / 1024;

// A stage of an operand in shared memory, in chunks of 16 bytes. Chunks of a row change places from row to row: what 8
// lanes read at once lies in 8 different places of a line of 128 bytes.
template <typename Number, int TILE, Along CONTIGUOUS>
struct Stage {
  using Element = Number;
  static constexpr Along ALONG = CONTIGUOUS;
  static constexpr int BYTES = TILE * STAGE_BYTES;
  static constexpr int VECTOR = 16 / sizeof(Element);
  static constexpr int DEPTH = STAGE_BYTES / sizeof(Element);
  static constexpr int ROWS = ALONG == Along::DEPTH ? TILE : DEPTH;
  static constexpr int CHUNKS = (ALONG == Along::DEPTH ? DEPTH : TILE) / VECTOR;  // of a row

  static __device__ int place(int row, int chunk) {
    const int turn = ALONG == Along::DEPTH ? row >> 1 & 3 : sizeof(Element) == 2 ? row & 7 : (row & 3) << 1;
    return (row * CHUNKS + (chunk ^ turn)) * 16;
  }

  // From `from` on, of which `outer` and `depth` are left; zeros beyond.
  static __device__ void load(char* stage, const Element* from, int64_t row, int64_t outer, int64_t depth,
                              bool vectors) {
    const int rows = static_cast<int>(min(ALONG == Along::DEPTH ? outer : depth, int64_t{ROWS}));
    const int columns =
        static_cast<int>(min(ALONG == Along::DEPTH ? depth : outer, int64_t{CHUNKS * VECTOR}));
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
      const int r = (threadIdx.x + i * THREADS) / CHUNKS, chunk = (threadIdx.x + i * THREADS) % CHUNKS;
      const int left = r < rows ? max(0, min(VECTOR, columns - chunk * VECTOR)) : 0;
      const Element* x = left ? from + r * row + chunk * VECTOR : from;
      char* to = stage + place(r, chunk);
      if (vectors) {
        copy(to, x, left * static_cast<int>(sizeof(Element)));
      } else {
        for (int e = 0; e < VECTOR; e++) reinterpret_cast<Element*>(to)[e] = e < left ? x[e] : Element{0};
      }
    }
  }

  // 16 of outer times one instruction's depth, from (outer, depth) on. Lane 4g + t holds the pairs (g, 2t), (g + 8,
  // 2t), (g, 2t + 8), (g + 8, 2t + 8) of 16 bits, or (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4) of 32. That is A's
  // fragment; of B's two it is x[0], x[2] and x[1], x[3].
  static __device__ void fragment(uint32_t (&x)[4], const char* stage, int outer, int depth) {
    const int lane = threadIdx.x % 32;
    if constexpr (ALONG == Along::DEPTH) {
      matrices(x, stage + place(outer + lane % 16, depth / VECTOR + lane / 16));
    } else if constexpr (sizeof(Element) == 2) {
      transposed_matrices(x, stage + place(depth + lane % 8 + lane / 16 * 8, outer / VECTOR + lane / 8 % 2));
    } else {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; i++) {
        const int o = outer + g + i % 2 * 8;
        x[i] = reinterpret_cast<const uint32_t*>(stage + place(depth + t + i / 2 * 4, o / 4))[o % 4];
      }
    }
    if constexpr (sizeof(Element) == 4)
      for (int i = 0; i < 4; i++) x[i] = bits(value(x[i]) * BEFORE_A_CUT);
  }

  // Without tensor cores LANES threads share COUNT * LANES of outer; the i-th that one of them has, so that all of them
  // together read 16-byte chunks that lie in different places.
  template <int LANES>
  static __device__ int own(int lane, int i) {
    return ALONG == Along::DEPTH ? lane + LANES * i : 4 * lane + i % 4 + 4 * LANES * (i / 4);
  }

  // x[i][k], the own ones of COUNT, 4 deep.
  template <int LANES, int COUNT>
  static __device__ void values(float (&x)[COUNT][4], const char* stage, int outer, int depth, int lane) {
    for (int i = 0; i < COUNT; i++) {
      if constexpr (ALONG == Along::DEPTH) {
        const float4 v = *reinterpret_cast<const float4*>(stage + place(outer + own<LANES>(lane, i), depth / 4));
        x[i][0] = v.x, x[i][1] = v.y, x[i][2] = v.z, x[i][3] = v.w;
      } else {  // the i-th quarter of the chunk that holds 4 of outer is read for depth + i % 4
        const int chunk = (outer + own<LANES>(lane, i / 4 * 4)) / 4, k = i % 4;
        const float4 v = *reinterpret_cast<const float4*>(stage + place(depth + k, chunk));
        float(*y)[4] = x + i / 4 * 4;
        y[0][k] = v.x, y[1][k] = v.y, y[2][k] = v.z, y[3][k] = v.w;
      }
    }
  }
};

// A warp's quarter of the tile: what it adds up, and where in the tile it lies.
template <Arithmetic KIND, int TILE, typename A, typename B>
struct Quarter {
  static constexpr int SIZE = TILE / 2, BLOCKS = SIZE / 16;
  float sums[BLOCKS][2 * BLOCKS][4] = {};

  __device__ void add(const char* a, const char* b, int row, int column) {
#pragma unroll
    for (int k = 0; k < A::DEPTH; k += Kind<KIND>::STEP) {
      uint32_t x[BLOCKS][4], y[BLOCKS][4];
#pragma unroll
      for (int i = 0; i < BLOCKS; i++) {
        A::fragment(x[i], a, row + 16 * i, k);
        B::fragment(y[i], b, column + 16 * i, k);
      }
#pragma unroll
      for (int i = 0; i < BLOCKS; i++)
#pragma unroll
        for (int j = 0; j < 2 * BLOCKS; j++) mma<KIND>(sums[i][j], x[i], y[j / 2][j % 2], y[j / 2][j % 2 + 2]);
    }
  }

  // put(row, column, sum) for each. Lane 4g + t holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) of each 16 x
  // 8.
  template <typename Put>
  __device__ void each(int row, int column, Put put) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
#pragma unroll
      for (int j = 0; j < 2 * BLOCKS; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          put(row + 16 * i + g + e / 2 * 8, column + 8 * j + 2 * t + e % 2, sums[i][j][e]);
  }
};

// Without tensor cores: 4 x 8 lanes, each 8 x 4 numbers. A stage is summed by itself first, as an instruction of the
// tensor cores is: one long float32 sum of 10^4 products would lose a digit.
template <int TILE, typename A, typename B>
struct Quarter<Arithmetic::FLOAT32, TILE, A, B> {
  static constexpr int SIZE = TILE / 2, HIGH = SIZE / 4, WIDE = SIZE / 8;
  float sums[HIGH][WIDE] = {};

  __device__ void add(const char* a, const char* b, int row, int column) {
    float stage[HIGH][WIDE] = {};
#pragma unroll
    for (int k = 0; k < A::DEPTH; k += 4) {
      float x[HIGH][4], y[WIDE][4];
      A::template values<4>(x, a, row, k, threadIdx.x % 32 / 8);
      B::template values<8>(y, b, column, k, threadIdx.x % 8);
#pragma unroll
      for (int e = 0; e < 4; e++)
#pragma unroll
        for (int i = 0; i < HIGH; i++)
#pragma unroll
          for (int j = 0; j < WIDE; j++) stage[i][j] += x[i][e] * y[j][e];
    }
#pragma unroll
    for (int i = 0; i < HIGH; i++)
#pragma unroll
      for (int j = 0; j < WIDE; j++) sums[i][j] += stage[i][j];
  }

  template <typename Put>
  __device__ void each(int row, int column, Put put) const {
#pragma unroll
    for (int i = 0; i < HIGH; i++)
#pragma unroll
      for (int j = 0; j < WIDE; j++)
        put(row + A::template own<4>(threadIdx.x % 32 / 8, i), column + B::template own<8>(threadIdx.x % 8, j),
            sums[i][j]);
  }
};

extern __shared__ __align__(1024) char shared[];

// The stages of a block's tile of C, from `row` and `column` on, asked for in order.
template <typename A, typename B>
struct Feed {
  using Element = typename A::Element;
  const Product& p;
  const int64_t rows, columns;   // that are left of C
  const int64_t first, segments;
  const Element *a, *b;
  int64_t s = 0, k = 0;          // the next stage is k deep in segment s

  __device__ Feed(const Product& p, int64_t z, int64_t row, int64_t column)
      : p(p), rows(p.rows - row), columns(p.columns - column), first(z * p.split),
        segments(max(int64_t{0}, p.split ? min(p.split, p.segments - first) : p.segments)),
        a(begin(p.a, z, row)), b(begin(p.b, z, column)) {}

  __device__ const Element* begin(const Operand& x, int64_t z, int64_t outer) const {
    return static_cast<const Element*>(x.data) + z * x.layer + first * x.segment +
           outer * (x.along == Along::DEPTH ? x.row : 1);
  }
  __device__ int64_t stages() const { return segments * ((p.depth + A::DEPTH - 1) / A::DEPTH); }

  // A's first, B's after it; a group of copies, empty where nothing is left, as those who wait count groups.
  __device__ void ask(char* stage) {
    if (s < segments) {
      const int64_t left = min(p.depth, p.whole_depth - (first + s) * p.depth) - k;
      A::load(stage, a + s * p.a.segment + k * (A::ALONG == Along::DEPTH ? 1 : p.a.row), p.a.row, rows, left,
              p.a_vectors);
      B::load(stage + A::BYTES, b + s * p.b.segment + k * (B::ALONG == Along::DEPTH ? 1 : p.b.row), p.b.row, columns,
              left, p.b_vectors);
      k += A::DEPTH;
      if (k >= p.depth) k = 0, s++;
    }
    commit();
  }
};

// Where a tile's sums lie in shared memory, from which threads write whole vectors of a row. Octets change places like
// chunks do.
template <int COLUMNS>
__device__ float* staged(int r, int c) {
  return reinterpret_cast<float*>(shared) + r * COLUMNS + (c ^ (r & 3) << 3);
}

// The staged tile goes to C.
template <Arithmetic KIND, int ROWS, int COLUMNS, int OF_BLOCK>
__device__ void store(const Product& p, int64_t z, int64_t row, int64_t column) {
  using Element = typename Kind<KIND>::Element;
  constexpr int VECTOR = 16 / sizeof(Element);
  for (int i = threadIdx.x * VECTOR; i < ROWS * COLUMNS; i += OF_BLOCK * VECTOR) {
    const int r = i / COLUMNS, c = i % COLUMNS;
    const int left = static_cast<int>(min(int64_t{VECTOR}, p.columns - column - c));
    if (row + r >= p.rows || left <= 0) continue;
    const float* x = staged<COLUMNS>(r, c);
    const int64_t at = z * p.c_layer + (row + r) * p.c_row + column + c;
    if (p.sum) {
      float* y = static_cast<float*>(p.c) + at;
      for (int e = 0; e < left; e++) y[e] = p.add ? y[e] + x[e] : x[e];
      continue;
    }
    Element* y = static_cast<Element*>(p.c) + at;
    const Element* plus = static_cast<const Element*>(p.plus.data);
    if (plus) plus += z * p.plus.layer + (row + r) * p.plus.row + column + c;
    if (p.c_vectors && left == VECTOR) {
      alignas(16) Element vector[VECTOR] = {};
      if (plus) *reinterpret_cast<int4*>(vector) = *reinterpret_cast<const int4*>(plus);
#pragma unroll
      for (int e = 0; e < VECTOR; e++) vector[e] = nearest<KIND>(stored<KIND>(vector[e]) + x[e]);
      *reinterpret_cast<int4*>(y) = *reinterpret_cast<const int4*>(vector);
    } else {
      for (int e = 0; e < left; e++) y[e] = nearest<KIND>((plus ? stored<KIND>(plus[e]) : 0) + x[e]);
    }
  }
}

template <Arithmetic KIND, int TILE, Along A_ALONG, Along B_ALONG>
__global__ void __launch_bounds__(THREADS, TILE == 128 ? 2 : AT_ONCE) product(const Product p) {
  using A = Stage<typename Kind<KIND>::Element, TILE, A_ALONG>;
  using B = Stage<typename Kind<KIND>::Element, TILE, B_ALONG>;
  static_assert(STAGES * 2 * STAGE_BYTES >= TILE * 4, "the tile is staged where the operands were");

  // Neighbouring blocks share columns of B.
  const int64_t tiles = (p.rows + TILE - 1) / TILE, z = blockIdx.z;
  const int64_t row = blockIdx.x % tiles * TILE, column = blockIdx.x / tiles * TILE;
  Feed<A, B> feed(p, z, row, column);
  using Sums = Quarter<KIND, TILE, A, B>;
  const int warp = threadIdx.x / 32, high = warp / 2 * Sums::SIZE, wide = warp % 2 * Sums::SIZE;
  Sums quarter;
  for (int slot = 0; slot < STAGES - 1; slot++) feed.ask(shared + slot * (A::BYTES + B::BYTES));
  int slot = 0;
  for (int64_t i = feed.stages(); i > 0; i--) {
    arrived<STAGES - 2>();
    __syncthreads();  // all threads' copies are there, and nobody reads the slot before this one any more
    feed.ask(shared + (slot + STAGES - 1) % STAGES * (A::BYTES + B::BYTES));
    const char* stage = shared + slot * (A::BYTES + B::BYTES);
    quarter.add(stage, stage + A::BYTES, high, wide);
    slot = (slot + 1) % STAGES;
  }
  arrived<0>();
  __syncthreads();

  quarter.each(high, wide, [&](int r, int c, float x) { *staged<TILE>(r, c) = x; });
  __syncthreads();
  store<KIND, TILE, TILE, THREADS>(p, z, row, column);
}

}  // namespace gpu
