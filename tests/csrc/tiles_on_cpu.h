// AMX's tiles in plain C++, by Intel's description of its instructions, in place of the compiler's intrinsics. A
// program that uses tiles otherwise than it configured them ends.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace tiles {

struct Tile {
  uint8_t row[16][64];
};

struct State {
  int64_t configured = 0, products = 0;
  uint16_t bytes[8];
  uint8_t rows[8];
  Tile tiles[8];

  Tile& at(int tile) {
    if (!configured || tile < 0 || tile > 7 || !rows[tile]) abort();
    return tiles[tile];
  }
};
inline thread_local State state;

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? 0.0f : x; }
inline float widened(const uint8_t* p) {
  uint16_t bits;
  memcpy(&bits, p, 2);
  const uint32_t word = uint32_t(bits) << 16;
  float x;
  memcpy(&x, &word, 4);
  return flushed(x);
}

inline void load_config(const void* shapes) {
  uint8_t bytes[64];
  memcpy(bytes, shapes, 64);
  if (bytes[0] != 1 || bytes[1] != 0) abort();
  for (int i = 2; i < 16; i++)
    if (bytes[i]) abort();
  state.configured++;
  memcpy(state.bytes, bytes + 16, sizeof state.bytes);
  memcpy(state.rows, bytes + 48, sizeof state.rows);
  for (int i = 0; i < 8; i++)
    if (state.bytes[i] > 64 || state.rows[i] > 16) abort();
  memset(state.tiles, 0, sizeof state.tiles);
}

inline void release() { state.configured--; }

inline void zero(int tile) { memset(&state.at(tile), 0, sizeof(Tile)); }

// Rows `stride` bytes apart; the rest of the tile is zero.
inline void load(int tile, const void* base, int64_t stride) {
  Tile& to = state.at(tile);
  memset(&to, 0, sizeof to);
  for (int i = 0; i < state.rows[tile]; i++)
    memcpy(to.row[i], static_cast<const char*>(base) + i * stride, state.bytes[tile]);
}

inline void store(int tile, void* base, int64_t stride) {
  const Tile& from = state.at(tile);
  for (int i = 0; i < state.rows[tile]; i++)
    memcpy(static_cast<char*>(base) + i * stride, from.row[i], state.bytes[tile]);
}

// c [m, n] += a [m, pairs] b [pairs, n], where a and b hold pairs of bfloat16. The first products of all pairs are
// summed, and the second ones, by FMAs; then both are added.
inline void multiply_add(int c, int a, int b) {
  Tile &to = state.at(c), &left = state.at(a), &right = state.at(b);
  const int pairs = state.bytes[a] / 4, columns = state.bytes[c] / 4;
  if (c == a || c == b || a == b || state.rows[c] != state.rows[a] || state.rows[b] != pairs ||
      state.bytes[b] != state.bytes[c])
    abort();
  state.products++;
  for (int m = 0; m < state.rows[c]; m++)
    for (int n = 0; n < columns; n++) {
      float sums[2] = {}, total;
      for (int k = 0; k < pairs; k++)
        for (int i = 0; i < 2; i++) {
          const float x = widened(left.row[m] + 4 * k + 2 * i), y = widened(right.row[k] + 4 * n + 2 * i);
          sums[i] = flushed(std::fma(x, y, sums[i]));
        }
      memcpy(&total, to.row[m] + 4 * n, 4);
      total = flushed(flushed(total) + flushed(sums[0] + sums[1]));
      memcpy(to.row[m] + 4 * n, &total, 4);
    }
}

}  // namespace tiles

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig tiles::load_config
#define _tile_release tiles::release
#define _tile_zero tiles::zero
#define _tile_loadd tiles::load
#define _tile_stored tiles::store
#define _tile_dpbf16ps tiles::multiply_add
