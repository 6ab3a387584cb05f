// Retention: checks, memory and threads around the kernels in cpu/retention/.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/retention.h"
#include "op.h"

namespace {

using namespace op;
using checks::Axes;
using checks::require;

constexpr const char* OP = "retention";
constexpr const char* STEP = "retention_step";

// The arguments that all passes read, checked; `tokens` are the axes before the heads, those of a step without T.
// P: Retention<E> or RetentionStep<E>.
template <typename E, typename P>
P problem(const char* op, const Axes& tokens, const Tensor& q, const Tensor& k, const Tensor& v,
          const Tensor& log_decay, double scale) {
  const int64_t lead = tokens.size();
  const auto with = [&](const Axes& more) {
    Axes axes = tokens;
    axes.insert(axes.end(), more.begin(), more.end());
    return axes;
  };
  P p{};
  p.B = tokens[0].size;
  const auto heads = [&](const char* name, const Tensor& x, const char* count, const char* width) {
    if (x.dim() != lead + 2)
      checks::refuse(op, name, checks::layout(with({{count, 0}, {width, 0}})), "shape " + checks::tuple(x.sizes()));
    return x.size(lead);
  };
  p.Hq = heads("q", q, "Hq", "K"), p.Hk = heads("k", k, "Hk", "K"), p.Hv = heads("v", v, "Hv", "V");
  p.H = std::max({p.Hq, p.Hk, p.Hv}), p.K = q.size(lead + 1), p.V = v.size(lead + 1);
  const auto require_heads = lead == 2 ? checks::require_rows : require;
  require_heads(op, "q", q, with({{"Hq", p.Hq}, {"K", p.K}}), TYPE<E>);
  require_heads(op, "k", k, with({{"Hk", p.Hk}, {"K", p.K}}), TYPE<E>);
  require_heads(op, "v", v, with({{"Hv", p.Hv}, {"V", p.V}}), TYPE<E>);
  for (const auto& [name, count] : {std::pair("q", p.Hq), std::pair("k", p.Hk), std::pair("v", p.Hv)})
    if (p.H % count)
      checks::refuse(op, name, "such that its heads divide " + std::to_string(p.H), std::to_string(count));
  p.per_token = log_decay.dim() != 1;
  require(op, "log_decay", log_decay, p.per_token ? with({{"H", p.H}}) : Axes{{"H", p.H}}, TYPE<Real<E>>);
  p.scale = scale;
  if constexpr (std::is_same_v<P, Retention<E>>)
    p.q = op::heads<E>(q), p.k = op::heads<E>(k), p.v = op::heads<E>(v);
  else
    p.q = in<E>(q), p.k = in<E>(k), p.v = in<E>(v);
  p.log_decay = in<Real<E>>(log_decay);
  return p;
}

// How a problem is cut into tasks: the fewest from 8 on. First over heads: all that share one of q, k or v in one task,
// or a part of them, down to an eighth, for each part has a layer of its gradient. Then over columns of V, at least 32:
// from 128 columns to 64 the backward has 10 % more work, and another layer of dq and dk. Never a matter of the threads,
// for sums depend on it.
template <typename E>
void cut(Retention<E>& p) {
  const int64_t shared[] = {p.H / p.Hq, p.H / p.Hk, p.H / p.Hv}, most = *std::max_element(shared, shared + 3);
  p.columns = p.V, p.heads = 1;
  for (int64_t heads = most; heads > 0; heads--) {
    const bool even = std::all_of(shared, shared + 3, [&](int64_t x) { return x % heads == 0 || heads % x == 0; });
    if (!even || p.H % heads || most / heads > 8) continue;
    p.heads = heads;
    if (p.tasks() >= 8) break;
  }
  while (p.columns >= 64 && p.tasks() < 8) p.columns = (p.columns / 2 + 31) / 32 * 32;
}

// Whole sequences: how they are cut into tasks, too.
template <typename E>
Retention<E> sequences(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay, double scale,
                       const Maybe& initial_state, const Maybe& cu_seqlens) {
  using R = Real<E>;
  if (q.dim() != 4) checks::refuse(OP, "q", "[B, T, Hq, K]", "shape " + checks::tuple(q.sizes()));
  const Axes tokens = {{"B", q.size(0)}, {"T", q.size(1)}};
  auto p = problem<E, Retention<E>>(OP, tokens, q, k, v, log_decay, scale);
  p.T = q.size(1);
  if (cu_seqlens) {
    if (p.B != 1)
      checks::refuse(OP, "cu_seqlens", "given only with B=1 (packed sequences share one row)",
                     "B=" + std::to_string(p.B));
    checks::require_boundaries(OP, "cu_seqlens", *cu_seqlens, p.T);
    p.cu_seqlens = in<int32_t>(cu_seqlens);
  }
  p.N = cu_seqlens ? cu_seqlens->size(0) - 1 : p.B;
  if (initial_state)
    require(OP, "initial_state", *initial_state, {{"N", p.N}, {"H", p.H}, {"K", p.K}, {"V", p.V}}, TYPE<R>);
  p.initial_state = in<R>(initial_state);
  cut(p);
  return p;
}

template <typename E, typename Kernel>
void run(const Retention<E>& p, int64_t scratch, Kernel kernel) {
  using R = Real<E>;
  parallel(p.tasks(), p.B * p.T * p.H * p.K * p.V / 8, scratch * sizeof(R),
           [&](int64_t task, void* scratch) { kernel(p, task, static_cast<R*>(scratch)); });
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
                                   double scale, const Maybe& initial_state, const Maybe& cu_seqlens) {
  return with_element(OP, "q", q, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    auto p = sequences<E>(q, k, v, log_decay, scale, initial_state, cu_seqlens);
    const Tensor o = empty<E>(q, {p.B, p.T, p.H, p.V}), final_state = empty<R>(q, {p.N, p.H, p.K, p.V});
    p.o = out<E>(o), p.final_state = out<R>(final_state);
    run(p, PICK_PRODUCTS(retention_scratch, E)(p), PICK_PRODUCTS(retention_forward, E));
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
    checks::require_rows(OP, "grad_o", grad_o, {{"B", p.B}, {"T", p.T}, {"H", p.H}, {"V", p.V}}, TYPE<E>);
    if (dfinal_state)
      require(OP, "dfinal_state", *dfinal_state, {{"N", p.N}, {"H", p.H}, {"K", p.K}, {"V", p.V}}, TYPE<R>);
    p.grad_o = op::heads<E>(grad_o), p.dfinal_state = in<R>(dfinal_state);
    const Tensor dq = memory(p, q, p.splits(), p.dq), dk = memory(p, k, p.splits(), p.dk), dv = memory(p, v, 1, p.dv);
    const Shape rates = p.per_token ? Shape{p.splits(), p.B, p.T, p.H} : Shape{p.splits() * p.N, p.H};
    const Tensor dlog_decay = empty<R>(q, need_log_decay ? rates : Shape{1, 1});
    const Tensor dinitial_state = empty<R>(q, {p.N, p.H, p.K, p.V});
    p.dlog_decay = need_log_decay ? out<R>(dlog_decay) : nullptr;
    p.dinitial_state = out<R>(dinitial_state);
    run(p, PICK_PRODUCTS(retention_backward_scratch, E)(p), PICK_PRODUCTS(retention_backward, E));
    return std::tuple(summed<E>(dq), summed<E>(dk), summed<E>(dv), total(dlog_decay), dinitial_state);
  });
}

// What all tokens add to a state that crosses them: y (x) z each, from k and v. Or, from behind, from q and grad_o, to
// its gradient.
Tensor crossing(const Tensor& y, const Tensor& z, const Tensor& log_decay, double scale, bool back) {
  return with_element(OP, "k", y, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    auto p = sequences<E>(y, y, z, log_decay, scale, {}, {});
    if (back && p.Hv != p.H) checks::refuse(OP, "grad_o", "of all heads", std::to_string(p.Hv));
    const Tensor added = empty<R>(y, {p.N, p.H, p.K, p.V});
    p.grad_o = op::heads<E>(z), p.final_state = p.dinitial_state = out<R>(added);
    const auto kernel = back ? PICK_PRODUCTS(retention_crossing_back, E) : PICK_PRODUCTS(retention_crossing, E);
    run(p, PICK_PRODUCTS(retention_scratch, E)(p), kernel);
    return added;
  });
}

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay, const Tensor& state,
            double scale, const Maybe& state_indices) {
  return with_element(STEP, "q", q, [&](auto element) {
    using E = decltype(element);
    if (q.dim() != 3) checks::refuse(STEP, "q", "[B, Hq, K]", "shape " + checks::tuple(q.sizes()));
    auto p = problem<E, RetentionStep<E>>(STEP, {{"B", q.size(0)}}, q, k, v, log_decay, scale);
    return with_state<E>(state, [&](auto number) {
      using S = decltype(number);
      const auto states = op::states<S>(STEP, state, {{"B", p.B}, {"H", p.H}, {"K", p.K}, {"V", p.V}}, state_indices);
      const bool rows = p.V == 1 || states.strides[2] == 1, columns = p.K == 1 || states.strides[1] == 1;
      if (!rows && !columns)
        checks::refuse(STEP, "state", "of contiguous rows or columns", "strides " + checks::tuple(state.strides()));
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
  m.impl("retention_crossing", TORCH_BOX(&crossing));
  m.impl("retention_step", TORCH_BOX(&step));
}
