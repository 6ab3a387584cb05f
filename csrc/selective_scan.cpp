// Selective scan: memory and threads around the kernels in cpu/selective_scan.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "caches.h"
#include "cpu/dispatch.h"
#include "cpu/selective_scan.h"
#include "op.h"

namespace {

using namespace op;

constexpr const char* OP = "selective_scan";
constexpr const char* STEP = "selective_scan_step";

// Channels of a task: as many as leave each thread three tasks, from 256 down to 32, which takes the backward 1.4 times
// as long. Only the order in which dB and dC are summed depends on it, and one thread counts as two: they agree.
int64_t split(int64_t pieces, int64_t width) {
  const int64_t enough = 3 * std::max<int64_t>(2, torch::stable::get_num_threads());
  int64_t split = 256;
  while (split > 32 && pieces * ((width + split - 1) / split) < enough) split /= 2;
  return split;
}

// Where channels are few, parts of a sequence run at once, of at least 256 tokens: each is walked twice, so that a cut
// pays only for more than 8 tasks. Then there are 64. Never a matter of the threads, for the bits of y depend on it.
int64_t segments(int64_t S, int64_t T, int64_t D) {
  const int64_t whole = S * ((D + 31) / 32);
  return whole * 2 > 8 ? 1 : std::clamp<int64_t>(64 / whole, 1, std::max<int64_t>(1, T / 256));
}

template <typename E>
void cut(SelectiveScan<E>& p) {
  p.segments = p.cu_seqlens ? 1 : segments(p.S, p.T, p.D);
  p.length = (p.T / p.segments + p.CHUNK - 1) / p.CHUNK * p.CHUNK;
  p.segments = p.cu_seqlens ? 1 : (p.T + p.length - 1) / p.length;
  p.split = split(p.S * p.segments * p.G, p.D / p.G);
}

// b or c [B, T, N] or [B, T, G, N] where it lies; [B, N] or [B, G, N] of a step.
template <typename E>
Projected<const E> groups(const Tensor& x, int64_t lead) {
  const bool grouped = x.dim() == lead + 2;
  return {in<E>(x), x.stride(0), lead == 2 ? x.stride(1) : 0, grouped ? x.stride(lead) : 0, x.stride(x.dim() - 1)};
}

// Memory for `splits` layers of the gradient of b or c, each in the order that it lies in; and [B, T, G, N] of the
// first.
template <typename E>
Tensor layers(const SelectiveScan<E>& p, const Tensor& x, Projected<Real<E>>& layers) {
  const bool turned = channels_first(x);
  const Tensor memory = turned ? empty<Real<E>>(x, {p.splits(), p.B, p.G, p.N, p.T})
                               : empty<Real<E>>(x, {p.splits(), p.B, p.T, p.G, p.N});
  const int64_t row = p.T * p.G * p.N;
  layers = turned ? Projected<Real<E>>{out<Real<E>>(memory), row, 1, p.N * p.T, p.T}
                  : Projected<Real<E>>{out<Real<E>>(memory), row, p.G * p.N, p.N, 1};
  return memory;
}

// Their sum, in the axes and the dtype of x.
template <typename E>
Tensor summed(const Tensor& memory, const Tensor& x) {
  Tensor sum = total(memory);
  if (sum.scalar_type() != TYPE<E>) sum = torch::stable::to(sum, TYPE<E>);
  const bool grouped = x.dim() == 4;
  if (!channels_first(x)) return torch::stable::view(sum, Shape(x.sizes().begin(), x.sizes().end()));
  if (!grouped) return torch::stable::transpose(torch::stable::select(sum, 1, 0), 1, 2);
  return torch::stable::transpose(torch::stable::transpose(sum, 2, 3), 1, 2);
}

// The arguments that all passes read, of `lead` axes before D: of sequences B, T; of a step B.
template <typename E>
SelectiveScan<E> problem(int64_t lead, const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b,
                         const Tensor& c, const Maybe& d, const Maybe& z, const Maybe& dt_bias, bool dt_softplus) {
  using R = Real<E>;
  SelectiveScan<E> p{};
  p.B = x.size(0), p.T = lead == 2 ? x.size(1) : 1, p.D = x.size(lead), p.N = a.size(1);
  p.G = b.dim() == lead + 2 ? b.size(lead) : 1;
  p.dt_softplus = dt_softplus;
  p.x = tokens<const E>(x), p.dt = tokens<const E>(dt), p.z = tokens<const E>(z), p.a = in<R>(a);
  p.b = groups<E>(b, lead), p.c = groups<E>(c, lead);
  p.d = in<R>(d), p.dt_bias = in<R>(dt_bias);
  return p;
}

// Whole sequences: how they are cut into tasks, too.
template <typename E>
SelectiveScan<E> sequences(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b, const Tensor& c,
                           const Maybe& d, const Maybe& z, const Maybe& dt_bias, bool dt_softplus,
                           const Maybe& initial_state, const Maybe& cu_seqlens) {
  SelectiveScan<E> p = problem<E>(2, x, dt, a, b, c, d, z, dt_bias, dt_softplus);
  p.cu_seqlens = in<int32_t>(cu_seqlens);
  p.S = cu_seqlens ? cu_seqlens->size(0) - 1 : p.B;
  p.initial_state = in<Real<E>>(initial_state);
  cut(p);
  return p;
}

// How many tasks a pass has on torch's threads, for tests to count.
int64_t tasks(int64_t S, int64_t T, int64_t D, int64_t G) {
  SelectiveScan<float> p{};
  p.S = S, p.T = T, p.D = D, p.G = G;
  cut(p);
  return p.tasks();
}

template <typename E>
int64_t chunks(const SelectiveScan<E>& p) {
  return (p.T + p.CHUNK - 1) / p.CHUNK;
}

// Whether a pass over so many tensors like x goes past the caches: where the vectors that it writes are whole lines.
template <typename E>
bool streams(const SelectiveScan<E>& p, int64_t tensors) {
  const bool lines = cpu::current() >= cpu::AVX512 && sizeof(E) == sizeof(Real<E>) && p.D / p.G * sizeof(E) % 64 == 0;
  return lines && beyond_caches(tensors * p.B * p.T * p.D * sizeof(E));
}

template <typename E, typename Kernel>
void run(const SelectiveScan<E>& p, Kernel kernel, int64_t left_out = -1) {
  using R = Real<E>;
  const int64_t bytes = PICK(selective_scan_scratch<E>)(p) * sizeof(R);
  parallel(p.tasks(), p.B * p.T * p.D * p.N, bytes, [&](int64_t task, void* scratch) {
    if (p.segment(task) != left_out) kernel(p, task, static_cast<R*>(scratch));
  });
}

// States [S, segments, D, N] where the segments meet, in order: `edge` at the first, then left * state + added of each.
// In reverse for gradients.
template <typename R>
Tensor chain(const Tensor& added, const Tensor& left, const Maybe& edge, bool reverse) {
  const int64_t S = added.size(0), segments = added.size(1), DN = added.size(2) * added.size(3);
  Tensor states = torch::stable::empty_like(added);
  const R *gain = in<R>(added), *rest = in<R>(left), *first = in<R>(edge);
  R* const state = out<R>(states);
  for (int64_t s = 0; s < S; s++)
    for (int64_t k = 0; k < segments; k++) {
      const int64_t here = s * segments + (reverse ? segments - 1 - k : k), before = here + (reverse ? 1 : -1);
      for (int64_t i = 0; i < DN; i++)
        state[here * DN + i] = k       ? rest[before * DN + i] * state[before * DN + i] + gain[before * DN + i]
                               : first ? first[s * DN + i]
                                       : R(0);
    }
  return states;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b,
                                           const Tensor& c, const Maybe& d, const Maybe& z, const Maybe& dt_bias,
                                           bool dt_softplus, const Maybe& initial_state, const Maybe& cu_seqlens,
                                           bool keep_checkpoints) {
  return with_element(OP, "x", x, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    auto p = sequences<E>(x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens);
    Maybe entering;
    if (p.segments > 1) {
      const Tensor added = empty<R>(x, {p.S, p.segments, p.D, p.N}), left = torch::stable::empty_like(added);
      p.added = out<R>(added), p.left = out<R>(left);
      run(p, PICK(selective_scan_crossing<E>), p.segments - 1);
      entering = chain<R>(added, left, initial_state, false);
      p.initial_state = in<R>(entering);
    }
    Tensor y = empty_as<E>(x), final_state = empty<R>(x, {p.S, p.D, p.N});
    Tensor checkpoints = empty<R>(x, {keep_checkpoints ? chunks(p) : 0, p.B, p.N, p.D});
    p.y = tokens<E>(y), p.final_state = out<R>(final_state), p.stream = streams(p, z ? 4 : 3);
    p.checkpoints = keep_checkpoints ? out<R>(checkpoints) : nullptr;
    run(p, PICK(selective_scan_forward<E>));
    return std::tuple(y, final_state, checkpoints);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Maybe& dfinal_state, const Tensor& checkpoints, const Tensor& x, const Tensor& dt,
    const Tensor& a, const Tensor& b, const Tensor& c, const Maybe& d, const Maybe& z, const Maybe& dt_bias,
    bool dt_softplus, const Maybe& initial_state, const Maybe& cu_seqlens) {
  return with_element(OP, "x", x, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    auto p = sequences<E>(x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens);
    p.dy = tokens<const E>(dy), p.dfinal_state = in<R>(dfinal_state);
    p.checkpoints = const_cast<R*>(in<R>(checkpoints));

    const Shape states = {p.S, p.segments, p.D, p.N}, channels = {p.S * p.segments, p.D};
    Tensor dinitial_state = empty<R>(x, states), da = empty<R>(x, states);
    Maybe behind;
    if (p.segments > 1) {
      p.added = out<R>(dinitial_state), p.left = out<R>(da);
      run(p, PICK(selective_scan_crossing_back<E>), 0);
      behind = chain<R>(dinitial_state, da, dfinal_state, true);
      p.dfinal_state = in<R>(behind);
    }
    Tensor dx = empty_as<E>(x), ddt = empty_as<E>(dt), dz = z ? empty_as<E>(*z) : empty<E>(x, {0});
    Tensor db = layers(p, b, p.db), dc = layers(p, c, p.dc);
    Tensor dd = empty<R>(x, channels), ddt_bias = empty<R>(x, channels);
    p.dx = tokens<E>(dx), p.ddt = tokens<E>(ddt), p.dz = z ? tokens<E>(dz) : Tokens<E>{};
    p.da = out<R>(da), p.stream = streams(p, z ? 7 : 5);
    p.dd = out<R>(dd), p.ddt_bias = out<R>(ddt_bias), p.dinitial_state = out<R>(dinitial_state);
    run(p, PICK(selective_scan_backward<E>));

    const Shape rows = {p.S * p.segments, p.D, p.N};
    da = torch::stable::view(da, rows);
    // Each missing one is a tensor of its own: an op's outputs must not share memory.
    return std::tuple(dx, ddt, total(da), summed<E>(db, b), summed<E>(dc, c), d ? total(dd) : empty<E>(x, {0}), dz,
                      dt_bias ? total(ddt_bias) : empty<E>(x, {0}),
                      torch::stable::select(dinitial_state, 1, 0));
  });
}

// Of each segment [S, segments, D, N]: what it adds to a state that crosses it, and what it leaves of that state.
std::tuple<Tensor, Tensor> crossing(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b,
                                    const Maybe& dt_bias, bool dt_softplus) {
  return with_element(OP, "x", x, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    auto p = sequences<E>(x, dt, a, b, b, {}, {}, dt_bias, dt_softplus, {}, {});
    const Tensor added = empty<R>(x, {p.S, p.segments, p.D, p.N}), left = torch::stable::empty_like(added);
    p.added = out<R>(added), p.left = out<R>(left);
    run(p, PICK(selective_scan_crossing<E>));
    return std::tuple(added, left);
  });
}

// The same of the gradient of a state, which crosses them from behind. No x is needed.
std::tuple<Tensor, Tensor> crossing_back(const Tensor& dy, const Tensor& dt, const Tensor& a, const Tensor& c,
                                         const Maybe& z, const Maybe& dt_bias, bool dt_softplus) {
  return with_element(OP, "dy", dy, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    auto p = sequences<E>(dy, dt, a, c, c, {}, z, dt_bias, dt_softplus, {}, {});
    const Tensor added = empty<R>(dy, {p.S, p.segments, p.D, p.N}), left = torch::stable::empty_like(added);
    p.dy = tokens<const E>(dy), p.added = out<R>(added), p.left = out<R>(left);
    run(p, PICK(selective_scan_crossing_back<E>));
    return std::tuple(added, left);
  });
}

Tensor step(const Tensor& x, const Tensor& dt, const Tensor& a, const Tensor& b, const Tensor& c, const Maybe& d,
            const Maybe& z, const Maybe& dt_bias, bool dt_softplus, const Tensor& state, const Maybe& state_indices) {
  return with_element(STEP, "x", x, [&](auto element) {
    using E = decltype(element);
    auto p = problem<E>(1, x, dt, a, b, c, d, z, dt_bias, dt_softplus);
    return with_state<E>(state, [&](auto number) {
      using S = decltype(number);
      const auto states = op::states<S>(state, state_indices);
      Tensor y = torch::stable::empty_like(x);
      p.y = tokens<E>(y);
      const int64_t blocks = (p.D + p.STEP_CHANNELS - 1) / p.STEP_CHANNELS;
      const auto kernel = PICK(selective_scan_step<E, S>);
      parallel(p.B * blocks, p.B * p.D * p.N / 4, 0, [&](int64_t task, void*) { kernel(p, states, task); });
      return y;
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcikernels_cpp, CPU, m) {
  m.impl("selective_scan_forward", TORCH_BOX(&forward));
  m.impl("selective_scan_backward", TORCH_BOX(&backward));
  m.impl("selective_scan_crossing", TORCH_BOX(&crossing));
  m.impl("selective_scan_crossing_back", TORCH_BOX(&crossing_back));
  m.impl("selective_scan_step", TORCH_BOX(&step));
}

STABLE_TORCH_LIBRARY_IMPL(lcikernels_cpp, CompositeExplicitAutograd, m) {
  m.impl("selective_scan_tasks", TORCH_BOX(&tasks));
}
