// What the selective scan's kernels read and write. No torch here: kernel files include this.
#pragma once

#include <cstdint>

struct SelectiveScan {
  int64_t B, T, D, G, N;           // B rows of T tokens; D channels in G groups of D / G; N states a channel
  int64_t S;                       // sequences: the B rows, or those packed into the one row
  int64_t split;                   // channels one task owns, at most
  bool dt_softplus;

  const float *x, *dt, *z;         // [B, T, D]        z may be null
  const float *a;                  // [D, N]
  const float *b, *c;              // [B, T, G, N]
  const float *d, *dt_bias;        // [D]              either may be null
  const float* initial_state;      // [S, D, N]        may be null: zero
  const int32_t* cu_seqlens;       // [S + 1]          may be null: nothing is packed
  float* checkpoints;              // [ceil(T / CHUNK), B, N, D]: the state that enters every CHUNK-th token of a row;
                                   // written by the forward pass unless null, read by the backward pass
  // Forward.
  float* y;                        // [B, T, D]
  float* final_state;              // [S, D, N]

  // Backward. Where tasks add to one gradient, each writes a layer and the caller sums the layers, in order.
  const float *dy, *dfinal_state;  // [B, T, D], [S, D, N]; dfinal_state may be null: zero
  float *dx, *ddt, *dz;            // [B, T, D]        dz is null where z is
  float *db, *dc;                  // [splits, B, T, G, N]
  float* da;                       // [S, D, N]
  float *dd, *ddt_bias;            // [S, D]
  float* dinitial_state;           // [S, D, N]

  static constexpr int64_t CHUNK = 32;

  int64_t splits() const { return (D / G + split - 1) / split; }
  int64_t tasks() const { return S * G * splits(); }
};

// Each works through tasks [begin, end) and owns `scratch`, which holds selective_scan_scratch() floats, 64-byte aligned.
#define DECLARE(isa)                                                                                   \
  namespace isa {                                                                                      \
  int64_t selective_scan_scratch(const SelectiveScan&, bool backward);                                 \
  void selective_scan_forward(const SelectiveScan&, int64_t begin, int64_t end, float* scratch);       \
  void selective_scan_backward(const SelectiveScan&, int64_t begin, int64_t end, float* scratch);      \
  }
DECLARE(base)
DECLARE(avx2)
DECLARE(avx512)
#undef DECLARE
