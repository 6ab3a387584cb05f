// LiGO's expansion on a CPU: which products in which order, memory and threads around cpu/kronecker_expand.cpp.
//
// Maps that all old layers share widen mixed layers, where that is less work, a group of new layers at a time. Of a
// layer x, its new one's gradient g, write W and read A, [I; W] and [I; A] meant where units are added:
//
//   half = W x       out = half A^T       t = g A      dx = W^T t      dW = t x^T      s = W^T g      dA = s^T x
//
// Else the new layers are mixed of wide old ones, a few rows of all layers at a time, with g = depth^T grad_out:
//
//   half = W x       out = depth (half A^T)            ddepth = <grad_out, half A^T>
//   t = g A          dx = W^T t                        dW = t x^T                      dA = g^T half
//
// Where (x A^T) first is less work, all of it is done on transposes: x^T, A, W and g^T for x, W, A and g.

#include "cpu/kronecker_expand.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/dispatch.h"
#include "op.h"

namespace {

using namespace op;

constexpr const char* OP = "kronecker_expand";

// What is in memory besides the result and its gradients: so many bytes, or a tenth of the result.
constexpr double ROOM = 16 << 20, SHARE = 0.1;
constexpr int64_t CACHE = 1 << 17;  // numbers of a mix in L2

int64_t over(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Dense matrices, one for each layer.
template <typename E>
Layers<E> dense(E* rounded, Real<E>* exact, int64_t rows, int64_t columns) {
  return {rounded, exact, columns, 1, rows * columns};
}

template <typename E>
struct Expansion {
  using R = Real<E>;

  const Tensor &like, real_depth;
  int64_t L1, L2, m, n;            // of x
  int64_t rows, columns;           // of W and A
  int64_t old_rows, old_columns;   // kept, above and left of theirs
  bool own, mixed, turned;         // maps of each layer; a depth; transposes are meant
  Layers<E> x, W, A;
  std::vector<Tensor> memory;      // lives as long as this

  Expansion(const Tensor& weight, const Tensor& write, const Tensor& read, const Maybe& depth, bool added)
      : like(weight), real_depth(depth ? torch::stable::to(*depth, TYPE<R>) : weight) {
    L1 = weight.size(0), m = weight.size(1), n = weight.size(2), L2 = depth ? depth->size(0) : L1;
    const bool own_write = write.dim() == 3, own_read = read.dim() == 3;
    rows = write.size(own_write), columns = read.size(own_read);
    old_rows = added ? m : 0, old_columns = added ? n : 0;
    own = own_write || own_read, mixed = bool(depth);
    x = input(weight, m, n), W = input(write, rows, m), A = input(read, columns, n);
    if (!own_write) W.layer = 0;
    if (!own_read) A.layer = 0;
    turned = widening(rows, columns, m, n) > widening(columns, rows, n, m);
    if (!turned) return;
    std::swap(m, n), std::swap(rows, columns), std::swap(old_rows, old_columns), std::swap(W, A);
    x = x.turned();
  }

  // Multiply-adds of one layer, W x first.
  double widening(double rows, double columns, double m, double n) const {
    return rows * m * n + columns * n * (rows + (old_rows ? m : 0));
  }
  int64_t M() const { return old_rows + rows; }
  int64_t N() const { return old_columns + columns; }
  bool by_layers() const {
    if (own || !mixed) return !mixed;
    const double mixes = double(L1) * L2, one = widening(rows, columns, m, n);
    return mixes * m * n + L2 * one <= mixes * M() * N() + L1 * one;
  }
  int64_t room() const {
    const double share = SHARE * sizeof(E) * L2 * M() * N();
    return int64_t((share > ROOM ? share : ROOM) / sizeof(R));
  }

  // How many layers there is room for, of so many numbers each, of which there may be none: no unit is new.
  int64_t layers_at_once(int64_t numbers) const {
    return std::max<int64_t>(1, room() / std::max<int64_t>(1, numbers));
  }

  // Tensors as matrices: an input, or what [I; W] x [I; A]^T is like, as it is meant.
  static Layers<E> input(const Tensor& x, int64_t rows, int64_t columns) {
    E* data = const_cast<E*>(in<E>(x));
    if constexpr (sizeof(E) == sizeof(R)) return dense<E>(nullptr, data, rows, columns);
    else return dense<E>(data, nullptr, rows, columns);
  }
  Layers<E> result(const Tensor& x) const {
    return turned ? input(x, N(), M()).turned() : input(x, M(), N());
  }
  static Layers<E> numbers(const Tensor& x, int64_t rows, int64_t columns) {
    return dense<E>(nullptr, out<R>(x), rows, columns);
  }
  Layers<E> workspace(int64_t layers, int64_t rows, int64_t columns) {
    memory.push_back(empty<R>(like, {layers, rows, columns}));
    return turned ? numbers(memory.back(), columns, rows).turned() : numbers(memory.back(), rows, columns);
  }

  // c = plus + a b, for so many layers, or for the sum over so many. Results whose columns lie side by side are their
  // transposes', and those of mixes: rows of memory are written as they are.
  void multiply(int64_t layers, int64_t rows, int64_t depth, int64_t columns, const Layers<E>& a, const Layers<E>& b,
                const Layers<E>& plus, const Layers<E>& c, int64_t terms = 1) const {
    if (!rows || !columns) return;
    if (c.column != 1)
      return multiply(layers, columns, depth, rows, b.turned(), a.turned(), plus.turned(), c.turned(), terms);
    int64_t most = 256;
    const auto blocks = [&] { return Blocks(rows, columns, most, most); };
    const int64_t wanted = 4 * torch::stable::get_num_threads();
    for (; most > 64 && over(layers, terms) * blocks().count() < wanted;) most -= 32;
    const Product<E> product{over(layers, terms), terms, layers, depth, a, b, plus, c, blocks()};
    run(product, PICK_PRODUCTS(multiply_block, E));
  }
  // to (+)= the sum over layers, in parts that are summed in order: as many as make 64 tasks.
  void multiply_sum(int64_t layers, int64_t rows, int64_t depth, int64_t columns, const Layers<E>& a,
                    const Layers<E>& b, const Layers<E>& to, bool add) const {
    if (to.column != 1) return multiply_sum(layers, columns, depth, rows, b.turned(), a.turned(), to.turned(), add);
    const int64_t blocks = over(rows, 96) * over(columns, 96);
    const int64_t terms = blocks ? over(layers, std::min(layers, over(64, blocks))) : 1, parts = over(layers, terms);
    if (parts <= 1) return multiply(layers, rows, depth, columns, a, b, add ? to : Layers<E>{}, to, layers);
    const Tensor held = empty<R>(like, {parts, rows, columns});
    const Layers<E> part = numbers(held, rows, columns);
    multiply(layers, rows, depth, columns, a, b, {}, part, terms);
    const std::vector<R> ones(parts, 1);
    mix({parts, 1, 0, part, {}, ones.data(), to, {}, {}, add, nullptr, mixing(parts, rows, columns)});
  }

  // The blocks of a mix: all layers' together in a cache. Wide rather than high: of a product's operands, the one that
  // is packed for each layer is used as often as a block is wide.
  static Blocks mixing(int64_t layers, int64_t rows, int64_t columns) {
    const int64_t width = Blocks::side(columns, 256), height = std::max<int64_t>(32, CACHE / (layers * width));
    return {rows, columns, std::min<int64_t>(height, 256), width};
  }
  void mix(const Mix<E>& mix) const {
    const Mix<E> p = in_rows(mix);
    if (p.blocks.rows && p.blocks.columns) run(p, PICK_PRODUCTS(mix_block, E));
  }
  static Mix<E> in_rows(Mix<E> p) {
    if ((p.out ? p.out : p.grad).column == 1) return p;
    const Blocks of = p.blocks;
    p.blocks = p.depth ? Blocks(of.columns, of.rows, of.width, of.height) : mixing(p.old, of.columns, of.rows);
    if (p.depth) std::swap(p.a, p.b);
    for (Layers<E>* x : {&p.a, &p.b, &p.out, &p.grad, &p.back}) *x = x->turned();
    return p;
  }
  // ... and adds dmix to ddepth.
  void mix(Mix<E> p, double* ddepth) const {
    if (!p.blocks.rows || !p.blocks.columns) return;
    p = in_rows(p);
    const int64_t count = p.made * p.old;
    std::vector<double> dmix(p.tasks() * count);
    p.dmix = dmix.data();
    mix(p);
    for (int64_t task = 0; task < p.tasks(); task++)
      for (int64_t i = 0; i < count; i++) ddepth[i] += dmix[task * count + i];
  }
  const R* depth(int64_t i) const { return in<R>(real_depth) + i * L1; }

  template <typename P, typename Kernel>
  static void run(const P& p, Kernel kernel) {
    parallel(p.tasks(), int64_t(p.work() / 16), p.scratch() * sizeof(R),
             [&](int64_t task, void* scratch) { kernel(p, task, static_cast<R*>(scratch)); });
  }

  // f(first, count): so many rows or layers at a time, as equal as may be.
  template <typename F>
  static void in_parts(int64_t size, int64_t most, F f) {
    const int64_t parts = over(size, most), each = parts ? over(size, parts) : 1;
    for (int64_t first = 0; first < size; first += each) f(first, std::min(each, size - first));
  }

  // The layers that [I; W] and [I; A] widen, from the i-th on: mixed into `to`, or the old ones.
  Layers<E> widened(int64_t i, int64_t count, const Layers<E>& to) const {
    if (!mixed) return x.at(i);
    mix({L1, count, 0, x, {}, depth(i), to, {}, {}, false, nullptr, mixing(L1, m, n)});
    return to;
  }

  void forward(const Tensor& result) {
    const Layers<E> out = this->result(result);
    by_layers() ? forward_by_layers(out) : forward_by_rows(out);
  }
  void forward_by_layers(const Layers<E>& out) {
    const bool in_place = old_rows && out.exact;  // x and W x are where they belong, and multiplied there
    const int64_t most = layers_at_once(in_place ? 0 : (mixed ? m * n : 0) + rows * n), group = std::min(most, L2);
    const Layers<E> made = in_place || !mixed ? Layers<E>{} : workspace(group, m, n);
    const Layers<E> halves = in_place ? Layers<E>{} : workspace(group, rows, n);
    in_parts(L2, most, [&](int64_t i, int64_t count) {
      const Layers<E> to = out.at(i), half = in_place ? to.from(m, 0) : halves;
      const Layers<E> x = widened(i, count, in_place ? to : made);
      const Layers<E> A = this->A.at(i).turned();
      multiply(count, rows, m, n, W.at(i), x, {}, half);
      multiply(count, rows, n, columns, half, A, {}, to.from(old_rows, old_columns));
      if (!old_rows) return;
      multiply(count, m, n, columns, x, A, {}, to.from(0, n));
      if (!in_place) multiply(count, rows, 0, n, half, half, half, to.from(m, 0));
      if (!in_place || !mixed) multiply(count, m, 0, n, x, x, x, to);
    });
  }

  // f(first, count, of W): so many rows of [I; W] at a time.
  template <typename F>
  void for_rows(int64_t most, F f) const {
    in_parts(old_rows, most, [&](int64_t first, int64_t count) { f(first, count, false); });
    in_parts(rows, most, [&](int64_t first, int64_t count) { f(first, count, true); });
  }
  int64_t rows_at_once(int64_t numbers) const { return std::max<int64_t>(32, room() / (L1 * numbers)); }
  // These rows of [I; W] x of all old layers: computed into `to`, or x's.
  Layers<E> rows_of(int64_t first, int64_t count, bool of_write, const Layers<E>& to) const {
    if (!of_write) return x.from(first, 0);
    multiply(L1, count, m, n, W.from(first, 0), x, {}, to);
    return to;
  }

  void forward_by_rows(const Layers<E>& out) {
    const int64_t most = std::min(rows_at_once(n), std::max(rows, old_rows));
    const Layers<E> halves = workspace(L1, most, n);
    for_rows(most, [&](int64_t first, int64_t count, bool of_write) {
      const Layers<E> half = rows_of(first, count, of_write, halves);
      const Layers<E> to = out.from(first + of_write * old_rows, 0);
      mix({L1, L2, 0, half, {}, depth(0), to, {}, {}, false, nullptr, mixing(L1, count, old_columns)});
      mix({L1, L2, n, half, A.turned(), depth(0), to.from(0, old_columns), {}, {}, false, nullptr,
           mixing(L1, count, columns)});
    });
  }

  // Gradients, in the arithmetic's type; dx may be nothing.
  struct Gradients {
    Layers<E> x, W, A;
    double* depth;
  };
  void backward(const Tensor& grad_out, Gradients to) {
    if (turned) std::swap(to.W, to.A), to.x = to.x.turned();
    if (!W.layer) to.W.layer = 0;
    if (!A.layer) to.A.layer = 0;
    const Layers<E> grad = result(grad_out);
    by_layers() ? backward_by_layers(grad, to) : backward_by_rows(grad, to);
  }

  // A map's gradient: of each layer, or the sum over layers.
  void of_map(int64_t count, int64_t rows, int64_t depth, int64_t columns, const Layers<E>& a, const Layers<E>& b,
              const Layers<E>& to, bool add) const {
    if (to.layer) return multiply(count, rows, depth, columns, a, b, add ? to : Layers<E>{}, to);
    multiply_sum(count, rows, depth, columns, a, b, to, add);
  }

  void backward_by_layers(const Layers<E>& grad, const Gradients& to) {
    const int64_t most = std::min(layers_at_once((mixed ? 2 * m * n : 0) + rows * n + m * columns), L2);
    const Layers<E> made = mixed ? workspace(most, m, n) : Layers<E>{}, dmade = mixed ? workspace(most, m, n) : made;
    const Layers<E> t = workspace(most, rows, n), s = workspace(most, m, columns);
    in_parts(L2, most, [&](int64_t i, int64_t count) {
      const Layers<E> x = widened(i, count, made), g = grad.at(i), W = this->W.at(i), A = this->A.at(i);
      const Layers<E> dx = mixed ? dmade : to.x.at(i);
      const auto kept = [&](const Layers<E>& part) { return old_rows ? part : Layers<E>{}; };
      const Layers<E> below = g.from(old_rows, 0), right = g.from(0, old_columns), corner = below.from(0, old_columns);
      multiply(count, rows, columns, n, corner, A, kept(below), t);
      of_map(count, rows, n, m, t, x.turned(), to.W.at(i), i > 0 && !to.W.layer);
      multiply(count, m, rows, columns, W.turned(), corner, kept(right), s);
      of_map(count, columns, m, n, s.turned(), x, to.A.at(i), i > 0 && !to.A.layer);
      if (!dx) return;
      if (old_rows) multiply(count, m, columns, n, right, A, g, dx);
      multiply(count, m, rows, n, W.turned(), t, kept(dx), dx);
      if (!mixed) return;
      const Mix<E> back{L1, count, 0, this->x, {}, depth(i), {}, dx, to.x, i > 0, nullptr, mixing(L1, m, n)};
      mix(back, to.depth + i * L1);
    });
  }

  void backward_by_rows(const Layers<E>& grad, const Gradients& to) {
    const int64_t most = std::min(rows_at_once(2 * n + N()), std::max(rows, old_rows));
    const Layers<E> halves = workspace(L1, most, n), t = workspace(L1, most, n), gs = workspace(L1, most, N());
    for_rows(most, [&](int64_t first, int64_t count, bool of_write) {
      const Layers<E> half = rows_of(first, count, of_write, halves), g = gs.from(0, old_columns);
      const Layers<E> part = grad.from(first + of_write * old_rows, 0);
      const bool begun = first > 0 || (of_write && old_rows);
      mix({L1, L2, 0, half, {}, depth(0), {}, part, gs, false, nullptr, mixing(L1, count, old_columns)}, to.depth);
      mix({L1, L2, n, half, A.turned(), depth(0), {}, part.from(0, old_columns), g, false, nullptr,
           mixing(L1, count, columns)}, to.depth);
      of_map(L1, columns, count, n, g.turned(), half, to.A, begun);
      if (!of_write && to.x) multiply(L1, count, columns, n, g, A, gs, to.x.from(first, 0));
      if (!of_write) return;
      multiply(L1, count, columns, n, g, A, old_columns ? gs : Layers<E>{}, t);
      of_map(L1, count, n, m, t, x.turned(), to.W.from(first, 0), false);
      if (to.x) multiply(L1, m, count, n, W.from(first, 0).turned(), t, begun ? to.x : Layers<E>{}, to.x);
    });
  }
};

Tensor forward(const Tensor& weight, const Tensor& write, const Tensor& read, const Maybe& depth, bool added, bool) {
  return with_element(OP, "weight", weight, [&](auto element) {
    using E = decltype(element);
    Expansion<E> p(weight, write, read, depth, added);
    const int64_t M = p.turned ? p.N() : p.M(), N = p.turned ? p.M() : p.N();
    const Tensor out = empty<E>(weight, {p.L2, M, N});
    p.forward(out);
    return out;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& weight, const Tensor& write,
                                                    const Tensor& read, const Maybe& depth, bool added, bool,
                                                    bool need_weight) {
  return with_element(OP, "weight", weight, [&](auto element) {
    using E = decltype(element);
    using R = Real<E>;
    Expansion<E> p(weight, write, read, depth, added);
    const auto like = [&](const Tensor& x, bool needed) {
      return empty<R>(weight, needed ? Shape(x.sizes().begin(), x.sizes().end()) : Shape{0});
    };
    const auto matrices = [&](const Tensor& x) {
      return x.dim() < 2 ? Layers<E>{} : p.numbers(x, x.size(x.dim() - 2), x.size(x.dim() - 1));
    };
    const Tensor dweight = like(weight, need_weight), dwrite = like(write, true), dread = like(read, true);
    Tensor ddepth = empty<double>(weight, {depth ? p.L2 * p.L1 : 0});
    torch::stable::zero_(ddepth);
    p.backward(grad_out, {matrices(dweight), matrices(dwrite), matrices(dread), op::out<double>(ddepth)});
    if (depth) ddepth = torch::stable::view(ddepth, {p.L2, p.L1});
    const auto rounded = [](const Tensor& x) { return torch::stable::to(x, TYPE<E>); };
    return std::make_tuple(rounded(dweight), rounded(dwrite), rounded(dread), rounded(ddepth));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lcikernels_cpp, CPU, m) {
  m.impl("kronecker_expand_forward", TORCH_BOX(&forward));
  m.impl("kronecker_expand_backward", TORCH_BOX(&backward));
}
