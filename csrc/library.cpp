// Every op of the compiled library. Written against torch's stable ABI: one binary for every torch from 2.10 on and
// every Python. The ops check nothing again; contracts, checks and gradients are in lcikernels/ops.
// Each one's implementation registers itself in the file of its name.

#include <torch/csrc/stable/library.h>

#include <string>

#include "checks.h"
#include "cpu/dispatch.h"

namespace {

std::string instruction_set() { return cpu::NAMES[cpu::current()]; }

void use_instruction_set(std::string name) {
  std::string have;
  for (int isa = 0; isa <= cpu::best(); isa++) {
    if (name == cpu::NAMES[isa]) {
      cpu::current() = static_cast<cpu::Isa>(isa);
      return;
    }
    have += std::string(isa ? ", " : "one of ") + cpu::NAMES[isa];
  }
  checks::refuse("use_instruction_set", "name", have, name);
}

}  // namespace

STABLE_TORCH_LIBRARY(lcikernels_cpp, m) {
  // which build of the CPU kernels runs: of NAMES in cpu/dispatch.h; at first the best that the machine has
  m.def("instruction_set() -> str");
  m.def("use_instruction_set(str name) -> ()");

  // Of x, dt, z and dy either channels or tokens lie side by side, b and c anyhow; outputs and gradients lie likewise.
  // checkpoints [T / 32, B, N, D], rounded up: the state that enters every 32nd token of a row; [0, ...] unless kept
  m.def(
      "selective_scan_forward(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? dt_bias,"
      " bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens, bool keep_checkpoints)"
      " -> (Tensor y, Tensor final_state, Tensor checkpoints)");
  // dd, dz and ddt_bias are [0] where d, z and dt_bias are None
  m.def(
      "selective_scan_backward(Tensor dy, Tensor? dfinal_state, Tensor checkpoints, Tensor x, Tensor dt, Tensor a,"
      " Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? initial_state,"
      " Tensor? cu_seqlens) -> (Tensor dx, Tensor ddt, Tensor da, Tensor db, Tensor dc, Tensor dd, Tensor dz,"
      " Tensor ddt_bias, Tensor dinitial_state)");
  // of parts of a sequence that run at once, [B, parts, D, N], first to last
  m.def(
      "selective_scan_crossing(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor? dt_bias, bool dt_softplus)"
      " -> (Tensor added, Tensor left)");
  m.def(
      "selective_scan_crossing_back(Tensor dy, Tensor dt, Tensor a, Tensor c, Tensor? z, Tensor? dt_bias,"
      " bool dt_softplus) -> (Tensor added, Tensor left)");
  // how many tasks torch's threads share, of S sequences of T tokens, D channels in G groups
  m.def("selective_scan_tasks(int S, int T, int D, int G) -> int");
  // Steps advance `state` [B, ...], of any strides that their files name, in what is computed in or bfloat16; with
  // state_indices, int64 [B], states [S, ...]: token b has state state_indices[b], none where that is negative.
  // x, dt, z [B, D], b, c [B, G, N], state [B, D, N]
  m.def(
      "selective_scan_step(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? dt_bias,"
      " bool dt_softplus, Tensor(a!) state, Tensor? state_indices) -> Tensor");

  // q, k, v, grad_o with a contiguous last axis
  m.def(
      "retention_forward(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? initial_state,"
      " Tensor? cu_seqlens) -> (Tensor o, Tensor final_state)");
  // dlog_decay is one number, any, unless needed
  m.def(
      "retention_backward(Tensor grad_o, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor log_decay,"
      " float scale, Tensor? initial_state, Tensor? cu_seqlens, bool need_log_decay)"
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dinitial_state)");
  // y and z are k and v, or, back, q and grad_o
  m.def(
      "retention_tasks(Tensor q, Tensor k, Tensor v, Tensor log_decay) -> (int forward, int backward,"
      " int backward_without_rates)");
  m.def("retention_crossing(Tensor y, Tensor z, Tensor log_decay, float scale, bool back) -> Tensor added");
  // q [B, Hq, K], k [B, Hk, K], v [B, Hv, V], state [B, H, K, V]
  m.def(
      "retention_step(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor(a!) state, float scale,"
      " Tensor? state_indices) -> Tensor");

  // x and dy as the scan's, y and dx like x; weight and bias in what the kernel computes with; S is B, or N of
  // cu_seqlens [N+1]
  m.def(
      "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state,"
      " Tensor? cu_seqlens) -> (Tensor y, Tensor final_state)");
  // dbias is [0] where bias is None
  m.def(
      "causal_conv1d_backward(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, bool silu,"
      " Tensor? initial_state, Tensor? cu_seqlens)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  // x [B, D], state [B, D, slots]; circular where positions, int64 [B], tell the numbers of the tokens
  m.def(
      "causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor(a!) state, Tensor? state_indices,"
      " Tensor? positions) -> Tensor");

  // x and gate [rows, D] with a contiguous last axis; a bias comes with a weight, what is centred with both
  m.def(
      "gated_rms_norm_forward(Tensor x, Tensor? gate, Tensor? weight, Tensor? bias, float eps, int groups,"
      " bool gate_first, bool silu, bool centred) -> Tensor");
  // dgate, dweight and dbias are [0] where gate, weight and bias are None
  m.def(
      "gated_rms_norm_backward(Tensor dy, Tensor x, Tensor? gate, Tensor? weight, Tensor? bias, float eps, int groups,"
      " bool gate_first, bool silu, bool centred) -> (Tensor dx, Tensor dgate, Tensor dweight, Tensor dbias)");

  // On a GPU where the library was built with nvcc. All contiguous; float32 products in tf32 where asked, there.
  m.def(
      "kronecker_expand_forward(Tensor weight, Tensor write, Tensor read, Tensor? depth, bool added, bool tf32)"
      " -> Tensor");
  // dweight and ddepth are [0] unless needed and where depth is None
  m.def(
      "kronecker_expand_backward(Tensor grad_out, Tensor weight, Tensor write, Tensor read, Tensor? depth,"
      " bool added, bool tf32, bool need_weight) -> (Tensor dweight, Tensor dwrite, Tensor dread, Tensor ddepth)");
}

STABLE_TORCH_LIBRARY_IMPL(lcikernels_cpp, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("use_instruction_set", TORCH_BOX(&use_instruction_set));
}
