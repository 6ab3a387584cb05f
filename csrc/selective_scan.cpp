// Selective scan: checks, memory and threads around the kernels in cpu/selective_scan.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/selective_scan.h"

namespace {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using checks::require;

constexpr const char* OP = "selective_scan";

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) { return torch::stable::new_empty(like, sizes); }

float* out(const Tensor& x) { return x.mutable_data_ptr<float>(); }
const float* in(const Tensor& x) { return x.const_data_ptr<float>(); }
const float* in(const Maybe& x) { return x ? in(*x) : nullptr; }

// As wide as 16 tasks allow, from 256 channels down to 32: wide tasks sum dB and dC in fewer partials. Never a matter
// of the number of threads, so that a sum has the same order on every machine.
int64_t split(int64_t S, int64_t G, int64_t width) {
  int64_t split = 256;
  while (split > 32 && S * G * ((width + split - 1) / split) < 16) split /= 2;
  return split;
}

// The arguments that both passes read, checked.
SelectiveScan problem(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b, const Tensor& c,
                      const Maybe& d, const Maybe& z, const Maybe& dt_bias, bool dt_softplus,
                      const Maybe& initial_state, const Maybe& cu_seqlens) {
  if (x.dim() != 3) checks::refuse(OP, "x", "[B, T, D]", "shape " + checks::tuple(x.sizes()));
  if (a.dim() != 2) checks::refuse(OP, "a", "[D, N]", "shape " + checks::tuple(a.sizes()));
  if (b.dim() != 4) checks::refuse(OP, "b", "[B, T, G, N]", "shape " + checks::tuple(b.sizes()));
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2), G = b.size(2), N = a.size(1);
  const checks::Axes stream = {{"B", B}, {"T", T}, {"D", D}}, projected = {{"B", B}, {"T", T}, {"G", G}, {"N", N}};
  require(OP, "x", x, stream);
  require(OP, "dt", dt, stream);
  require(OP, "a", a, {{"D", D}, {"N", N}});
  require(OP, "b", b, projected);
  require(OP, "c", c, projected);
  if (D % G) checks::refuse(OP, "b", "such that its groups divide D=" + std::to_string(D), std::to_string(G));
  if (d) require(OP, "d", *d, {{"D", D}});
  if (z) require(OP, "z", *z, stream);
  if (dt_bias) require(OP, "dt_bias", *dt_bias, {{"D", D}});
  if (cu_seqlens) {
    if (B != 1)
      checks::refuse(OP, "cu_seqlens", "given only with B=1 (packed sequences share one row)", "B=" + std::to_string(B));
    checks::require_boundaries(OP, "cu_seqlens", *cu_seqlens, T);
  }
  SelectiveScan p{};
  p.B = B, p.T = T, p.D = D, p.G = G, p.N = N;
  p.S = cu_seqlens ? cu_seqlens->size(0) - 1 : B;
  if (initial_state) require(OP, "initial_state", *initial_state, {{"S", p.S}, {"D", D}, {"N", N}});
  p.split = split(p.S, G, D / G);
  p.dt_softplus = dt_softplus;
  p.x = in(x), p.dt = in(dt), p.z = in(z), p.a = in(a), p.b = in(b), p.c = in(c);
  p.d = in(d), p.dt_bias = in(dt_bias);
  p.initial_state = in(initial_state);
  p.cu_seqlens = cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>() : nullptr;
  return p;
}

int64_t chunks(const SelectiveScan& p) { return (p.T + p.CHUNK - 1) / p.CHUNK; }

template <typename Kernel>
void run(const SelectiveScan& p, Kernel kernel, int64_t scratch_floats) {
  torch::stable::parallel_for(0, p.tasks(), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> memory(new float[scratch_floats + 16]);
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    kernel(p, begin, end, reinterpret_cast<float*>((address + 63) / 64 * 64));
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b,
                                           const Tensor& c, const Maybe& d, const Maybe& z, const Maybe& dt_bias,
                                           bool dt_softplus, const Maybe& initial_state, const Maybe& cu_seqlens,
                                           bool keep_checkpoints) {
  SelectiveScan p = problem(x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens);
  Tensor y = torch::stable::empty_like(x), final_state = empty(x, {p.S, p.D, p.N});
  Tensor checkpoints = empty(x, {keep_checkpoints ? chunks(p) : 0, p.B, p.N, p.D});
  p.y = out(y), p.final_state = out(final_state);
  if (keep_checkpoints) p.checkpoints = out(checkpoints);
  run(p, PICK(selective_scan_forward), PICK(selective_scan_scratch)(p, false));
  return {y, final_state, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Maybe& dfinal_state, const Tensor& checkpoints, const Tensor& x, const Tensor& dt,
    const Tensor& a, const Tensor& b, const Tensor& c, const Maybe& d, const Maybe& z, const Maybe& dt_bias,
    bool dt_softplus, const Maybe& initial_state, const Maybe& cu_seqlens) {
  SelectiveScan p = problem(x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens);
  require(OP, "dy", dy, {{"B", p.B}, {"T", p.T}, {"D", p.D}});
  if (dfinal_state) require(OP, "dfinal_state", *dfinal_state, {{"S", p.S}, {"D", p.D}, {"N", p.N}});
  require(OP, "checkpoints", checkpoints, {{"chunks", chunks(p)}, {"B", p.B}, {"N", p.N}, {"D", p.D}});
  p.dy = in(dy), p.dfinal_state = in(dfinal_state), p.checkpoints = out(checkpoints);

  Tensor dx = torch::stable::empty_like(x), ddt = torch::stable::empty_like(x);
  Tensor dz = z ? torch::stable::empty_like(x) : empty(x, {0});
  const std::vector<int64_t> projected = {p.splits(), p.B, p.T, p.G, p.N};
  Tensor db = empty(x, projected), dc = empty(x, projected), da = empty(x, {p.S, p.D, p.N});
  Tensor dd = empty(x, {p.S, p.D}), ddt_bias = empty(x, {p.S, p.D}), dinitial_state = empty(x, {p.S, p.D, p.N});
  p.dx = out(dx), p.ddt = out(ddt), p.db = out(db), p.dc = out(dc), p.da = out(da);
  p.dd = out(dd), p.ddt_bias = out(ddt_bias), p.dinitial_state = out(dinitial_state);
  if (z) p.dz = out(dz);
  run(p, PICK(selective_scan_backward), PICK(selective_scan_scratch)(p, true));

  const auto total = [](const Tensor& partials) {
    const std::vector<int64_t> layers = {0};
    return partials.size(0) == 1 ? torch::stable::select(partials, 0, 0) : torch::stable::sum(partials, layers);
  };
  // Each missing one is a tensor of its own: an op's outputs must not share memory.
  return {dx, ddt, total(da), total(db), total(dc), d ? total(dd) : empty(x, {0}), dz,
          dt_bias ? total(ddt_bias) : empty(x, {0}), dinitial_state};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcikernels_cpp, CPU, m) {
  m.impl("selective_scan_forward", TORCH_BOX(&forward));
  m.impl("selective_scan_backward", TORCH_BOX(&backward));
}
