// LiGO's expansion on a GPU. No torch here: pointers to contiguous device memory, and a stream.
#pragma once

#include <cstdint>

namespace gpu {

enum class Arithmetic { BFLOAT16, FLOAT16, TF32, FLOAT32 };  // what multiplies; sums are float32 in all of them

struct KroneckerExpand {
  Arithmetic kind;
  int64_t L1, L2, m, n, M, N;       // L2 is L1 without depth; M and N are the output's
  bool own_write, own_read;         // one for each old layer
  bool added;                       // write and read have the rows of added units alone: M - m and N - n
  bool need_weight;                 // dweight is asked for
  const void *weight, *write, *read, *depth, *grad_out;  // depth may be null
  void *out, *dweight, *dwrite, *dread, *ddepth;
  void* workspace;                  // of so many bytes as the functions below say
  int multiprocessors;
  bool warp_groups;                 // whether there are products of these
  void* stream;
};

int multiprocessors(int device);
bool warp_groups(int device);
int64_t forward_workspace(const KroneckerExpand& p);
int64_t backward_workspace(const KroneckerExpand& p);
// The name of the CUDA error that launching met, or null.
const char* forward(const KroneckerExpand& p);
const char* backward(const KroneckerExpand& p);

}  // namespace gpu
