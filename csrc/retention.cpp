// Retention: memory and threads around the kernels in cpu/retention/.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/retention.h"
#include "op.h"

namespace {

using namespace op;

constexpr const char* OP = "retention";
constexpr const char* STEP = "retention_step";

// What whole sequences and a step have in common. q [..., Hq, K], k [..., Hk, K], v [..., Hv, V], log_decay [..., H].
// P: Retention<E> or RetentionStep<E>.
template <typename E, typename P>
P problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay, double scale) {
  const int64_t heads = q.dim() - 2, last = log_decay.dim() - 1;
  P p{};
  p.B = q.size(0);
  p.Hq = q.size(heads), p.Hk = k.size(heads), p.Hv = v.size(heads), p.H = log_decay.size(last);
  p.K = q.size(heads + 1), p.V = v.size(heads + 1);
  p.scale = scale;
  p.q = op::heads<E>(q), p.k = op::heads<E>(k), p.v = op::heads<E>(v);
  const int64_t row = last ? log_decay.stride(0) : 0, token = last > 1 ? log_decay.stride(1) : 0;
  p.log_decay = {in<Real<E>>(log_decay), row, token, log_decay.stride(last)};
  return p;
}

// How a problem without sums over tasks is cut: into heads, and where they are fewer than the threads into columns of
// V, at least 32; then as many heads that share both q and k to a task as keep no thread longer. No bit of a column
// depends on the others.
template <typename E>
void cut(Retention<E>& p) {
  p.columns = p.V, p.heads = 1;
  const int64_t threads = torch::stable::get_num_threads();
  while (p.columns >= 64 && p.tasks() < threads) p.columns = (p.columns / 2 + 31) / 32 * 32;
  const auto longest = [&] { return (p.tasks() + threads - 1) / threads * p.heads; };
  const int64_t alone = longest(), q = p.H / p.Hq, k = p.H / p.Hk;
  for (p.heads = RETENTION_TOGETHER; p.heads > 1; p.heads--)
    if (q % p.heads == 0 && k % p.heads == 0 && p.together() == p.heads && longest() == alone) break;
}

// How the backward is, never a matter of the threads, for sums depend on it. First over heads: all that share one of q,
// k or v in one task, or a part of them, the largest of which there are 16, down to an eighth, for each part has a
// layer of its gradient. Where even so tasks are below 8, over columns of V, at least 32: from 128 columns to 64 the
// backward has 10 % more work, and another layer of dq and dk.
template <typename E>
void cut_with_sums(Retention<E>& p) {
  const int64_t shared[] = {p.H / p.Hq, p.H / p.Hk, p.H / p.Hv}, most = *std::max_element(shared, shared + 3);
  p.columns = p.V, p.heads = 1;
  for (int64_t heads = most; heads > 0; heads--) {
    const bool even = std::all_of(shared, shared + 3, [&](int64_t x) { return x % heads == 0 || heads % x == 0; });
    if (!even || p.H % heads || most / heads > 8) continue;
    p.heads = heads;
    if (p.tasks() >= 16) break;
  }
  while (p.columns >= 64 && p.tasks() < 8) p.columns = (p.columns / 2 + 31) / 32 * 32;
}

// Whole sequences.
template <typename E>
Retention<E> sequences(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay, double scale,
                       const Maybe& initial_state, const Maybe& cu_seqlens) {
  auto p = problem<E, Retention<E>>(q, k, v, log_decay, scale);
  p.T = q.size(1);
  p.per_token = log_decay.dim() != 1;
  p.cu_seqlens = in<int32_t>(cu_seqlens);
  p.N = cu_seqlens ? cu_seqlens->size(0) - 1 : p.B;
  p.initial_state = in<Real<E>>(initial_state);
  return p;
}

template <typename E, typename Kernel>
void run(const Retention<E>& p, int64_t tasks, int64_t scratch, Kernel kernel) {
  using R = Real<E>;
  parallel(tasks, p.B * p.T * p.H * p.K * p.V / 8, scratch * sizeof(R),
           [&](int64_t task, void* scratch) { kernel(p, task, static_cast<R*>(scratch)); });
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
                                   double scale, const Maybe& initial_state, const Maybe& cu_seqlens) {
  return with_element(OP, "q", q, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    auto p = sequences<E>(q, k, v, log_decay, scale, initial_state, cu_seqlens);
    cut(p);
    const Tensor o = empty<E>(q, {p.B, p.T, p.H, p.V}), final_state = empty<R>(q, {p.N, p.H, p.K, p.V});
    p.o = out<E>(o), p.final_state = out<R>(final_state);
    run(p, p.tasks(), PICK_PRODUCTS(retention_scratch, E)(p), PICK_PRODUCTS(retention_forward, E));
    return std::tuple(o, final_state);
  });
}

// The memory of a gradient like x [B, T, Hx, width], in layers where several heads or tasks have a part in it.
template <typename E>
Tensor memory(const Retention<E>& p, const Tensor& x, int64_t splits, RetentionGradient<E>& gradient) {
  const int64_t Hx = x.size(2), layers = p.layers(Hx, splits);
  const bool whole = layers == 1 && Hx == p.H;
  const Tensor memory = whole ? empty<E>(x, {p.B, p.T, Hx, x.size(3)})
                              : empty<Real<E>>(x, {layers, p.B, p.T, Hx, x.size(3)});
  gradient = whole ? RetentionGradient<E>{out<E>(memory), nullptr}
                   : RetentionGradient<E>{nullptr, out<Real<E>>(memory)};
  return memory;
}

template <typename E>
Tensor summed(const Tensor& memory) {
  if (memory.dim() == 4) return memory;
  const Tensor sum = total(memory);
  return sum.scalar_type() == TYPE<E> ? sum : torch::stable::to(sum, TYPE<E>);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_o, const Maybe& dfinal_state,
                                                            const Tensor& q, const Tensor& k, const Tensor& v,
                                                            const Tensor& log_decay, double scale,
                                                            const Maybe& initial_state, const Maybe& cu_seqlens,
                                                            bool need_log_decay) {
  return with_element(OP, "q", q, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    auto p = sequences<E>(q, k, v, log_decay, scale, initial_state, cu_seqlens);
    cut_with_sums(p);
    p.grad_o = op::heads<E>(grad_o), p.dfinal_state = in<R>(dfinal_state);
    const Tensor dq = memory(p, q, p.splits(), p.dq), dk = memory(p, k, p.splits(), p.dk), dv = memory(p, v, 1, p.dv);
    const Shape rates = p.per_token ? Shape{p.splits(), p.B, p.T, p.H} : Shape{p.splits() * p.N, p.H};
    const Tensor dlog_decay = empty<R>(q, need_log_decay ? rates : Shape{1, 1});
    const Tensor dinitial_state = empty<R>(q, {p.N, p.H, p.K, p.V});
    p.dlog_decay = need_log_decay ? out<R>(dlog_decay) : nullptr;
    p.dinitial_state = out<R>(dinitial_state);
    run(p, p.backward_tasks(), PICK_PRODUCTS(retention_backward_scratch, E)(p), PICK_PRODUCTS(retention_backward, E));
    return std::tuple(summed<E>(dq), summed<E>(dk), summed<E>(dv), total(dlog_decay), dinitial_state);
  });
}

// How many tasks the forward pass is cut into, and the backward with and without the gradient of the rates.
std::tuple<int64_t, int64_t, int64_t> tasks(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& log_decay) {
  auto p = sequences<float>(q, k, v, log_decay, 1, {}, {});
  cut(p);
  const int64_t forward = p.tasks();
  cut_with_sums(p);
  return {forward, p.tasks(), p.backward_tasks()};
}

// What all tokens add to a state that crosses them: y (x) z each, from k and v. Or, from behind, from q and grad_o, to
// its gradient.
Tensor crossing(const Tensor& y, const Tensor& z, const Tensor& log_decay, double scale, bool back) {
  return with_element(OP, "k", y, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    auto p = sequences<E>(y, y, z, log_decay, scale, {}, {});
    cut(p);
    const Tensor added = empty<R>(y, {p.N, p.H, p.K, p.V});
    p.grad_o = op::heads<E>(z), p.final_state = p.dinitial_state = out<R>(added);
    const auto kernel = back ? PICK_PRODUCTS(retention_crossing_back, E) : PICK_PRODUCTS(retention_crossing, E);
    run(p, p.tasks(), PICK_PRODUCTS(retention_scratch, E)(p), kernel);
    return added;
  });
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay, const Tensor& state,
            double scale, const Maybe& state_indices) {
  return with_element(STEP, "q", q, [&](auto element) {
    using E = decltype(element);
    auto p = problem<E, RetentionStep<E>>(q, k, v, log_decay, scale);
    return with_state<E>(state, [&](auto number) {
      using S = decltype(number);
      const auto states = op::states<S>(state, state_indices);
      const Tensor o = empty<E>(q, {p.B, p.H, p.V});
      p.o = out<E>(o);
      const auto kernel = PICK(retention_step<E, S>);
      parallel(p.B * p.H, p.B * p.H * p.K * p.V / 8, 0, [&](int64_t task, void*) { kernel(p, states, task); });
      return o;
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcikernels_cpp, CPU, m) {
  m.impl("retention_forward", TORCH_BOX(&forward));
  m.impl("retention_backward", TORCH_BOX(&backward));
  m.impl("retention_tasks", TORCH_BOX(&tasks));
  m.impl("retention_crossing", TORCH_BOX(&crossing));
  m.impl("retention_step", TORCH_BOX(&step));
}
