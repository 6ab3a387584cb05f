// CPU kernels of one build on odd shapes, against plain loops in float64, without torch's library: for a processor that
// an emulator stands in for, and for sanitizers. KERNELS is the build, base unless told, PRODUCTS that of products of
// bfloat16. Prints a line a check; the exit status is how many failed. Arguments are ops, or else all run. After
// `count` each runs 20 times, without checks, for its instructions to be counted. With THREADS, as many share an op's
// tasks, and three more call every op at once. Faults to be seen: after `short` inputs end an element early, after
// `twice` two threads do each task.

#include "against_float64.h"
#include "causal_conv1d.h"
#include "gated_rms_norm.h"
#include "kronecker_expand.h"
#include "retention.h"
#include "selective_scan.h"

#if !defined(KERNELS)
#define KERNELS base
#endif
#if !defined(PRODUCTS)
#define PRODUCTS KERNELS
#endif
#if !defined(ROUNDED)  // Do its products take bfloat16 alone?
#define ROUNDED false
#endif
#define WITH_PRODUCTS(kernel, E)                              \
  [] {                                                        \
    if constexpr (sizeof(E) == 2) return &PRODUCTS::kernel<E>; \
    else return &KERNELS::kernel<E>;                          \
  }()

namespace {

template <typename E>
void convolution(bool turned) {
  using R = Real<E>;
  constexpr int64_t B = 2, T = 263, D = 71, W = 4;
  Memory<E> x(B * T * D, 3), dy(B * T * D);
  Memory<R> weight(D * W), bias(D), state(B * D * (W - 1)), dfinal(B * D * (W - 1));
  const auto at = [=](int64_t b, int64_t t, int64_t d) { return turned ? (b * D + d) * T + t : (b * T + t) * D + d; };
  Exact pre(B * T * D), y(B * T * D), dx(B * T * D), dweight(D * W), dbias(D), final(state.exact), dstate(state.exact);
  for (double& v : dstate) v = 0;
  for (int64_t b = 0; b < B; b++)
    for (int64_t d = 0; d < D; d++) {
      const auto past = [&](int64_t t) {
        return t < 0 ? state.exact[(b * D + d) * (W - 1) + t + W - 1] : x.exact[at(b, t, d)];
      };
      const auto back = [&](int64_t t, double g) {
        (t < 0 ? dstate[(b * D + d) * (W - 1) + t + W - 1] : dx[at(b, t, d)]) += g;
      };
      for (int64_t t = 0; t < T; t++) {
        double sum = bias.exact[d];
        for (int64_t w = 0; w < W; w++) sum += weight.exact[d * W + w] * past(t - (W - 1) + w);
        y[at(b, t, d)] = silu(sum);
        const double g = dy.exact[at(b, t, d)] * silu_slope(sum);
        dbias[d] += g;
        for (int64_t w = 0; w < W; w++) dweight[d * W + w] += g * past(t - (W - 1) + w);
        for (int64_t w = 0; w < W; w++) back(t - (W - 1) + w, g * weight.exact[d * W + w]);
      }
      for (int64_t i = 0; i < W - 1; i++) {
        final[(b * D + d) * (W - 1) + i] = past(T - (W - 1) + i);
        back(T - (W - 1) + i, dfinal.exact[(b * D + d) * (W - 1) + i]);
      }
    }
  CausalConv1d<E> p{};
  p.B = p.S = B, p.T = T, p.D = D, p.W = W, p.silu = true, p.share(4);
  const auto tokens = [&](auto* data) {
    return Tokens<std::remove_pointer_t<decltype(data)>>{data, T * D, turned ? 1 : D, turned ? T : 1};
  };
  auto got_y = unwritten<E>(B * T * D), got_dx = got_y;
  auto got_final = unwritten<R>(B * D * (W - 1)), got_dstate = got_final;
  auto layers = unwritten<R>(B * p.segments() * D * W), bias_layers = unwritten<R>(B * p.segments() * D);
  p.x = constant(tokens((E*)x)), p.dy = constant(tokens((E*)dy)), p.weight = weight, p.bias = bias;
  p.initial_state = state, p.dfinal_state = dfinal, p.y = tokens(got_y.data()), p.dx = tokens(got_dx.data());
  p.final_state = got_final.data(), p.dinitial_state = got_dstate.data();
  p.dweight = layers.data(), p.dbias = bias_layers.data();
  const auto forward = turned ? KERNELS::causal_conv1d_forward_along<E> : KERNELS::causal_conv1d_forward<E>;
  const auto backward = turned ? KERNELS::causal_conv1d_backward_along<E> : KERNELS::causal_conv1d_backward<E>;
  run<R>(p.tasks(), p.scratch(), [&](int64_t task, R* memory) { forward(p, task, memory); });
  run<R>(p.tasks(), p.scratch(), [&](int64_t task, R* memory) { backward(p, task, memory); });
  std::vector<R> got_dweight(D * W), got_dbias(D);
  for (size_t i = 0; i < layers.size(); i++) got_dweight[i % (D * W)] += layers[i];
  for (size_t i = 0; i < bias_layers.size(); i++) got_dbias[i % D] += bias_layers[i];
  check("convolution's y", got_y, y, W);
  check("convolution's final state", got_final, final, 1);
  check("convolution's dx", got_dx, dx, 2 * W);
  check("convolution's dweight", got_dweight, dweight, B * T);
  check("convolution's dbias", got_dbias, dbias, B * T);
  check("convolution's dinitial_state", got_dstate, dstate, 2 * W);
}

template <typename E>
void norm() {
  using R = Real<E>;
  constexpr int64_t rows = 45, D = 2 * 37, groups = 2, size = D / groups;
  constexpr double eps = 1e-5;
  Memory<E> x(rows * D), gate(rows * D, 3), dy(rows * D);
  Memory<R> weight(D), bias(D);
  Exact y(rows * D), dx(rows * D), dgate(rows * D), dweight(D), dbias(D);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t group = 0; group < groups; group++) {
      const int64_t from = row * D + group * size;
      double square = 0, along = 0;
      for (int64_t i = from; i < from + size; i++) square += x.exact[i] * x.exact[i];
      const double scale = 1 / std::sqrt(square / size + eps);
      for (int64_t i = from; i < from + size; i++) {
        const int64_t c = i % D;
        const double n = x.exact[i] * scale, affine = n * weight.exact[c] + bias.exact[c];
        const double h = dy.exact[i] * silu(gate.exact[i]);
        y[i] = affine * silu(gate.exact[i]);
        dgate[i] = dy.exact[i] * affine * silu_slope(gate.exact[i]);
        dweight[c] += h * n, dbias[c] += h, along += h * weight.exact[c] * n / size;
      }
      for (int64_t i = from; i < from + size; i++)
        dx[i] = (dy.exact[i] * silu(gate.exact[i]) * weight.exact[i % D] - x.exact[i] * scale * along) * scale;
    }
  GatedRmsNorm<E> p{};
  p.rows = rows, p.D = D, p.groups = groups, p.channels = size, p.x_row = p.gate_row = D, p.eps = eps, p.silu = true;
  auto got_y = unwritten<E>(rows * D), got_dx = got_y, got_dgate = got_y;
  auto got_dweight = unwritten<R>(p.tasks() * D), got_dbias = got_dweight;
  p.x = x, p.gate = gate, p.dy = dy, p.weight = weight, p.bias = bias, p.y = got_y.data(), p.dx = got_dx.data();
  p.dgate = got_dgate.data(), p.dweight = got_dweight.data(), p.dbias = got_dbias.data();
  run<R>(p.tasks(), p.scratch(), [&](int64_t task, R* memory) { KERNELS::gated_rms_norm_forward(p, task, memory); });
  run<R>(p.tasks(), p.backward_scratch(),
         [&](int64_t task, R* memory) { KERNELS::gated_rms_norm_backward(p, task, memory); });
  check("norm's y", got_y, y, 4);
  check("norm's dx", got_dx, dx, 16);
  check("norm's dgate", got_dgate, dgate, 4);
  check("norm's dweight", got_dweight, dweight, rows);
  check("norm's dbias", got_dbias, dbias, rows);
}

template <typename E>
void retention() {
  using R = Real<E>;
  constexpr int64_t B = 2, T = 70, H = 3, K = 19, V = 37, size = K * V;
  const double scale = 0.25;
  Memory<E> q(B * T * H * K), k(B * T * H * K), v(B * T * H * V), grad(B * T * H * V);
  Memory<R> decay(H, 0.1, -0.11), first(B * H * size), dlast(B * H * size);
  Exact o(B * T * H * V), dq(B * T * H * K), dk(dq), dv(o), last(first.exact), dfirst(first.exact), ddecay(B * H);
  for (int64_t s = 0; s < B * H; s++) {
    const auto row = [=](int64_t t) { return (s / H * T + t) * H + s % H; };
    const double a = std::exp(decay.exact[s % H]);
    Exact S((T + 1) * size), dS(size);
    std::copy_n(&first.exact[s * size], size, S.data());
    for (int64_t t = 0; t < T; t++)
      for (int64_t i = 0; i < size; i++) {
        const int64_t key = row(t) * K + i / V, value = row(t) * V + i % V;
        S[(t + 1) * size + i] = a * S[t * size + i] + k.exact[key] * v.exact[value];
        o[value] += scale * q.exact[key] * S[(t + 1) * size + i];
      }
    std::copy_n(&S[T * size], size, &last[s * size]);
    std::copy_n(&dlast.exact[s * size], size, dS.data());
    for (int64_t t = T - 1; t >= 0; t--)
      for (int64_t i = 0; i < size; i++) {
        const int64_t key = row(t) * K + i / V, value = row(t) * V + i % V;
        dS[i] += scale * q.exact[key] * grad.exact[value];
        dq[key] += scale * S[(t + 1) * size + i] * grad.exact[value];
        dk[key] += dS[i] * v.exact[value], dv[value] += dS[i] * k.exact[key];
        ddecay[s] += dS[i] * a * S[t * size + i];
        dS[i] *= a;
      }
    std::copy_n(dS.data(), size, &dfirst[s * size]);
  }
  Retention<E> p{};
  p.B = p.N = B, p.T = T, p.Hq = p.Hk = p.Hv = p.H = H, p.K = K, p.V = V, p.heads = 1, p.columns = V, p.scale = scale;
  p.q = {q, T * H * K, H * K, K}, p.k = {k, T * H * K, H * K, K}, p.v = {v, T * H * V, H * V, V};
  p.log_decay = {decay, 0, 0, 1}, p.grad_o = {grad, T * H * V, H * V, V};
  p.initial_state = first, p.dfinal_state = dlast;
  auto got_o = unwritten<E>(o.size()), got_dq = unwritten<E>(dq.size()), got_dk = got_dq, got_dv = got_o;
  auto got_last = unwritten<R>(last.size()), got_dfirst = got_last, got_ddecay = unwritten<R>(B * H);
  p.o = got_o.data(), p.final_state = got_last.data(), p.dlog_decay = got_ddecay.data();
  p.dq.whole = got_dq.data(), p.dk.whole = got_dk.data(), p.dv.whole = got_dv.data();
  p.dinitial_state = got_dfirst.data();
  run<R>(p.tasks(), WITH_PRODUCTS(retention_scratch, E)(p),
         [&](int64_t task, R* memory) { WITH_PRODUCTS(retention_forward, E)(p, task, memory); });
  run<R>(p.backward_tasks(), WITH_PRODUCTS(retention_backward_scratch, E)(p),
         [&](int64_t task, R* memory) { WITH_PRODUCTS(retention_backward, E)(p, task, memory); });
  constexpr bool rounded = ROUNDED && sizeof(E) == 2;
  check("retention's o", got_o, o, T, rounded);
  check("retention's final state", got_last, last, T, rounded);
  check("retention's dq", got_dq, dq, T, rounded);
  check("retention's dk", got_dk, dk, T, rounded);
  check("retention's dv", got_dv, dv, T, rounded);
  check("retention's dlog_decay", got_ddecay, ddecay, T * size, rounded);
  check("retention's dinitial_state", got_dfirst, dfirst, T, rounded);
}

template <typename E>
void scan() {
  using R = Real<E>;
  constexpr int64_t B = 2, T = 70, D = 37, N = 19;
  Memory<E> x(B * T * D), dt(B * T * D), z(B * T * D, 3), dy(B * T * D), b(B * T * N), c(B * T * N);
  Memory<R> a(D * N, 0.5, -0.6), d(D), bias(D), first(B * D * N), dlast(B * D * N);
  Exact y(B * T * D), dx(y), ddt(y), dz(y), db(B * T * N), dc(db);
  Exact da(B * D * N), dd(B * D), dbias(dd), last(da), dfirst(da);
  for (int64_t s = 0; s < B * D; s++) {
    const int64_t channel = s % D;
    const auto at = [=](int64_t t) { return (s / D * T + t) * D + channel; };
    const auto delta = [&](int64_t t) { return softplus(dt.exact[at(t)] + bias.exact[channel]); };
    Exact h((T + 1) * N), dh(N), out(T);
    std::copy_n(&first.exact[s * N], N, h.data());
    for (int64_t t = 0; t < T; t++) {
      for (int64_t n = 0; n < N; n++) {
        const int64_t i = (s / D * T + t) * N + n;
        const double kept = std::exp(delta(t) * a.exact[channel * N + n]) * h[t * N + n];
        h[(t + 1) * N + n] = kept + delta(t) * b.exact[i] * x.exact[at(t)];
        out[t] += c.exact[i] * h[(t + 1) * N + n];
      }
      out[t] += d.exact[channel] * x.exact[at(t)];
      y[at(t)] = out[t] * silu(z.exact[at(t)]);
    }
    std::copy_n(&h[T * N], N, &last[s * N]);
    std::copy_n(&dlast.exact[s * N], N, dh.data());
    for (int64_t t = T - 1; t >= 0; t--) {
      const double g = dy.exact[at(t)] * silu(z.exact[at(t)]), u = x.exact[at(t)];
      double dstep = 0;
      dz[at(t)] = dy.exact[at(t)] * out[t] * silu_slope(z.exact[at(t)]);
      for (int64_t n = 0; n < N; n++) {
        const int64_t i = (s / D * T + t) * N + n;
        const double rate = a.exact[channel * N + n], kept = std::exp(delta(t) * rate) * h[t * N + n];
        dh[n] += g * c.exact[i];
        dc[i] += g * h[(t + 1) * N + n], db[i] += dh[n] * delta(t) * u, dx[at(t)] += dh[n] * delta(t) * b.exact[i];
        dstep += dh[n] * (rate * kept + b.exact[i] * u), da[s * N + n] += dh[n] * delta(t) * kept;
        dh[n] *= std::exp(delta(t) * rate);
      }
      dx[at(t)] += g * d.exact[channel], dd[s] += g * u;
      ddt[at(t)] = dstep * sigmoid(dt.exact[at(t)] + bias.exact[channel]), dbias[s] += ddt[at(t)];
    }
    std::copy_n(dh.data(), N, &dfirst[s * N]);
  }
  SelectiveScan<E> p{};
  p.B = p.S = B, p.T = T, p.D = p.split = D, p.G = p.segments = 1, p.N = N, p.length = 96, p.dt_softplus = true;
  const auto tokens = [](auto* data) { return Tokens<std::remove_pointer_t<decltype(data)>>{data, T * D, D, 1}; };
  const auto projected = [](auto* data) {
    return Projected<std::remove_pointer_t<decltype(data)>>{data, T * N, N, N, 1};
  };
  auto got_y = unwritten<E>(y.size()), got_dx = got_y, got_ddt = got_y, got_dz = got_y;
  auto got_db = unwritten<R>(db.size()), got_dc = got_db, got_da = unwritten<R>(da.size()), got_last = got_da;
  auto got_dfirst = got_da, got_dd = unwritten<R>(dd.size()), got_dbias = got_dd, kept = unwritten<R>(3 * B * N * D);
  p.x = constant(tokens((E*)x)), p.dt = constant(tokens((E*)dt)), p.z = constant(tokens((E*)z));
  p.dy = constant(tokens((E*)dy));
  p.b = projected((const E*)(E*)b), p.c = projected((const E*)(E*)c);
  p.a = a, p.d = d, p.dt_bias = bias, p.initial_state = first;
  p.dfinal_state = dlast, p.checkpoints = kept.data(), p.y = tokens(got_y.data()), p.final_state = got_last.data();
  p.dx = tokens(got_dx.data()), p.ddt = tokens(got_ddt.data()), p.dz = tokens(got_dz.data());
  p.db = projected(got_db.data()), p.dc = projected(got_dc.data()), p.da = got_da.data(), p.dd = got_dd.data();
  p.ddt_bias = got_dbias.data(), p.dinitial_state = got_dfirst.data();
  const int64_t numbers = KERNELS::selective_scan_scratch(p);
  run<R>(p.tasks(), numbers, [&](int64_t task, R* memory) { KERNELS::selective_scan_forward(p, task, memory); });
  run<R>(p.tasks(), numbers, [&](int64_t task, R* memory) { KERNELS::selective_scan_backward(p, task, memory); });
  check("scan's y", got_y, y, N);
  check("scan's final state", got_last, last, T);
  check("scan's dx", got_dx, dx, N);
  check("scan's ddt", got_ddt, ddt, N);
  check("scan's dz", got_dz, dz, N);
  check("scan's db", got_db, db, D);
  check("scan's dc", got_dc, dc, D);
  check("scan's da", got_da, da, T);
  check("scan's dd", got_dd, dd, T);
  check("scan's ddt_bias", got_dbias, dbias, T);
  check("scan's dinitial_state", got_dfirst, dfirst, T);
}

// c = plus + a b of each layer, and what is mixed of layers, forward and backward.
template <typename E>
void expansion() {
  using R = Real<E>;
  constexpr int64_t L = 3, M = 5, rows = 37, depth = 23, columns = 41, size = rows * columns;
  Memory<E> a(L * rows * depth), b(L * depth * columns), plus(L * size), grad(M * size);
  Memory<R> mix(M * L);
  Exact c(plus.exact), out(M * size), back(L * size), dmix(M * L);
  for (int64_t l = 0; l < L; l++)
    for (int64_t i = 0; i < size; i++)
      for (int64_t k = 0; k < depth; k++) {
        const double x = a.exact[(l * rows + i / columns) * depth + k];
        c[l * size + i] += x * b.exact[(l * depth + k) * columns + i % columns];
      }
  for (int64_t i = 0; i < M * L; i++)
    for (int64_t at = 0; at < size; at++) {
      const int64_t made = i / L * size + at, old = i % L * size + at;
      const double x = c[old] - plus.exact[old];
      out[made] += mix.exact[i] * x, back[old] += mix.exact[i] * grad.exact[made], dmix[i] += grad.exact[made] * x;
    }
  const auto layers = [](E* data, int64_t rows, int64_t columns) {
    if constexpr (sizeof(E) == 2) return Layers<E>{data, nullptr, columns, 1, rows * columns};
    else return Layers<E>{nullptr, data, columns, 1, rows * columns};
  };
  auto got_c = unwritten<E>(L * size), got_out = unwritten<E>(M * size), got_back = got_c;
  const Layers<E> left = layers(a, rows, depth), right = layers(b, depth, columns);
  const Product<E> p{L, 1, L, depth, left, right, layers(plus, rows, columns), layers(got_c.data(), rows, columns),
                     Blocks(rows, columns, 64, 64)};
  run<R>(p.tasks(), p.scratch(),
         [&](int64_t task, R* memory) { WITH_PRODUCTS(multiply_block, E)(p, task, memory); });
  Mix<E> m{L, M, depth, left, right, mix, layers(got_out.data(), rows, columns), {}, {}, false, nullptr, p.blocks};
  const auto mixed = [&](int64_t task, R* memory) { WITH_PRODUCTS(mix_block, E)(m, task, memory); };
  run<R>(m.tasks(), m.scratch(), mixed);
  auto parts = unwritten<double>(m.tasks() * M * L);
  m.out = {}, m.grad = layers(grad, rows, columns), m.back = layers(got_back.data(), rows, columns);
  m.dmix = parts.data();
  run<R>(m.tasks(), m.scratch(), mixed);
  std::vector<R> got_dmix(M * L);
  for (size_t i = 0; i < parts.size(); i++) got_dmix[i % (M * L)] += parts[i];
  check("expansion's product", got_c, c, depth);
  check("expansion's mix", got_out, out, L * depth);
  check("expansion's gradient of layers", got_back, back, M);
  check("expansion's gradient of the mix", got_dmix, dmix, size);
}

// One token of each op.
template <typename E>
void steps() {
  using R = Real<E>;
  constexpr int64_t B = 3, H = 2, K = 19, V = 37, D = 35, N = 19, W = 4;
  Memory<E> q(B * H * K), k(B * H * K), v(B * H * V), x(B * D), dt(B * D), z(B * D, 3), b(B * N), c(B * N);
  Memory<R> decay(H, 0.1, -0.11), S(B * H * K * V), a(D * N, 0.5, -0.6), h(B * D * N);
  Memory<R> weight(D * W), past(B * D * (W - 1));
  Exact o(B * H * V), y(B * D), convolved(B * D);
  for (int64_t i = 0; i < B * H * K * V; i++) {
    const int64_t s = i / (K * V), key = i / V, value = s * V + i % V;
    S.exact[i] = std::exp(decay.exact[s % H]) * S.exact[i] + k.exact[key] * v.exact[value];
    o[value] += 0.25 * q.exact[key] * S.exact[i];
  }
  for (int64_t i = 0; i < B * D * N; i++) {
    const int64_t s = i / N, n = s / D * N + i % N;
    h.exact[i] = std::exp(dt.exact[s] * a.exact[i % (D * N)]) * h.exact[i] + dt.exact[s] * b.exact[n] * x.exact[s];
    y[s] += c.exact[n] * h.exact[i] * silu(z.exact[s]);
  }
  for (int64_t s = 0; s < B * D; s++) {
    double sum = weight.exact[s % D * W + W - 1] * x.exact[s];
    for (int64_t w = 0; w < W - 1; w++) sum += weight.exact[s % D * W + w] * past.exact[s * (W - 1) + w];
    convolved[s] = silu(sum);
  }
  auto got_o = unwritten<E>(o.size()), got_y = unwritten<E>(y.size()), got_convolved = got_y;
  RetentionStep<E> r{B, H, H, H, H, K, V, R(0.25)};
  r.q = {q, H * K, 0, K}, r.k = {k, H * K, 0, K}, r.v = {v, H * V, 0, V}, r.log_decay = {decay, 0, 0, 1};
  r.o = got_o.data();
  const States<R> matrices{S, nullptr, H * K * V, {K * V, V, 1}};
  run<R>(B * H, 1, [&](int64_t task, R*) { KERNELS::retention_step(r, matrices, task); });
  SelectiveScan<E> p{};
  p.B = p.S = B, p.T = p.G = 1, p.D = D, p.N = N, p.a = a, p.x = {x, D, D, 1}, p.dt = {dt, D, D, 1}, p.z = {z, D, D, 1};
  p.b = {b, N, N, N, 1}, p.c = {c, N, N, N, 1}, p.y = {got_y.data(), D, D, 1};
  const States<R> vectors{h, nullptr, D * N, {N, 1}};
  run<R>(B, 1, [&](int64_t task, R*) { KERNELS::selective_scan_step(p, vectors, task); });
  CausalConv1d<E> f{};
  f.B = f.S = B, f.T = 1, f.D = D, f.W = W, f.silu = true, f.share(1), f.x = {x, D, D, 1}, f.weight = weight;
  f.y = {got_convolved.data(), D, D, 1};
  const ConvolutionStates<R> windows{{past, nullptr, D * (W - 1), {W - 1, 1}}, W - 1, nullptr};
  run<R>(B * f.blocks(), f.scratch(),
         [&](int64_t task, R* memory) { KERNELS::causal_conv1d_step(f, windows, task, memory); });
  check("retention_step's o", got_o, o, K);
  check("retention_step's state", S.data, S.exact, 2);
  check("selective_scan_step's y", got_y, y, N);
  check("selective_scan_step's state", h.data, h.exact, 2);
  check("causal_conv1d_step's y", got_convolved, convolved, W);
}

// Each of 64 threads has a task at the shapes of a layer.
void tasks() {
  CausalConv1d<float> p{};
  p.B = p.S = 1, p.T = 2048, p.D = 1536, p.W = 4, p.share(64);
  GatedRmsNorm<float> n{};
  n.rows = 2048, n.D = 1536;
  for (const auto& [what, count] : {std::pair("convolution", p.tasks()), std::pair("norm", n.tasks())}) {
    failures += count < 64;
    std::printf("%s %s has %d tasks for 64 threads\n", count < 64 ? "FAILED" : "ok", what, int(count));
  }
}

}  // namespace

int main(int count, char** words) {
  std::vector<std::string> names(words + 1, words + count);
  const std::string mode = names.empty() ? "" : names[0];
  counting = mode == "count", shortened = mode == "short", twice = mode == "twice";
  if (counting || shortened || twice) names.erase(names.begin());
  const auto wanted = [&](const char* op) {
    return names.empty() || std::find(names.begin(), names.end(), op) != names.end();
  };
  const auto each = [&](auto element) {
    using E = decltype(element);
    if (wanted("convolution")) convolution<E>(false);
    if (wanted("convolution along tokens")) convolution<E>(true);
    if (wanted("norm")) norm<E>();
    if (wanted("retention")) retention<E>();
    if (wanted("scan")) scan<E>();
    if (wanted("expansion")) expansion<E>();
    if (wanted("steps")) steps<E>();
  };
  if (wanted("tasks")) tasks();
  at_once([&] {
    each(float{});
    if (!counting) each(double{});
    each(bf16{});
  });
  return failures;
}
