// Which products LiGO's expansion is made of, and where their results lie.
//
// Every step is a mix of layers or a product of stacks of matrices, also the gradient of depth. Shared maps widen the
// mixed layers: L2 / L1 times the products of widening the old ones, and no wide layer but the output. With own maps
// and a depth, a block of rows of every wide old layer is made, mixed, and forgotten: in registers a tile of it could
// be mixed into some 4 new layers at once, and would be made L2 / 4 times.
#include "kronecker_expand.h"

#include "launch.cuh"
#include "mix.cuh"

namespace gpu {

namespace {

constexpr double SHARE = 0.1;  // of the output: the forward's workspace, where one layer or 64 rows are not more

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// Where a product goes.
struct Place {
  void* data;
  int64_t row, layer;
};

struct Plan {
  explicit Plan(const KroneckerExpand& p)
      : p(p), size(p.kind == Arithmetic::BFLOAT16 || p.kind == Arithmetic::FLOAT16 ? 2 : 4) {}

  const KroneckerExpand& p;
  const int64_t size;           // bytes of an element
  const char* error = nullptr;  // the first, after which nothing is launched

  const void* at(const void* x, int64_t element) const { return static_cast<const char*>(x) + element * size; }
  void* at(void* x, int64_t element) const { return static_cast<char*>(x) + element * size; }

  // [layers, .., ..] whose last axis is the depth, or the other one.
  static Operand deep(const void* x, int64_t row, int64_t layer) { return {x, row, layer, 0, Along::DEPTH}; }
  static Operand outer(const void* x, int64_t row, int64_t layer) { return {x, row, layer, 0, Along::OUTER}; }

  // c[z] = plus[z] + a[z] b[z], [rows, columns].
  void multiply(Operand a, Operand b, int64_t rows, int64_t columns, int64_t depth, int64_t layers, Place c,
                Operand plus = {}) {
    Product q = product_of(a, b, rows, columns, depth, depth, 1);
    q.c = c.data, q.c_row = c.row, q.c_layer = c.layer, q.plus = plus;
    q.c_vectors = aligned(c.data, c.row, c.layer, 0) && aligned(plus.data, plus.row, plus.layer, 0);
    run(q, p.kind, layers);
  }

  // y[i] = sum_j depth[i, j] x[j], or the transposed depth's, of matrices [rows, columns]; without depth y[i] = x[i].
  void mix(Operand depth, int64_t to, int64_t from, Operand x, int64_t rows, int64_t columns, Place y) {
    const bool mixes = depth.data;
    const bool vectors = aligned(x.data, x.row, x.layer, columns) && aligned(y.data, y.row, y.layer, 0);
    each(vectors ? gpu::mix<Arithmetic::BFLOAT16, 8> : gpu::mix<Arithmetic::BFLOAT16, 1>,
         vectors ? gpu::mix<Arithmetic::FLOAT16, 8> : gpu::mix<Arithmetic::FLOAT16, 1>,
         vectors ? gpu::mix<Arithmetic::FLOAT32, 4> : gpu::mix<Arithmetic::FLOAT32, 1>,
         pieces(rows * columns / (vectors ? 16 / size : 1), THREADS), mixes ? 1 : to,
         Mix{depth, x, y.data, y.row, y.layer, mixes ? to : 1, mixes ? from : 1, rows, columns});
  }
  void mix(Operand depth, int64_t to, int64_t from, const void* x, int64_t x_layer, int64_t numbers, void* y,
           int64_t y_layer) {
    mix(depth, to, from, outer(x, 0, x_layer), 1, numbers, {y, 0, y_layer});
  }

  // The float32 sum over z of a[z] b[z], in `count` parts of [rows, columns], that all are added to where `add`.
  void sum(Operand a, Operand b, int64_t rows, int64_t columns, int64_t depth, int64_t whole_depth, Arithmetic kind,
           float* parts, int64_t count, bool add) {
    const int64_t segments = pieces(whole_depth, depth), split = pieces(segments, count);
    a.segment = a.layer, b.segment = b.layer, a.layer = b.layer = 0;
    Product q = product_of(a, b, rows, columns, depth, whole_depth, segments);
    q.split = split;
    q.c = parts, q.c_row = columns, q.c_layer = rows * columns;
    q.sum = true, q.add = add;
    run(q, kind, count);
  }

  // ddepth[i, j] = <x[i], y[j]>, over `numbers` of each; `parts` has room for dots_parts() of [to, from].
  void dots(const void* x, int64_t to, const void* y, int64_t from, int64_t numbers, float* parts, void* ddepth) {
    const int64_t depth = 512, count = least(dots_parts(), pieces(numbers, depth));
    sum(deep(x, numbers, depth), deep(y, numbers, depth), to, from, depth, numbers, exact(), parts, count, false);
    totals({parts, ddepth, count, to, from, p.L1});
  }

  void totals(const Total& t) {
    each(total<Arithmetic::BFLOAT16>, total<Arithmetic::FLOAT16>, total<Arithmetic::FLOAT32>,
         pieces(t.rows * t.columns, THREADS), 1, t);
  }

  // The kernel for this type of elements, of which each thread makes some: tf32 is none of its business.
  template <typename Kernel, typename Params>
  void each(Kernel of_bfloat16, Kernel of_float16, Kernel of_float32, int64_t blocks, int64_t layers, Params params) {
    if (error || !blocks) return;
    const auto kernel = p.kind == Arithmetic::BFLOAT16  ? of_bfloat16
                        : p.kind == Arithmetic::FLOAT16 ? of_float16
                                                        : of_float32;
    error = launch(kernel, blocks, layers, THREADS, 0, p.stream, params);
  }

  // All that run at once: dots read much and multiply little.
  int64_t dots_parts() const { return p.multiprocessors * AT_ONCE; }

  // Float32 matrices [rows, columns] that the products of all layers are summed into: as many as fill the GPU, while
  // they take no more than an eighth of grad_out.
  int64_t sum_parts(int64_t rows, int64_t columns) const {
    if (!rows) return 1;
    const int64_t fill = p.multiprocessors / (pieces(rows, 128) * pieces(columns, 128));
    return most(1, least(fill, p.L2 * p.M * p.N * size / 8 / (rows * columns * 4)));
  }

  // y[z] = write[z] x[z] readᵀ[z] for `layers` layers from `layer` on, and R rows from `row` on. Half of it, in t, is
  // write x, [R, n] of each layer, or read xᵀ, [N, m].
  void widen(bool from_write, int64_t layer, int64_t layers, const void* x, int64_t row, int64_t R, void* t, Place y) {
    const Operand write = deep(at(p.write, layer * write_layer() + row * p.m), p.m, write_layer());
    const Operand read = deep(at(p.read, layer * read_layer()), p.n, read_layer());
    if (from_write) {
      multiply(write, outer(x, p.n, p.m * p.n), R, p.n, p.m, layers, {t, p.n, R * p.n});
      multiply(deep(t, p.n, R * p.n), read, R, p.N, p.n, layers, y);
    } else {
      multiply(read, deep(x, p.n, p.m * p.n), p.N, p.m, p.n, layers, {t, p.m, p.N * p.m});
      multiply(write, deep(t, p.m, p.N * p.m), R, p.N, p.m, layers, y);
    }
  }

  // The cheaper side first.
  bool write_first() const { return p.M * p.n * (p.m + p.N) <= p.N * p.m * (p.n + p.M); }
  int64_t half() const { return write_first() ? p.M * p.n : p.N * p.m; }

  int64_t write_rows() const { return p.M - p.added * p.m; }
  int64_t read_rows() const { return p.N - p.added * p.n; }
  int64_t write_layer() const { return p.own_write ? p.M * p.m : 0; }
  int64_t read_layer() const { return p.own_read ? p.N * p.n : 0; }
  bool mixes_small() const { return p.depth && !p.own_write && !p.own_read; }
  bool mixes_wide() const { return p.depth && !mixes_small(); }

  Arithmetic exact() const { return p.kind == Arithmetic::TF32 ? Arithmetic::FLOAT32 : p.kind; }

  bool aligned(const void* x, int64_t row, int64_t layer, int64_t segment) const {
    const int64_t all = row | layer | segment;
    return (reinterpret_cast<uintptr_t>(x) | all * size) % 16 == 0;
  }

  Product product_of(Operand a, Operand b, int64_t rows, int64_t columns, int64_t depth, int64_t whole_depth,
                     int64_t segments) const {
    Product q{};
    q.a = a, q.b = b;
    q.rows = rows, q.columns = columns, q.depth = depth, q.whole_depth = whole_depth, q.segments = segments;
    q.a_vectors = aligned(a.data, a.row, a.layer, a.segment);
    q.b_vectors = aligned(b.data, b.row, b.layer, b.segment);
    return q;
  }

  void run(const Product& q, Arithmetic kind, int64_t layers) {
    if (!error && q.rows && q.columns) error = launch(q, kind, layers, p.multiprocessors, p.warp_groups, p.stream);
  }
};

int64_t whole(double x) { return static_cast<int64_t>(x); }

// With own maps and a depth: rows of all wide old layers that are made at once.
int64_t rows_at_once(const KroneckerExpand& p) {
  const int64_t fit = whole(SHARE * p.L2 * p.M * p.N / (p.L1 * (p.n + p.N)));
  return least(p.M, most(64, fit / 64 * 64));
}

// Else: half products, and the small layers where they are mixed, of one new layer.
int64_t beside(const Plan& plan) { return plan.half() + (plan.mixes_small() ? plan.p.m * plan.p.n : 0); }

int64_t layers_at_once(const Plan& plan) {
  const KroneckerExpand& p = plan.p;
  return least(p.L2, most(1, whole(SHARE * p.L2 * p.M * p.N / beside(plan))));
}

// The backward's memory, in bytes from the workspace on, at most about 1.1 of grad_out where it has 7 layers or more.
struct Memory {
  explicit Memory(const Plan& plan) {
    const KroneckerExpand& p = plan.p;
    const int64_t wide = p.M * p.N, small = p.m * p.n, M = plan.write_rows(), N = plan.read_rows();
    const int64_t half = most(M * p.n, N * p.m);
    const int64_t mixed = plan.mixes_small() ? p.L2 * small : 0;
    layers = plan.mixes_wide() ? p.L1 : p.L2;
    write_parts = p.own_write || layers == 1 ? 0 : plan.sum_parts(M, p.m);
    read_parts = p.own_read || layers == 1 ? 0 : plan.sum_parts(N, p.n);
    const int64_t sums = (write_parts * M * p.m + read_parts * N * p.n) * 4 / plan.size;
    const int64_t fit = (p.L2 * wide - mixed - sums) / most(1, half + (plan.mixes_wide() ? wide : 0));
    group = pieces(layers, pieces(layers, most(1, least(layers, fit))));
    small_at = take(mixed * plan.size);
    wide_at = take(plan.mixes_wide() ? group * wide * plan.size : 0);
    half_at = take(group * half * plan.size);
    write_at = take(write_parts * M * p.m * 4);
    read_at = take(read_parts * N * p.n * 4);
    dots_at = take(p.depth ? plan.dots_parts() * p.L2 * (plan.mixes_wide() ? group : p.L1) * 4 : 0);
  }
  int64_t take(int64_t size) {
    const int64_t first = bytes;
    bytes += pieces(size, 256) * 256;
    return first;
  }
  int64_t bytes = 0;
  int64_t layers, group;            // all, and at once
  int64_t write_parts, read_parts;  // float32 sums of a gradient to which several layers add
  int64_t small_at;                 // mixed small layers, then their gradients, [L2, m, n]
  int64_t wide_at;                  // mixed wide gradients, then wide old layers, [group, M, N]
  int64_t half_at, write_at, read_at, dots_at;
};

// Where units are added: the old ones' corner of the output, then, from where they lie, first the half that costs less.
void extend(Plan& plan) {
  const KroneckerExpand& p = plan.p;
  const int64_t wide = p.M * p.N, small = p.m * p.n, M = plan.write_rows(), N = plan.read_rows();
  const Place right{plan.at(p.out, p.n), p.N, wide}, below{plan.at(p.out, p.m * p.N), p.N, wide};
  const Operand write = Plan::deep(p.write, p.m, 0), read = Plan::deep(p.read, p.n, 0);
  const Operand out = Plan::deep(p.out, p.N, wide), columns = Plan::outer(p.out, p.N, wide);
  plan.mix(Plan::deep(p.depth, p.L1, 0), p.L2, p.L1, Plan::outer(p.weight, p.n, small), p.m, p.n, {p.out, p.N, wide});
  if (N * small + M * p.m * p.N <= M * small + N * p.n * p.M) {
    plan.multiply(out, read, p.m, N, p.n, p.L2, right);
    plan.multiply(write, columns, M, p.N, p.m, p.L2, below);
  } else {
    plan.multiply(write, columns, M, p.n, p.m, p.L2, below);
    plan.multiply(out, read, p.M, N, p.n, p.L2, right);
  }
}

}  // namespace

int64_t forward_workspace(const KroneckerExpand& p) {
  const Plan plan(p);
  if (p.added) return 0;
  return plan.size * (plan.mixes_wide() ? rows_at_once(p) * p.L1 * (p.n + p.N) : layers_at_once(plan) * beside(plan));
}

const char* forward(const KroneckerExpand& p) {
  Plan plan(p);
  const int64_t wide = p.M * p.N, small = p.m * p.n;
  if (p.added) {
    extend(plan);
    return plan.error;
  }
  if (plan.mixes_wide()) {
    const int64_t count = rows_at_once(p);
    for (int64_t row = 0; row < p.M; row += count) {
      const int64_t R = least(count, p.M - row);
      void* y = plan.at(p.workspace, p.L1 * R * p.n);
      plan.widen(true, 0, p.L1, p.weight, row, R, p.workspace, {y, p.N, R * p.N});
      plan.mix(Plan::deep(p.depth, p.L1, 0), p.L2, p.L1, y, R * p.N, R * p.N, plan.at(p.out, row * p.N), wide);
    }
    return plan.error;
  }
  for (int64_t done = 0, group; done < p.L2; done += group) {
    // Of the layers that are left, so many that their small layers and half products fit where the others will be.
    const int64_t left = p.L2 - done, before = left * wide / (beside(plan) + wide), last = layers_at_once(plan);
    group = before > last ? before : least(left, last);
    void* t = before > last ? plan.at(p.out, (done + group) * wide) : p.workspace;
    const void* x = plan.at(p.weight, done * small);
    if (plan.mixes_small()) {
      plan.mix(Plan::deep(plan.at(p.depth, done * p.L1), p.L1, 0), group, p.L1, p.weight, small, small, t, small);
      x = t;
      t = plan.at(t, group * small);
    }
    plan.widen(plan.write_first(), done, group, x, 0, p.M, t, {plan.at(p.out, done * wide), p.N, wide});
  }
  return plan.error;
}

int64_t backward_workspace(const KroneckerExpand& p) { return Memory(Plan(p)).bytes; }

// With x the small layers (mixed ones, where the maps are shared), g their wide gradients:
//     h = g read          dwrite = h xᵀ
//     s = writeᵀ g        dread = sᵀ x        dx = s read
// and where units are added, of which h and s are then alone,
//     h = g[m:, :n] + g[m:, n:] read          dwrite = h xᵀ
//     s = g[:m, n:] + writeᵀ g[m:, n:]        dread = sᵀ x        dx = g[:m, :n] + g[:m, n:] read + writeᵀ h
const char* backward(const KroneckerExpand& p) {
  Plan plan(p);
  const Memory memory(plan);
  const auto bytes = [&](int64_t first) { return static_cast<char*>(p.workspace) + first; };
  const auto floats = [&](int64_t first) { return reinterpret_cast<float*>(bytes(first)); };
  const int64_t wide = p.M * p.N, small = p.m * p.n, M = plan.write_rows(), N = plan.read_rows();
  const bool mixes_small = plan.mixes_small(), mixes_wide = plan.mixes_wide();
  const void* x = p.weight;
  void* dx = p.dweight;
  if (mixes_small) {
    dx = bytes(memory.small_at);
    plan.mix(Plan::deep(p.depth, p.L1, 0), p.L2, p.L1, p.weight, small, small, dx, small);
    x = dx;
  }
  for (int64_t done = 0; done < memory.layers; done += memory.group) {
    const int64_t group = least(memory.group, memory.layers - done);
    const void* g = plan.at(p.grad_out, done * wide);
    if (mixes_wide) {
      void* mixed = bytes(memory.wide_at);
      plan.mix(Plan::outer(plan.at(p.depth, done), p.L1, 0), group, p.L2, p.grad_out, wide, wide, mixed, wide);
      g = mixed;
    }
    const void *xs = plan.at(x, done * small), *write = plan.at(p.write, done * plan.write_layer()),
               *read = plan.at(p.read, done * plan.read_layer());
    void* half = bytes(memory.half_at);
    const Operand writes = Plan::outer(write, p.m, plan.write_layer());
    const Operand reads = Plan::outer(read, p.n, plan.read_layer());
    const auto into = [&](void* gradient, int64_t parts, int64_t parts_at, Operand a, Operand x, int64_t rows,
                          int64_t columns, int64_t depth) {
      if (parts)
        plan.sum(a, x, rows, columns, depth, group * depth, p.kind, floats(parts_at), parts, done > 0);
      else
        plan.multiply(a, x, rows, columns, depth, group,
                      {plan.at(gradient, done * rows * columns), columns, rows * columns});
    };
    const auto into_dwrite = [&](Operand h) {
      into(p.dwrite, memory.write_parts, memory.write_at, h, Plan::deep(xs, p.n, small), M, p.m, p.n);
    };
    const auto into_dread = [&](Operand s) {
      into(p.dread, memory.read_parts, memory.read_at, s, Plan::outer(xs, p.n, small), N, p.n, p.m);
    };
    const bool needs_dx = p.need_weight || mixes_small;
    const Place to{plan.at(dx, done * small), p.n, small};  // over the mixed layers, when nobody reads them any more

    if (p.added) {
      const Operand old = Plan::deep(g, p.N, wide), right = Plan::deep(plan.at(g, p.n), p.N, wide);
      const Operand below = Plan::deep(plan.at(g, p.m * p.N), p.N, wide);
      const void* corner = plan.at(g, p.m * p.N + p.n);
      plan.multiply(writes, Plan::outer(corner, p.N, wide), p.m, N, M, group, {half, N, p.m * N}, right);
      into_dread(Plan::outer(half, N, p.m * N));
      plan.multiply(Plan::deep(corner, p.N, wide), reads, M, p.n, N, group, {half, p.n, M * p.n}, below);
      into_dwrite(Plan::deep(half, p.n, M * p.n));
      if (needs_dx) {
        plan.multiply(right, reads, p.m, p.n, N, group, to, old);
        plan.multiply(writes, Plan::outer(half, p.n, M * p.n), p.m, p.n, M, group, to, Plan::deep(to.data, p.n, small));
      }
      continue;
    }
    plan.multiply(Plan::deep(g, p.N, wide), reads, M, p.n, N, group, {half, p.n, M * p.n});
    into_dwrite(Plan::deep(half, p.n, M * p.n));
    plan.multiply(writes, Plan::outer(g, p.N, wide), p.m, N, M, group, {half, N, p.m * N});
    into_dread(Plan::outer(half, N, p.m * N));
    if (needs_dx) plan.multiply(Plan::deep(half, N, p.m * N), reads, p.m, p.n, N, group, to);
    if (mixes_wide) {
      void* y = bytes(memory.wide_at);
      plan.widen(plan.write_first(), done, group, xs, 0, p.M, half, {y, p.N, wide});
      plan.dots(p.grad_out, p.L2, y, group, wide, floats(memory.dots_at), plan.at(p.ddepth, done));
    }
  }
  if (mixes_small) {
    plan.dots(dx, p.L2, p.weight, p.L1, small, floats(memory.dots_at), p.ddepth);
    if (p.need_weight)
      plan.mix(Plan::outer(p.depth, p.L1, 0), p.L1, p.L2, dx, small, small, p.dweight, small);
  }
  if (memory.write_parts) plan.totals({floats(memory.write_at), p.dwrite, memory.write_parts, M, p.m, p.m});
  if (memory.read_parts) plan.totals({floats(memory.read_at), p.dread, memory.read_parts, N, p.n, p.n});
  return plan.error;
}

}  // namespace gpu
