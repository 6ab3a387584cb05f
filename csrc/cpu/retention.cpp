// Retention on a CPU. Both passes are scans of one form over the tokens of a head: each token writes an outer product
// into a state M [K, V], and tokens read it from the left, from the right or from both sides:
//
//   M = exp(log_decay) M + a (x) b          y = c . M          z = M . d
//
//   forward                       a = k   b = v   c = q                y = o
//   backward, in order            a = k   b = v           d = do       z = dq
//   backward, last token first    a = q   b = do  c = k   d = v        y = dv   z = dk     M = the state's gradient
//
// A scan goes in chunks of 32 tokens. In a chunk there are four decays: decay[j, i] from writer j to a reader i >= j (0
// for i < j), in[i] from the state that enters to reader i, out[j] from writer j to the state that leaves, and in_end
// across:
//
//   y   = (c in) M       + left^T b           left[j, i]  = decay[j, i] a[j] . c[i]
//   z^T = M (d in)^T     + a^T right          right[j, i] = decay[j, i] b[j] . d[i]
//   M'  = in_end M       + (a out)^T b
//
// These are all the products there are, and one micro-kernel computes them from panels, into which a chunk is packed. A
// task owns some columns of V of one head, or of several that share q, k or v, one after another; M stays in the cache.

#include "vec.h"

#include "retention.h"

namespace ISA {
namespace {

constexpr int64_t CHUNK = 32;

// A matrix in panels of W columns, [columns / W, rows, W].
template <typename R>
constexpr int64_t W = 2 * LANES<R>;

template <typename R>
INLINE int64_t padded(int64_t columns) {
  return (columns + W<R> - 1) / W<R> * W<R>;
}

template <typename R>
struct Panels {
  R* data;
  int64_t rows;

  INLINE_MEMBER R* at(int64_t row, int64_t column) const {
    return data + (column / W<R> * rows + row) * W<R> + column % W<R>;
  }
};

// Rows in a tensor, `step` elements apart. step < 0: the last one first.
template <typename E>
struct Rows {
  E* first;
  int64_t step;

  INLINE_MEMBER E* at(int64_t row, int64_t column = 0) const { return first + row * step + column; }
};

// The rows that the next chunk will need, on their way to L2 while tiles compute. They lie H K or H V apart, where no
// hardware prefetcher follows: 6 % of the forward pass at H = 4, K = 128, V = 256, with large pages 11 %.
struct Ahead {
  struct Block {
    const char* row;
    int64_t step, bytes, rows;
  } blocks[6];
  int64_t count = 0;

  // The CHUNK rows behind these n.
  template <typename E>
  void add(const Rows<E>& rows, int64_t n, int64_t width) {
    const int64_t size = sizeof(E);
    if (rows.first) blocks[count++] = {(const char*)rows.at(n), rows.step * size, width * size, CHUNK};
  }
  void fetch() {
    for (int64_t lines = 0; lines < 16 && count;) {
      Block& last = blocks[count - 1];
      for (int64_t byte = 0; byte < last.bytes; byte += 64, lines++) __builtin_prefetch(last.row + byte, 0, 2);
      last.row += last.step;
      if (--last.rows == 0) count--;
    }
  }
};

// The micro-kernel: C = keep C + A B for ROWS rows and one panel of columns. C is not read where keep is 0.

// Sums of ROWS rows: a recursion, for an array of vectors would not stay in registers.
template <int ROWS, typename R>
struct Sums {
  Vec<R> first{}, second{};
  Sums<ROWS - 1, R> below;

  INLINE_MEMBER void add(const R* a, int64_t step, Vec<R> b0, Vec<R> b1) {
    first = fma(splat(*a), b0, first);
    second = fma(splat(*a), b1, second);
    below.add(a + step, step, b0, b1);
  }
  INLINE_MEMBER void put(R* c, R keep) const {
    store(c, keep == 0 ? first : fma(splat(keep), load(c), first));
    store(c + LANES<R>, keep == 0 ? second : fma(splat(keep), load(c + LANES<R>), second));
    below.put(c + W<R>, keep);
  }
};
template <typename R>
struct Sums<0, R> {
  INLINE_MEMBER void add(const R*, int64_t, Vec<R>, Vec<R>) {}
  INLINE_MEMBER void put(R*, R) const {}
};

// Two vectors wide: the sums take 28 of 32 registers, or 12 of 16.
#if defined(__AVX512F__)
constexpr int TALLEST = 14;
#else
constexpr int TALLEST = 6;
#endif

// A[d, r] is a[d W + r]. TURNED, where A is the transpose of what lies in panels, it is a[r W + d], and every W-th d is
// a `jump` further on.
template <int ROWS, bool TURNED, typename R>
__attribute__((noinline)) void tile(const R* a, int64_t jump, const R* b, int64_t depth, R keep, R* c) {
  Sums<ROWS, R> sums;
  while (depth > 0) {
    const int64_t run = depth < W<R> ? depth : W<R>;
    for (int64_t d = 0; d < run; d++, b += W<R>, a += TURNED ? 1 : W<R>)
      sums.add(a, TURNED ? W<R> : 1, load(b), load(b + LANES<R>));
    if (TURNED) a += jump;
    depth -= run;
  }
  keep == 0 ? sums.put(c, R(0)) : sums.put(c, keep);  // twice, for the choice to be made once
}

template <int ROWS, bool TURNED, typename R>
INLINE void tile_of(int64_t rows, const R* a, int64_t jump, const R* b, int64_t depth, R keep, R* c) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return tile_of<ROWS - 1, TURNED>(rows, a, jump, b, depth, keep, c);
  tile<ROWS, TURNED>(a, jump, b, depth, keep, c);
}

// c = keep c + a^T b, or TURNED a b, for one panel of b and c, in equally high tiles: 32 rows are 11, 11 and 10.
// TRIANGLE: the depth of a row ends at its diagonal.
enum Shape { FULL, TRIANGLE };

template <bool TURNED, typename R>
void multiply(Ahead& ahead, const Panels<R>& a, const R* b, R* c, int64_t rows, int64_t depth, R keep,
              Shape shape = FULL) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = W<R> - r % W<R> < rows - r ? W<R> - r % W<R> : rows - r;
    const int64_t tiles = (left + TALLEST - 1) / TALLEST, height = (left + tiles - 1) / tiles;
    const int64_t until = shape == TRIANGLE && r + height < depth ? r + height : depth;
    ahead.fetch();
    tile_of<TALLEST, TURNED>(height, TURNED ? a.at(r, 0) : a.at(0, r), (a.rows - 1) * W<R>, b, until, keep,
                             c + r * W<R>);
    r += height;
  }
}

// Between tensors and panels.

// f(column, count) for each vector of a row. It is inlined twice: but for the last vector, count is a constant.
template <typename R, typename F>
INLINE void for_vectors(int64_t width, F f) {
  int64_t column = 0;
  for (; column + LANES<R> <= width; column += LANES<R>) f(column, LANES<R>);
  if (column < width) f(column, width - column);
}
#define INLINE_LAMBDA __attribute__((always_inline))

// x <- factor times n rows `width` wide; weighed <- row i of that times weight[i].
template <typename E, typename R = Real<E>>
void pack(const Rows<const E>& from, int64_t n, int64_t width, R factor, const Panels<R>& x,
          const R* weight = nullptr, const Panels<R>& weighed = {}) {
  for (int64_t i = 0; i < n; i++)
    for_vectors<R>(width, [&](int64_t column, int64_t count) INLINE_LAMBDA {
      const Vec<R> value = factor * load(from.at(i, column), count);
      store(x.at(i, column), value);
      if (weight) store(weighed.at(i, column), weight[i] * value);
    });
}

// The same transposed: row i is column i of x [width, CHUNK], and zeros follow the n-th.
template <typename E, typename R = Real<E>>
void pack_transposed(const Rows<const E>& from, int64_t n, int64_t width, R factor, const Panels<R>& x,
                     const R* weight, const Panels<R>& weighed) {
  for (int64_t i = 0; i < CHUNK; i += LANES<R>)
    for_vectors<R>(width, [&](int64_t row, int64_t count) INLINE_LAMBDA {
      Vec<R> block[LANES<R>];
      for (int64_t j = 0; j < LANES<R>; j++)
        block[j] = i + j < n ? factor * load(from.at(i + j, row), count) : Vec<R>{};
      transpose<R>(block);
      for (int64_t j = 0; j < count; j++) {
        store(x.at(row + j, i), block[j]);
        store(weighed.at(row + j, i), load(weight + i) * block[j]);
      }
    });
}

// Where rows of a result go: to their place, or else into a layer, added to what is there already.
template <typename E>
struct Sink {
  Rows<E> whole;
  Rows<Real<E>> layer;
  bool add;

  INLINE_MEMBER void put(int64_t row, int64_t column, Vec<Real<E>> value, int64_t count) const {
    if (whole.first) return store(whole.at(row, column), value, count);
    if (add) value += load(layer.at(row, column), count);
    store(layer.at(row, column), value, count);
  }
};

template <typename E, typename R = Real<E>>
void unpack(const Panels<R>& x, int64_t n, int64_t width, const Sink<E>& to) {
  for (int64_t i = 0; i < n; i++)
    for_vectors<R>(width, [&](int64_t column, int64_t count) INLINE_LAMBDA {
      to.put(i, column, load(x.at(i, column)), count);
    });
}

// x [width, CHUNK] -> n rows
template <typename E, typename R = Real<E>>
void unpack_transposed(const Panels<R>& x, int64_t n, int64_t width, R factor, const Sink<E>& to) {
  for (int64_t i = 0; i < n; i += LANES<R>)
    for_vectors<R>(width, [&](int64_t row, int64_t count) INLINE_LAMBDA {
      Vec<R> block[LANES<R>];
      for (int64_t j = 0; j < LANES<R>; j++) block[j] = j < count ? load(x.at(row + j, i)) : Vec<R>{};
      transpose<R>(block);
      for (int64_t j = 0; j < LANES<R> && i + j < n; j++) to.put(i + j, row, factor * block[j], count);
    });
}

// A chunk: its memory, and the equations on top.

// 2^x for CHUNK x <= 0. What rounding x to float loses is 8 ulps of 2^x at x = -17: it is multiplied back. 0 where the
// vectors' exp2 stops, at 1.2e-38: what is forgotten is gone.
template <typename R>
INLINE void powers_of_two(const double* x, R* powers) {
  R rounded[CHUNK], lost[CHUNK];
  for (int64_t i = 0; i < CHUNK; i++) rounded[i] = R(x[i]), lost[i] = R((x[i] - rounded[i]) * 0.6931471805599453);
  for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
    const Vec<R> power = exp2(load(rounded + i)), exact = fma(power, load(lost + i), power);
    store(powers + i, load(rounded + i) < R(sizeof(R) == 4 ? -126 : -1022) ? Vec<R>{} : exact);
  }
}

// Memory for one chunk and the state, in the names of the equations.
template <typename R>
struct Workspace {
  int64_t K, V, used = 0;
  R* memory;
  Panels<R> a, a_out, b, c, c_in, d, d_in, decay, left, right, y, z, state;
  R *in, *out, in_end;
  int64_t decays_of = 0;                   // the n that decay, in and out are for; 0: none
  Ahead ahead;

  Workspace(R* memory, int64_t K, int64_t V) : K(K), V(V), memory(memory) {
    a = panels(CHUNK, K), a_out = panels(CHUNK, K);
    b = panels(CHUNK, V), y = panels(CHUNK, V);
    c = panels(K, CHUNK), c_in = panels(K, CHUNK), z = panels(K, CHUNK);
    d = panels(V, CHUNK), d_in = panels(V, CHUNK);
    decay = panels(CHUNK, CHUNK), left = panels(CHUNK, CHUNK), right = panels(CHUNK, CHUNK);
    state = panels(K, V);
    in = take(CHUNK), out = take(CHUNK);
  }

  R* take(int64_t count) {
    R* here = memory ? memory + used : nullptr;
    used += padded<R>(count);
    return here;
  }
  Panels<R> panels(int64_t rows, int64_t columns) { return {take(rows * padded<R>(columns)), rows}; }
  int64_t state_bytes() const { return sizeof(R) * K * padded<R>(V); }

  // The decays of n tokens with these rates. A token's own rate counts before the token, but after it in a scan from the
  // last one. A rate below -1e3 would swallow its neighbours in the sums, which are float64: beside a decay of e^-100
  // float32 would leave 1e-5.
  void enter(const Rows<const R>& rates, int64_t n, bool reversed) {
    if (rates.step == 0 && decays_of == n) return;
    decays_of = n;
    constexpr double NEVER = -1e6, HALVINGS = 1.4426950408889634;
    double time[CHUNK], x[CHUNK], now = 0;
    for (int64_t i = 0; i < n; i++) {
      const double rate = *rates.at(i), before = now;
      now += HALVINGS * (rate < -1e3 ? -1e3 : rate);
      time[i] = reversed ? before : now;
    }
    for (int64_t i = n; i < CHUNK; i++) time[i] = NEVER;
    R row[CHUNK];
    for (int64_t j = 0; j < n; j++) {
      for (int64_t i = 0; i < CHUNK; i++) {
        const double since = time[i] - time[j];  // inside ?: it would be a branch
        x[i] = i < j ? NEVER : since;
      }
      powers_of_two(x, row);
      for (int64_t i = 0; i < CHUNK; i += LANES<R>) store(decay.at(j, i), load(row + i));
    }
    powers_of_two(time, in);
    for (int64_t i = 0; i < CHUNK; i++) x[i] = i < n ? now - time[i] : now;
    powers_of_two(x, out);
    x[0] = now;
    powers_of_two(x, row);
    in_end = row[0];
  }

  template <typename E>
  void take_writers(int64_t n, const Rows<const E>& from_a, R factor, const Rows<const E>& from_b) {
    pack(from_a, n, K, factor, a, out, a_out);
    pack(from_b, n, V, R(1), b);
    ahead.add(from_a, n, K);
    ahead.add(from_b, n, V);
  }
  template <typename E>
  void take_left_readers(int64_t n, const Rows<const E>& from, R factor) {
    pack_transposed(from, n, K, factor, c, in, c_in);
    ahead.add(from, n, K);
  }
  template <typename E>
  void take_right_readers(int64_t n, const Rows<const E>& from) {
    pack_transposed(from, n, V, R(1), d, in, d_in);
    ahead.add(from, n, V);
  }

  // to[j, i] = x[j] . y[i] down to the diagonal: the first rows of the panel of columns i, or all n.
  void products(int64_t n, int64_t depth, const Panels<R>& x, const Panels<R>& y, const Panels<R>& to) {
    for (int64_t i = 0; i < n; i += W<R>)
      multiply<true>(ahead, x, y.at(0, i), to.at(0, i), n < i + W<R> ? n : i + W<R>, depth, R(0));
  }
  // ... times decay. What a decay of 0 hides may be anything.
  void fade(int64_t n, const Panels<R>& x) {
    for (int64_t j = 0; j < n; j++)
      for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
        const Vec<R> weight = load(decay.at(j, i));
        store(x.at(j, i), weight == 0 ? Vec<R>{} : weight * load(x.at(j, i)));
      }
  }

  void find_left(int64_t n) {
    products(n, K, a, c, left);
    fade(n, left);
  }
  // z^T, and where asked: `through_state`, the part of c . z that comes from the state, and sums of left times right.
  void read_from_right(int64_t n, R* through_state, R* pairs) {
    products(n, V, b, d, right);
    if (pairs) sum_pairs(n, pairs);
    fade(n, right);
    for (int64_t i = 0; i < n; i += W<R>) multiply<true>(ahead, state, d_in.at(0, i), z.at(0, i), K, V, R(0));
    if (through_state) column_products(c, z, through_state);
    for (int64_t i = 0; i < n; i += W<R>)
      multiply<false>(ahead, a, right.at(0, i), z.at(0, i), K, n < i + W<R> ? n : i + W<R>, R(1));
  }
  // y where asked, and M': panel by panel, each read and written while it is in L1.
  void write(int64_t n, const Panels<R>& state, bool read_from_left) {
    for (int64_t v = 0; v < V; v += W<R>) {
      if (read_from_left) {
        multiply<false>(ahead, c_in, state.at(0, v), y.at(0, v), n, K, R(0));
        multiply<false>(ahead, left, b.at(0, v), y.at(0, v), n, n, R(1), TRIANGLE);
      }
      multiply<false>(ahead, a_out, b.at(0, v), state.at(0, v), K, n, in_end);
    }
    ahead.count = 0;
  }

  template <typename E>
  void put_y(int64_t n, const Sink<E>& to) {
    unpack(y, n, V, to);
    ahead.add(to.whole, n, V);
  }
  template <typename E>
  void put_z(int64_t n, R factor, const Sink<E>& to) {
    unpack_transposed(z, n, K, factor, to);
    ahead.add(to.whole, n, K);
  }

  // sums[r]: left[j, i] right[j, i] over j <= r < i, what the rate of token r lies between. Only `left` has faded yet.
  void sum_pairs(int64_t n, R* sums) {
    R after[CHUNK] = {};
    for (int64_t r = 0; r < n; r++) {
      Vec<R> total{};
      for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
        const Vec<R> pairs = load(left.at(r, i)) * load(right.at(r, i));
        store(after + i, load(after + i) + (load(decay.at(r, i)) == 0 ? Vec<R>{} : pairs));
      }
      after[r] = 0;
      for (int64_t i = 0; i < CHUNK; i += LANES<R>) total += load(after + i);
      sums[r] = sum<R>(total);
    }
  }
};

// sums[i] = x[:, i] . y[:, i], in runs of 32.
template <typename R>
void column_products(const Panels<R>& x, const Panels<R>& y, R* sums) {
  for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
    Vec<R> total{};
    for (int64_t row = 0; row < x.rows;) {
      Vec<R> run{};
      for (const int64_t end = row + 32 < x.rows ? row + 32 : x.rows; row < end; row++)
        run = fma(load(x.at(row, i)), load(y.at(row, i)), run);
      total += run;
    }
    store(sums + i, total);
  }
}

template <typename R>
double product(const Panels<R>& x, const Panels<R>& y, int64_t columns) {
  double total = 0;
  for_vectors<R>(columns, [&](int64_t column, int64_t) {
    Vec<R> sums{};
    for (int64_t row = 0; row < x.rows; row++) sums = fma(load(x.at(row, column)), load(y.at(row, column)), sums);
    total += sum<R>(sums);
  });
  return total;
}

// n tokens in the order of a scan: from `first` on, or reversed, back.
struct Chunk {
  int64_t first, n;
  bool reversed;

  template <typename E>
  Rows<E> of(const Rows<E>& tokens) const {
    return {tokens.first ? tokens.at(first) : nullptr, reversed ? -tokens.step : tokens.step};
  }
  template <typename E>
  Sink<E> of(const Sink<E>& sink) const {
    return {of(sink.whole), of(sink.layer), sink.add};
  }
};

// What the gradient of the rates needs from the scan in order. Of the states, those that enter every `every`-th chunk
// and those of one run of `every` chunks, computed again from its first: 2 sqrt(chunks) states in all.
template <typename R>
struct Kept {
  int64_t every = 1, size;
  R *firsts = nullptr, *run = nullptr;
  R* readers = nullptr;                    // for each token, the part of q . dq that comes from the state

  Kept(Workspace<R>& w, int64_t T, bool wanted) : size(w.state_bytes() / sizeof(R)) {
    while (every * every * CHUNK < T) every++;
    if (wanted) firsts = w.take(every * size), run = w.take(every * size), readers = w.take(T + CHUNK);
  }
  R* first_of_run(int64_t chunk) const { return firsts + chunk / every * size; }
  R* in_run(int64_t chunk) const { return run + chunk % every * size; }
};

// Sequence n, `heads` heads from `head` on, columns v0 to v0 + V of v, o and the state; tokens begin to end of a row.
template <typename E>
struct Task {
  using R = Real<E>;

  const Retention<E>& p;
  const int64_t split, head, n, v0, V, row, begin, end;
  Workspace<R> w;
  const Kept<R> kept;

  Task(const Retention<E>& p, int64_t index, R* scratch, bool backward)
      : p(p),
        split(index % p.splits()),
        head(index / p.splits() % (p.H / p.heads) * p.heads),
        n(index / p.splits() / (p.H / p.heads)),
        v0(split * p.columns),
        V(p.V - v0 < p.columns ? p.V - v0 : p.columns),
        row(p.cu_seqlens ? 0 : n),
        begin(p.cu_seqlens ? p.cu_seqlens[n] : 0),
        end(p.cu_seqlens ? p.cu_seqlens[n + 1] : p.T),
        w(scratch, p.K, V),
        kept(w, p.T, backward && p.dlog_decay) {}

  // Head h's rows of x [B, T, Hx, width], from `column` on: dense, or where it lies.
  template <typename X>
  Rows<X> rows(X* x, int64_t h, int64_t Hx, int64_t width, int64_t column = 0) const {
    return {x ? x + (row * p.T * Hx + h / (p.H / Hx)) * width + column : nullptr, Hx * width};
  }
  template <typename X>
  Rows<X> rows(const Heads<X>& x, int64_t h, int64_t Hx, int64_t column = 0) const {
    return {x.data ? x.at(row, 0, h / (p.H / Hx)) + column : nullptr, x.token};
  }
  // Where its gradient goes. A task that sees some columns of V only has a layer of its own for the others.
  Sink<E> sink(const RetentionGradient<E>& to, int64_t h, int64_t Hx, int64_t width, bool whole_width) const {
    const int64_t shared = p.H / Hx, column = whole_width ? 0 : v0;
    const int64_t layer = whole_width ? h % shared / p.heads * p.splits() + split : h % shared / p.heads;
    R* const here = to.layers ? to.layers + layer * p.B * p.T * Hx * width : nullptr;
    return {rows(to.whole, h, Hx, width, column), rows(here, h, Hx, width, column), h % shared > 0 && h > head};
  }
  template <typename X>
  Rows<X> state(X* x, int64_t h) const {
    return {x ? x + (n * p.H + h) * p.K * p.V + v0 : nullptr, p.V};
  }
  void read_state(const R* from, int64_t h) {
    w.decays_of = 0;
    if (from) return pack(Rows<const R>(state(from, h)), p.K, V, R(1), w.state);
    memset(w.state.data, 0, w.state_bytes());
  }
  void write_state(R* to, int64_t h) const { unpack(w.state, p.K, V, Sink<R>{state(to, h), {}, false}); }

  int64_t chunks() const { return (end - begin + CHUNK - 1) / CHUNK; }
  Chunk chunk(int64_t i, bool reversed) const {
    const int64_t first = begin + i * CHUNK, n = end - first < CHUNK ? end - first : CHUNK;
    return {reversed ? first + n - 1 : first, n, reversed};
  }
};

// The scans over one head of a task.
template <typename E>
struct Head {
  using R = Real<E>;

  Task<E>& task;
  const int64_t h;
  const Retention<E>& p = task.p;
  const Kept<R>& kept = task.kept;
  Workspace<R>& w = task.w;
  const Rows<const E> q = task.rows(p.q, h, p.Hq), k = task.rows(p.k, h, p.Hk);
  const Rows<const E> v = task.rows(p.v, h, p.Hv, task.v0), grad_o = task.rows(p.grad_o, h, p.H, task.v0);
  const Rows<const R> rates =
      p.per_token ? task.rows(p.log_decay, h, p.H, 1) : Rows<const R>{p.log_decay + h, 0};

  // k and v are what is written, as they are in order.
  void enter_in_order(const Chunk& chunk) {
    w.enter(chunk.of(rates), chunk.n, false);
    w.take_writers(chunk.n, chunk.of(k), R(1), chunk.of(v));
  }

  void forward() {
    const Sink<E> o = {task.rows(p.o, h, p.H, p.V, task.v0), {}, false};
    task.read_state(p.initial_state, h);
    for (int64_t i = 0; i < task.chunks(); i++) {
      const Chunk chunk = task.chunk(i, false);
      enter_in_order(chunk);
      w.take_left_readers(chunk.n, chunk.of(q), p.scale);
      w.find_left(chunk.n);
      w.write(chunk.n, w.state, true);
      w.put_y(chunk.n, chunk.of(o));
    }
    task.write_state(p.final_state, h);
  }

  // What the tokens add to a state that crosses them.
  void crossing() {
    task.read_state(nullptr, h);
    for (int64_t i = 0; i < task.chunks(); i++) {
      const Chunk chunk = task.chunk(i, false);
      enter_in_order(chunk);
      w.write(chunk.n, w.state, false);
    }
    task.write_state(p.final_state, h);
  }

  // And to its gradient, from behind.
  void crossing_back() {
    task.read_state(nullptr, h);
    for (int64_t i = task.chunks() - 1; i >= 0; i--) {
      const Chunk chunk = task.chunk(i, true);
      w.enter(chunk.of(rates), chunk.n, true);
      w.take_writers(chunk.n, chunk.of(q), p.scale, chunk.of(grad_o));
      w.write(chunk.n, w.state, false);
    }
    task.write_state(p.dinitial_state, h);
  }

  // The gradient of q.
  void backward_in_order() {
    const Sink<E> dq = task.sink(p.dq, h, p.Hq, p.K, true);
    task.read_state(p.initial_state, h);
    for (int64_t i = 0; i < task.chunks(); i++) {
      const Chunk chunk = task.chunk(i, false);
      enter_in_order(chunk);
      w.take_right_readers(chunk.n, chunk.of(grad_o));
      if (p.dlog_decay) {
        if (i % kept.every == 0) memcpy(kept.first_of_run(i), w.state.data, w.state_bytes());
        w.take_left_readers(chunk.n, chunk.of(q), p.scale);
      }
      w.read_from_right(chunk.n, p.dlog_decay ? kept.readers + i * CHUNK : nullptr, nullptr);
      w.write(chunk.n, w.state, false);
      w.put_z(chunk.n, p.scale, chunk.of(dq));
    }
  }

  // The gradients of k, v, the rates and the initial state.
  void backward_reversed() {
    const Sink<E> dk = task.sink(p.dk, h, p.Hk, p.K, true), dv = task.sink(p.dv, h, p.Hv, p.V, false);
    double drates = 0;
    task.read_state(p.dfinal_state, h);
    for (int64_t last = task.chunks() - 1, i = last; i >= 0; i--) {
      if (p.dlog_decay && (i == last || (i + 1) % kept.every == 0)) compute_run_again(i);
      const Chunk chunk = task.chunk(i, true);
      R pairs[CHUNK], writers[CHUNK];
      w.enter(chunk.of(rates), chunk.n, true);
      w.take_writers(chunk.n, chunk.of(q), p.scale, chunk.of(grad_o));
      w.take_left_readers(chunk.n, chunk.of(k), R(1));
      w.take_right_readers(chunk.n, chunk.of(v));
      w.find_left(chunk.n);
      w.read_from_right(chunk.n, p.dlog_decay ? writers : nullptr, p.dlog_decay ? pairs : nullptr);
      if (p.dlog_decay) {
        const double across = w.in_end * product<R>({kept.in_run(i), p.K}, w.state, task.V);
        drates += put_drates(chunk, across, kept.readers + i * CHUNK, writers, pairs);
      }
      w.write(chunk.n, w.state, true);
      w.put_y(chunk.n, chunk.of(dv));
      w.put_z(chunk.n, R(1), chunk.of(dk));
    }
    task.write_state(p.dinitial_state, h);
    if (p.dlog_decay && !p.per_token) p.dlog_decay[(task.split * p.N + task.n) * p.H + h] = drates;
  }

  // The states that enter the chunks of a run, up to `last`.
  void compute_run_again(int64_t last) {
    const int64_t first = last / kept.every * kept.every;
    memcpy(kept.in_run(first), kept.first_of_run(first), w.state_bytes());
    w.decays_of = 0;
    for (int64_t i = first; i < last; i++) {
      memcpy(kept.in_run(i + 1), kept.in_run(i), w.state_bytes());
      enter_in_order(task.chunk(i, false));
      w.write(CHUNK, {kept.in_run(i + 1), p.K}, false);
    }
    w.decays_of = 0;
  }

  // A token's rate weighs what is written before the token and read at it or later. Only sums of its own pairs, never a
  // difference of larger sums: of pairs across the chunk, with the reader, the writer or both inside.
  double put_drates(const Chunk& chunk, double across, const R* readers, const R* writers, const R* pairs) {
    double drates[CHUNK], of_writers = 0, of_readers = 0, total = 0;
    for (int64_t i = chunk.n - 1; i >= 0; i--) {
      drates[i] = across + of_writers + pairs[i];
      of_writers += writers[i];
    }
    for (int64_t i = 0; i < chunk.n; i++) {
      of_readers += readers[chunk.n - 1 - i];
      drates[i] += of_readers;
      total += drates[i];
      if (p.per_token)
        p.dlog_decay[((task.split * p.B + task.row) * p.T + chunk.first - i) * p.H + h] = drates[i];
    }
    return total;
  }
};

// One token of one head. The output is of the state before it is rounded to S.
template <typename E, typename S>
struct Token {
  using R = Real<E>;
  const E *q, *k, *v;
  Vec<R> decay;
  S* state;

  // The columns of the state are next to each other, its rows `step` apart.
  INLINE_MEMBER void along_rows(const RetentionStep<E>& p, int64_t step, E* o) const {
    for_vectors<R>(p.V, [&](int64_t column, int64_t count) INLINE_LAMBDA {
      S* state = this->state + column;
      const Vec<R> value = load(v + column, count);
      Vec<R> total{};
      for (int64_t row = 0; row < p.K;) {
        Vec<R> run{};
        for (const int64_t end = row + 16 < p.K ? row + 16 : p.K; row < end; row++, state += step) {
          const Vec<R> next = fma(splat(real(k[row])), value, decay * load(state, count));
          store(state, next, count);
          run = fma(splat(real(q[row])), next, run);
        }
        total += run;
      }
      store(o + column, p.scale * total, count);
    });
  }

  // The rows are, its columns `step` apart.
  INLINE_MEMBER void along_columns(const RetentionStep<E>& p, int64_t step, E* o) const {
    constexpr int64_t L = LANES<R>;
    alignas(64) R products[L * L], sums[L];
    for (int64_t first = 0; first < p.V; first += L) {
      const int64_t lanes = p.V - first < L ? p.V - first : L;
      for (int64_t i = 0; i < lanes; i++) {
        S* state = this->state + (first + i) * step;
        const Vec<R> value = splat(real(v[first + i]));
        Vec<R> total{};
        for (int64_t row = 0; row < p.K; row += 16 * L) {
          Vec<R> run{};
          for_vectors<R>(row + 16 * L < p.K ? 16 * L : p.K - row, [&](int64_t at, int64_t count) INLINE_LAMBDA {
            const Vec<R> next = fma(load(k + row + at, count), value, decay * load(state + row + at, count));
            store(state + row + at, next, count);
            run = fma(load(q + row + at, count), next, run);
          });
          total += run;
        }
        store(products + i * L, total);
      }
      sum_rows(products, lanes, sums);
      store(o + first, p.scale * load(sums, lanes), lanes);
    }
  }
};

}  // namespace

template <typename E>
int64_t retention_scratch(const Retention<E>& p, bool backward) {
  return Task<E>(p, 0, nullptr, backward).w.used;
}

template <typename E>
void retention_forward(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  Task<E> task(p, index, scratch, false);
  for (int64_t h = task.head; h < task.head + p.heads; h++) Head<E>{task, h}.forward();
}

template <typename E>
void retention_crossing(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  Task<E> task(p, index, scratch, false);
  for (int64_t h = task.head; h < task.head + p.heads; h++) Head<E>{task, h}.crossing();
}

template <typename E>
void retention_crossing_back(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  Task<E> task(p, index, scratch, false);
  for (int64_t h = task.head; h < task.head + p.heads; h++) Head<E>{task, h}.crossing_back();
}

template <typename E>
void retention_backward(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  Task<E> task(p, index, scratch, true);
  for (int64_t h = task.head; h < task.head + p.heads; h++) {
    Head<E> head{task, h};
    head.backward_in_order();
    head.backward_reversed();
  }
}

// One token: each element of the state is read and written once. The sum over K goes in runs of 16.
template <typename E, typename S>
void retention_step(const RetentionStep<E>& p, const States<S>& states, int64_t task) {
  using R = Real<E>;
  const FlushSubnormals here;
  const int64_t b = task / p.H, h = task % p.H, row = states.strides[1], column = states.strides[2];
  S* const state = states.of(b);
  E* const o = p.o + task * p.V;
  if (!state) {
    for (int64_t i = 0; i < p.V; i++) o[i] = E{};
    return;
  }
  Token<E, S> token;
  token.q = p.q + (b * p.Hq + h / (p.H / p.Hq)) * p.K;
  token.k = p.k + (b * p.Hk + h / (p.H / p.Hk)) * p.K;
  token.v = p.v + (b * p.Hv + h / (p.H / p.Hv)) * p.V;
  token.decay = splat(R(::exp(double(p.log_decay[p.per_token ? task : h]))));
  token.state = state + h * states.strides[0];
  if (column == 1 || p.V == 1)
    token.along_rows(p, row, o);
  else
    token.along_columns(p, column, o);
}

#define INSTANTIATE(E)                                                              \
  template int64_t retention_scratch(const Retention<E>&, bool);                    \
  template void retention_forward(const Retention<E>&, int64_t, Real<E>*);          \
  template void retention_backward(const Retention<E>&, int64_t, Real<E>*);         \
  template void retention_crossing(const Retention<E>&, int64_t, Real<E>*);         \
  template void retention_crossing_back(const Retention<E>&, int64_t, Real<E>*);    \
  template void retention_step(const RetentionStep<E>&, const States<Real<E>>&, int64_t);
#define WITH_16_BITS(E) template void retention_step(const RetentionStep<E>&, const States<bf16>&, int64_t);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(double)
WITH_16_BITS(float)
WITH_16_BITS(bf16)
#undef WITH_16_BITS
#undef INSTANTIATE

}  // namespace ISA
