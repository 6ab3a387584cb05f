// Retention on a CPU. Both passes are scans of one form over the tokens of a head: a token writes a outer product into a
// state M [K, V], and tokens read it from the left, from the right or from both sides:
//
//   M = exp(log_decay) M + a (x) b          y = c . M          z = M . d
//
//   forward                       a = k   b = v   c = q                y = o
//   backward, in order            a = k   b = v           d = do       z = dq
//   backward, last token first    a = q   b = do  c = k   d = v        y = dv   z = dk     M = the state's gradient
//
// A scan goes in chunks of 32 tokens. With decay[j, i] from writer j to a reader i >= j of the same chunk (0 for i < j),
// in[i] from the state that enters the chunk to reader i, out[j] from writer j to the state that leaves:
//
//   y   = (c in) M       + left^T b           left[j, i]  = decay[j, i] a[j] . c[i]
//   z^T = M (d in)^T     + a^T right          right[j, i] = decay[j, i] b[j] . d[i]
//   M'  = in[end] M      + (a out)^T b
//
// These are all the products there are, and one micro-kernel computes them, from panels (see there). A task owns some
// columns of V of one head, or of several that share q, k or v, one after another; M stays in the cache.

#include "vec.h"

#include "retention.h"

namespace ISA {
namespace {

constexpr int64_t CHUNK = 32;

// A matrix in panels of W columns: [columns / W, rows, W], zeros after the last column.
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

  INLINE_MEMBER R* at(int64_t panel, int64_t row) const { return data + (panel * rows + row) * W<R>; }
};

// ---

// Rows of a tile of sums, two vectors wide: 28 of 32 registers, or 12 of 16.
#if defined(__AVX512F__)
constexpr int TALLEST = 14;
#else
constexpr int TALLEST = 6;
#endif

// ROWS rows of sums: a recursion, for an array of vectors would not stay in registers.
template <int ROWS, typename R>
struct Sums {
  Vec<R> first{}, second{};
  Sums<ROWS - 1, R> below;

  INLINE_MEMBER void add(const R* a, int64_t step, Vec<R> b0, Vec<R> b1) {
    first = fma(splat(*a), b0, first);
    second = fma(splat(*a), b1, second);
    below.add(a + step, step, b0, b1);
  }
  INLINE_MEMBER void put(R* c) const {
    store(c, first);
    store(c + LANES<R>, second);
    below.put(c + W<R>);
  }
  INLINE_MEMBER void put_and_keep(R* c, Vec<R> keep) const {
    store(c, fma(keep, load(c), first));
    store(c + LANES<R>, fma(keep, load(c + LANES<R>), second));
    below.put_and_keep(c + W<R>, keep);
  }
};
template <typename R>
struct Sums<0, R> {
  INLINE_MEMBER void add(const R*, int64_t, Vec<R>, Vec<R>) {}
  INLINE_MEMBER void put(R*) const {}
  INLINE_MEMBER void put_and_keep(R*, Vec<R>) const {}
};

// C = keep C + A B for ROWS rows and one panel of columns; C is not read where keep is 0. A[d, r] is a[d W + r], or
// TURNED, where A is the transpose of what lies in panels, a[r W + d], each W-th d `jump` further on.
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
  keep == 0 ? sums.put(c) : sums.put_and_keep(c, splat(keep));
}

// Rows that the next chunk will need: tiles bring them to L2 while they compute. No hardware prefetcher follows rows that
// lie in H K or H V steps; waiting for them took 27 % of the forward pass at H = 4.
struct Ahead {
  struct Block {
    const char* row;
    int64_t step, bytes, rows;
  } blocks[6];
  int64_t count = 0;

  // The CHUNK rows behind these n.
  template <typename Rows>
  void add(const Rows& rows, int64_t n, int64_t width) {
    const int64_t size = sizeof(*rows.first);
    blocks[count++] = {(const char*)rows.at(n), rows.step * size, width * size, CHUNK};
  }
  // Rows of 16 lines or more in all.
  void fetch() {
    for (int64_t lines = 0; lines < 16 && count;) {
      Block& last = blocks[count - 1];
      for (int64_t byte = 0; byte < last.bytes; byte += 64, lines++) __builtin_prefetch(last.row + byte, 0, 2);
      last.row += last.step;
      if (--last.rows == 0) count--;
    }
  }
};

template <int ROWS, bool TURNED, typename R>
INLINE void tile_of(int64_t rows, const R* a, int64_t jump, const R* b, int64_t depth, R keep, R* c) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return tile_of<ROWS - 1, TURNED>(rows, a, jump, b, depth, keep, c);
  tile<ROWS, TURNED>(a, jump, b, depth, keep, c);
}

enum Depth { WHOLE, UP_TO_ROW };

// c = keep c + A b for one panel of columns, A [rows, depth] in equally high tiles: 32 rows are 11, 11 and 10. A is a^T,
// TURNED a. UP_TO_ROW: A is zero beyond its diagonal, and tiles end there.
template <bool TURNED, typename R>
void multiply(Ahead& ahead, const Panels<R>& a, const R* b, R* c, int64_t rows, int64_t depth, R keep, Depth limit = WHOLE) {
  for (int64_t r = 0; r < rows;) {
    const int64_t end = rows < (r / W<R> + 1) * W<R> ? rows : (r / W<R> + 1) * W<R>, left = end - r;
    const int64_t tiles = (left + TALLEST - 1) / TALLEST, height = (left + tiles - 1) / tiles;
    const R* from = TURNED ? a.at(0, r) : a.at(r / W<R>, 0) + r % W<R>;
    const int64_t until = limit == UP_TO_ROW && r + height < depth ? r + height : depth;
    ahead.fetch();
    tile_of<TALLEST, TURNED>(height, from, (a.rows - 1) * W<R>, b, until, keep, c + r * W<R>);
    r += height;
  }
}

// ---

// The transpose of LANES vectors: blocks off the diagonal change places, the largest first.
template <typename R, int64_t SIZE = LANES<R> / 2>
INLINE void transpose(Vec<R>* x) {
  decltype(Vec<R>{} < Vec<R>{}) upper, lower;
  for (int64_t i = 0; i < LANES<R>; i++) {
    upper[i] = i & SIZE ? LANES<R> + i - SIZE : i;
    lower[i] = i & SIZE ? LANES<R> + i : i + SIZE;
  }
  for (int64_t i = 0; i < LANES<R>; i++)
    if (!(i & SIZE)) {
      const Vec<R> above = x[i], below = x[i + SIZE];
      x[i] = __builtin_shuffle(above, below, upper);
      x[i + SIZE] = __builtin_shuffle(above, below, lower);
    }
  if constexpr (SIZE > 1) transpose<R, SIZE / 2>(x);
}

// f(column, count) for each vector of a row. It is inlined twice: but for the last vector, count is a constant.
template <typename R, typename F>
INLINE void for_vectors(int64_t width, F f) {
  int64_t column = 0;
  for (; column + LANES<R> <= width; column += LANES<R>) f(column, LANES<R>);
  if (column < width) f(column, width - column);
}
#define INLINE_LAMBDA __attribute__((always_inline))

// Rows in a tensor, `step` elements apart. step < 0: the last one first.
template <typename E>
struct Rows {
  E* first;
  int64_t step;

  INLINE_MEMBER E* at(int64_t row, int64_t column = 0) const { return first + row * step + column; }
};

// x <- factor times n rows `width` wide; weighed <- row i of that times weight[i].
template <typename E, typename R = Real<E>>
void pack(const Rows<const E>& from, int64_t n, int64_t width, R factor, const Panels<R>& x,
          const R* weight = nullptr, const Panels<R>& weighed = {}) {
  for (int64_t i = 0; i < n; i++)
    for_vectors<R>(width, [&](int64_t column, int64_t count) INLINE_LAMBDA {
      const Vec<R> value = factor * load(from.at(i, column), count);
      store(x.at(column / W<R>, i) + column % W<R>, value);
      if (weight) store(weighed.at(column / W<R>, i) + column % W<R>, weight[i] * value);
    });
}

// The same transposed: row i is column i of x [width, CHUNK], and zeros follow the n-th.
template <typename E, typename R = Real<E>>
void pack_transposed(const Rows<const E>& from, int64_t n, int64_t width, R factor, const Panels<R>& x,
                     const R* weight = nullptr, const Panels<R>& weighed = {}) {
  for (int64_t i = 0; i < CHUNK; i += LANES<R>)
    for_vectors<R>(width, [&](int64_t row, int64_t count) INLINE_LAMBDA {
      Vec<R> block[LANES<R>];
      if (i + LANES<R> <= n) {
        for (int64_t j = 0; j < LANES<R>; j++) block[j] = load(from.at(i + j, row), count);
      } else {
        for (int64_t j = 0; j < LANES<R>; j++) block[j] = i + j < n ? load(from.at(i + j, row), count) : Vec<R>{};
      }
      transpose<R>(block);
      const Vec<R> weights = weight ? load(weight + i) : Vec<R>{};
      for (int64_t j = 0; j < count; j++) {
        store(x.at(i / W<R>, row + j) + i % W<R>, factor * block[j]);
        if (weight) store(weighed.at(i / W<R>, row + j) + i % W<R>, weights * (factor * block[j]));
      }
    });
}

// Where rows of a result go: to their place, or into a layer, added to what is there already.
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
      to.put(i, column, load(x.at(column / W<R>, i) + column % W<R>), count);
    });
}

// x [width, CHUNK] -> n rows
template <typename E, typename R = Real<E>>
void unpack_transposed(const Panels<R>& x, int64_t n, int64_t width, R factor, const Sink<E>& to) {
  for (int64_t i = 0; i < n; i += LANES<R>)
    for_vectors<R>(width, [&](int64_t row, int64_t count) INLINE_LAMBDA {
      Vec<R> block[LANES<R>];
      for (int64_t j = 0; j < LANES<R>; j++)
        block[j] = j < count ? load(x.at(i / W<R>, row + j) + i % W<R>) : Vec<R>{};
      transpose<R>(block);
      for (int64_t j = 0; j < LANES<R> && i + j < n; j++) to.put(i + j, row, factor * block[j], count);
    });
}

// ---

// n tokens in the order of a scan: `first`, and then each `sense` = 1 or -1 further.
struct Chunk {
  int64_t first, n, sense;

  template <typename E>
  INLINE_MEMBER Rows<E> of(const Rows<E>& tokens) const {
    return {tokens.first ? tokens.at(first, 0) : nullptr, sense * tokens.step};
  }
  template <typename E>
  INLINE_MEMBER Sink<E> of(const Sink<E>& sink) const {
    return {of(sink.whole), of(sink.layer), sink.add};
  }
};

// What a chunk takes up, in the names of the equations on top.
template <typename R>
struct Workspace {
  int64_t K, V, used = 0;
  R* memory;
  Panels<R> a, a_out, b, c, c_in, d, d_in, decay, left, right, y, z, state;
  R *in, *out, whole;
  Ahead ahead;
  int64_t decays_of = 0;                   // the n that decay, in, out and whole are for; 0: none

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
  int64_t state_size() const { return K * padded<R>(V); }
};

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

// decay, in, out and whole of a chunk. A token's own decay lies before it, so that a scan from the last token meets it
// after the token. A rate below -1e3 would swallow its neighbours in the sums, which are float64: beside a decay of
// e^-100 float32 would leave 1e-5.
template <typename R>
void enter(const Rows<const R>& rates, const Chunk& chunk, Workspace<R>& w) {
  if (rates.step == 0 && w.decays_of == chunk.n) return;
  w.decays_of = chunk.n;
  constexpr double NEVER = -1e6;
  double clock[CHUNK], x[CHUNK], now = 0;  // in halvings
  for (int64_t i = 0; i < chunk.n; i++) {
    const double rate = *rates.at(chunk.first + chunk.sense * i), passed = (rate < -1e3 ? -1e3 : rate) * 1.4426950408889634;
    clock[i] = chunk.sense > 0 ? now + passed : now;
    now += passed;
  }
  for (int64_t i = 0; i < CHUNK; i++) x[i] = i < chunk.n ? clock[i] : NEVER;
  powers_of_two(x, w.in);
  for (int64_t i = 0; i < CHUNK; i++) x[i] = i < chunk.n ? now - clock[i] : NEVER;
  powers_of_two(x, w.out);
  for (int64_t j = 0; j < chunk.n; j++) {
    R row[CHUNK];
    for (int64_t i = 0; i < CHUNK; i++) x[i] = j <= i && i < chunk.n ? clock[i] - clock[j] : NEVER;
    powers_of_two(x, row);
    for (int64_t i = 0; i < CHUNK; i += LANES<R>) store(w.decay.at(i / W<R>, j) + i % W<R>, load(row + i));
  }
  R all[CHUNK];
  for (int64_t i = 0; i < CHUNK; i++) x[i] = now;
  powers_of_two(x, all);
  w.whole = all[0];
}

// What a chunk's n tokens write, a and b; what they read with, c and d; and what they read, y and z.
template <typename E, typename R = Real<E>>
void take_writers(Workspace<R>& w, int64_t n, const Rows<const E>& a, R factor, const Rows<const E>& b) {
  pack(a, n, w.K, factor, w.a, w.out, w.a_out);
  pack(b, n, w.V, R(1), w.b);
  w.ahead.add(a, n, w.K);
  w.ahead.add(b, n, w.V);
}
template <typename E, typename R = Real<E>>
void take_left_readers(Workspace<R>& w, int64_t n, const Rows<const E>& c, R factor) {
  pack_transposed(c, n, w.K, factor, w.c, w.in, w.c_in);
  w.ahead.add(c, n, w.K);
}
template <typename E, typename R = Real<E>>
void take_right_readers(Workspace<R>& w, int64_t n, const Rows<const E>& d) {
  pack_transposed(d, n, w.V, R(1), w.d, w.in, w.d_in);
  w.ahead.add(d, n, w.V);
}
template <typename E, typename R = Real<E>>
void put_y(Workspace<R>& w, int64_t n, const Sink<E>& to) {
  unpack(w.y, n, w.V, to);
  if (to.whole.first) w.ahead.add(to.whole, n, w.V);
}
template <typename E, typename R = Real<E>>
void put_z(Workspace<R>& w, int64_t n, R factor, const Sink<E>& to) {
  unpack_transposed(w.z, n, w.K, factor, to);
  if (to.whole.first) w.ahead.add(to.whole, n, w.K);
}

// f(panel, rows) for each panel of columns i < n, and how many rows j it has down to the diagonal.
template <typename R, typename F>
INLINE void for_triangle(int64_t n, F f) {
  for (int64_t panel = 0; panel * W<R> < n; panel++) f(panel, n < (panel + 1) * W<R> ? n : (panel + 1) * W<R>);
}

// to[j, i] = x[j] . y[i]
template <typename R>
void products(Ahead& ahead, const Panels<R>& x, const Panels<R>& y, int64_t n, int64_t depth, const Panels<R>& to) {
  for_triangle<R>(n, [&](int64_t i, int64_t rows) { multiply<true>(ahead, x, y.at(i, 0), to.at(i, 0), rows, depth, R(0)); });
}

// products times decay; what a decay of 0 hides may be anything
template <typename R>
void fade(const Workspace<R>& w, int64_t n, const Panels<R>& x) {
  for_triangle<R>(n, [&](int64_t i, int64_t rows) {
    for (int64_t at = 0; at < rows * W<R>; at += LANES<R>) {
      const Vec<R> decay = load(w.decay.at(i, 0) + at), value = load(x.at(i, 0) + at);
      store(x.at(i, 0) + at, decay == 0 ? Vec<R>{} : decay * value);
    }
  });
}

// sums[i] = x[:, i] . y[:, i], in runs of 32
template <typename R>
void column_products(const Panels<R>& x, const Panels<R>& y, R* sums) {
  for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
    Vec<R> total{};
    for (int64_t row = 0; row < x.rows;) {
      Vec<R> run{};
      for (const int64_t end = row + 32 < x.rows ? row + 32 : x.rows; row < end; row++)
        run = fma(load(x.at(i / W<R>, row) + i % W<R>), load(y.at(i / W<R>, row) + i % W<R>), run);
      total += run;
    }
    store(sums + i, total);
  }
}

// sums[r] = sum of left[j, i] right[j, i] over j <= r < i: the pairs that the rate of token r lies between. Only `left`
// has faded yet.
template <typename R>
void sum_pairs(const Workspace<R>& w, int64_t n, R* sums) {
  R after[CHUNK] = {};
  for (int64_t r = 0; r < n; r++) {
    Vec<R> total{};
    for (int64_t i = 0; i < CHUNK; i += LANES<R>) {
      const auto at = [&](const Panels<R>& x) { return load(x.at(i / W<R>, r) + i % W<R>); };
      store(after + i, load(after + i) + (at(w.decay) == 0 ? Vec<R>{} : at(w.left) * at(w.right)));
    }
    after[r] = 0;
    for (int64_t i = 0; i < CHUNK; i += LANES<R>) total += load(after + i);
    sums[r] = sum<R>(total);
  }
}

// z^T; where asked, also the part of c . z that comes from the state, and sum_pairs.
template <typename R>
void read_from_right(Workspace<R>& w, int64_t n, R* through_state, R* pairs = nullptr) {
  products(w.ahead, w.b, w.d, n, w.V, w.right);
  if (pairs) sum_pairs(w, n, pairs);
  fade(w, n, w.right);
  const auto panels = (n + W<R> - 1) / W<R>;
  for (int64_t i = 0; i < panels; i++) multiply<true>(w.ahead, w.state, w.d_in.at(i, 0), w.z.at(i, 0), w.K, w.V, R(0));
  if (through_state) column_products(w.c, w.z, through_state);
  for_triangle<R>(n, [&](int64_t i, int64_t rows) {
    multiply<false>(w.ahead, w.a, w.right.at(i, 0), w.z.at(i, 0), w.K, rows, R(1));
  });
}

template <typename R>
void left_products(Workspace<R>& w, int64_t n) {
  products(w.ahead, w.a, w.c, n, w.K, w.left);
  fade(w, n, w.left);
}

// M', and y where the chunk reads from the left: panel by panel, each read while it is in L1.
template <typename R>
void write(Workspace<R>& w, int64_t n, const Panels<R>& state, bool read_from_left) {
  for (int64_t v = 0; v * W<R> < w.V; v++) {
    if (read_from_left) {
      multiply<false>(w.ahead, w.c_in, state.at(v, 0), w.y.at(v, 0), n, w.K, R(0));
      multiply<false>(w.ahead, w.left, w.b.at(v, 0), w.y.at(v, 0), n, n, R(1), UP_TO_ROW);
    }
    multiply<false>(w.ahead, w.a_out, w.b.at(v, 0), state.at(v, 0), w.K, n, w.whole);
  }
  w.ahead.count = 0;
}

template <typename R>
double product(const Panels<R>& x, const Panels<R>& y, int64_t columns) {
  double total = 0;
  for_vectors<R>(columns, [&](int64_t column, int64_t) {
    const int64_t first = x.at(column / W<R>, 0) - x.data + column % W<R>;
    Vec<R> sums{};
    for (int64_t row = 0; row < x.rows; row++)
      sums = fma(load(x.data + first + row * W<R>), load(y.data + first + row * W<R>), sums);
    total += sum<R>(sums);
  });
  return total;
}

// ---

// Sequence n, `heads` heads from `head` on, columns v0 to v0 + V of v, o and the state; tokens begin to end of a row.
template <typename E>
struct Task {
  using R = Real<E>;

  const Retention<E>& p;
  int64_t n, head, split, v0, V, row, begin, end;

  Task(const Retention<E>& p, int64_t index) : p(p) {
    split = index % p.splits();
    head = index / p.splits() % (p.H / p.heads) * p.heads;
    n = index / p.splits() / (p.H / p.heads);
    v0 = split * p.columns;
    V = p.V - v0 < p.columns ? p.V - v0 : p.columns;
    row = p.cu_seqlens ? 0 : n;
    begin = p.cu_seqlens ? p.cu_seqlens[n] : 0;
    end = p.cu_seqlens ? p.cu_seqlens[n + 1] : p.T;
  }

  int64_t chunks() const { return (end - begin + CHUNK - 1) / CHUNK; }
  Chunk chunk(int64_t i, int64_t sense) const {
    const int64_t first = begin + i * CHUNK, n = end - first < CHUNK ? end - first : CHUNK;
    return {sense > 0 ? first : first + n - 1, n, sense};
  }

  // Head h's rows of x [B, T, Hx, width], from `column` on.
  template <typename X>
  Rows<X> rows(X* x, int64_t h, int64_t Hx, int64_t width, int64_t column = 0) const {
    return {x ? x + (row * p.T * Hx + h / (p.H / Hx)) * width + column : nullptr, Hx * width};
  }
  Rows<const R> rates(int64_t h) const {
    return p.per_token ? Rows<const R>{p.log_decay + row * p.T * p.H + h, p.H} : Rows<const R>{p.log_decay + h, 0};
  }
  Sink<E> sink(const RetentionGradient<E>& to, int64_t h, int64_t Hx, int64_t width, bool split_over_v) const {
    const int64_t shared = p.H / Hx, splits = split_over_v ? p.splits() : 1;
    const int64_t layer = h % shared / p.heads * splits + (split_over_v ? split : 0), column = split_over_v ? 0 : v0;
    R* const here = to.layers ? to.layers + layer * p.B * p.T * Hx * width : nullptr;
    return {rows(to.whole, h, Hx, width, column), rows(here, h, Hx, width, column), h % shared > 0 && h > head};
  }

  template <typename X>
  Rows<X> state(X* x, int64_t h) const {
    return {x ? x + (n * p.H + h) * p.K * p.V + v0 : nullptr, p.V};
  }
  void read_state(const R* from, int64_t h, const Workspace<R>& w) const {
    if (from) return pack(Rows<const R>(state(from, h)), p.K, V, R(1), w.state);
    memset(w.state.data, 0, sizeof(R) * w.state_size());
  }
  void write_state(const Workspace<R>& w, R* to, int64_t h) const {
    unpack(w.state, p.K, V, Sink<R>{state(to, h), {}, false});
  }
};

// What the gradient of the rates needs from the scan in order. Of the states, those that enter every `every`-th chunk
// and those of one run of `every` chunks, computed again from its first: 2 sqrt(chunks) states in all.
template <typename R>
struct Kept {
  int64_t every = 1, size;
  R *firsts = nullptr, *run = nullptr;
  R* readers = nullptr;                    // for each token, the part of q . dq that comes from the state

  Kept(Workspace<R>& w, int64_t T, bool wanted) : size(w.state_size()) {
    while (every * every * CHUNK < T) every++;
    if (wanted) firsts = w.take(every * size), run = w.take(every * size), readers = w.take(T + CHUNK);
  }
  R* first_of_run(int64_t chunk) const { return firsts + chunk / every * size; }
  R* in_run(int64_t chunk) const { return run + chunk % every * size; }
};

// One head of a task: its rows, and the scans over its chunks.
template <typename E>
struct Head {
  using R = Real<E>;

  const Task<E>& task;
  const Retention<E>& p;
  const int64_t h;
  Workspace<R>& w;
  const Rows<const E> q, k, v;
  const Rows<const R> rates;

  Head(const Task<E>& task, int64_t h, Workspace<R>& w)
      : task(task), p(task.p), h(h), w(w), q(task.rows(p.q, h, p.Hq, p.K)), k(task.rows(p.k, h, p.Hk, p.K)),
        v(task.rows(p.v, h, p.Hv, p.V, task.v0)), rates(task.rates(h)) {}

  // k and v are what is written, as they are in order.
  void enter_with_k_v(const Chunk& chunk) {
    enter(rates, chunk, w);
    take_writers(w, chunk.n, chunk.of(k), R(1), chunk.of(v));
  }

  void forward() {
    const Sink<E> o = {task.rows(p.o, h, p.H, p.V, task.v0), {}, false};
    w.decays_of = 0;
    task.read_state(p.initial_state, h, w);
    for (int64_t i = 0; i < task.chunks(); i++) {
      const Chunk chunk = task.chunk(i, 1);
      enter_with_k_v(chunk);
      take_left_readers(w, chunk.n, chunk.of(q), p.scale);
      left_products(w, chunk.n);
      write(w, chunk.n, w.state, true);
      put_y(w, chunk.n, chunk.of(o));
    }
    task.write_state(w, p.final_state, h);
  }

  // The gradient of q.
  void backward_in_order(const Kept<R>& kept) {
    const Rows<const E> grad_o = task.rows(p.grad_o, h, p.H, p.V, task.v0);
    const Sink<E> dq = task.sink(p.dq, h, p.Hq, p.K, true);
    w.decays_of = 0;
    task.read_state(p.initial_state, h, w);
    for (int64_t i = 0; i < task.chunks(); i++) {
      const Chunk chunk = task.chunk(i, 1);
      enter_with_k_v(chunk);
      take_right_readers(w, chunk.n, chunk.of(grad_o));
      if (p.dlog_decay) {
        if (i % kept.every == 0) memcpy(kept.first_of_run(i), w.state.data, sizeof(R) * w.state_size());
        take_left_readers(w, chunk.n, chunk.of(q), p.scale);
      }
      read_from_right(w, chunk.n, p.dlog_decay ? kept.readers + i * CHUNK : nullptr);
      write(w, chunk.n, w.state, false);
      put_z(w, chunk.n, p.scale, chunk.of(dq));
    }
  }

  // The gradients of k, v, the rates and the initial state.
  void backward_reversed(const Kept<R>& kept) {
    const Rows<const E> grad_o = task.rows(p.grad_o, h, p.H, p.V, task.v0);
    const Sink<E> dk = task.sink(p.dk, h, p.Hk, p.K, true), dv = task.sink(p.dv, h, p.Hv, p.V, false);
    double drates = 0;
    w.decays_of = 0;
    task.read_state(p.dfinal_state, h, w);
    for (int64_t last = task.chunks() - 1, i = last; i >= 0; i--) {
      if (p.dlog_decay && (i == last || i % kept.every == kept.every - 1)) recompute_run(kept, i);
      const Chunk chunk = task.chunk(i, -1);
      R pairs[CHUNK], writers[CHUNK];
      enter(rates, chunk, w);
      take_writers(w, chunk.n, chunk.of(q), p.scale, chunk.of(grad_o));
      take_left_readers(w, chunk.n, chunk.of(k), R(1));
      take_right_readers(w, chunk.n, chunk.of(v));
      left_products(w, chunk.n);
      read_from_right(w, chunk.n, p.dlog_decay ? writers : nullptr, p.dlog_decay ? pairs : nullptr);
      if (p.dlog_decay) {
        const Panels<R> entered = {kept.in_run(i), p.K};
        drates += put_rate_gradients(chunk, product(entered, w.state, w.V), kept.readers + i * CHUNK, writers, pairs);
      }
      write(w, chunk.n, w.state, true);
      put_y(w, chunk.n, chunk.of(dv));
      put_z(w, chunk.n, R(1), chunk.of(dk));
    }
    task.write_state(w, p.dinitial_state, h);
    if (p.dlog_decay && !p.per_token) p.dlog_decay[(task.split * p.N + task.n) * p.H + h] = drates;
  }

  // The states that enter the chunks of the run that ends with chunk `last`.
  void recompute_run(const Kept<R>& kept, int64_t last) {
    memcpy(kept.in_run(last / kept.every * kept.every), kept.first_of_run(last), sizeof(R) * w.state_size());
    w.decays_of = 0;
    for (int64_t i = last / kept.every * kept.every; i < last; i++) {
      const Chunk chunk = task.chunk(i, 1);
      memcpy(kept.in_run(i + 1), kept.in_run(i), sizeof(R) * w.state_size());
      enter_with_k_v(chunk);
      write(w, chunk.n, {kept.in_run(i + 1), p.K}, false);
    }
    w.decays_of = 0;
  }

  // The rate of a token weighs what was written before the token and is read at it or later. Sums of its own pairs
  // only, never a difference of larger sums: of both outside the chunk, of a reader, a writer or both inside.
  double put_rate_gradients(const Chunk& chunk, double outside, const R* readers, const R* writers, const R* pairs) {
    double gradient[CHUNK], of_writers = 0, of_readers = 0, total = 0;
    for (int64_t i = chunk.n - 1; i >= 0; i--) {
      gradient[i] = w.whole * outside + of_writers + pairs[i];
      of_writers += writers[i];
    }
    for (int64_t i = 0; i < chunk.n; i++) {
      of_readers += readers[chunk.n - 1 - i];
      gradient[i] += of_readers;
      total += gradient[i];
      if (p.per_token)
        p.dlog_decay[((task.split * p.B + task.row) * p.T + chunk.first - i) * p.H + h] = gradient[i];
    }
    return total;
  }
};

}  // namespace

template <typename E>
int64_t retention_scratch(const Retention<E>& p, bool backward) {
  Workspace<Real<E>> w(nullptr, p.K, p.columns);
  Kept<Real<E>>(w, p.T, backward && p.dlog_decay);
  return w.used;
}

template <typename E>
void retention_forward(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  const Task<E> task(p, index);
  Workspace<Real<E>> w(scratch, p.K, task.V);
  for (int64_t h = task.head; h < task.head + p.heads; h++) Head<E>(task, h, w).forward();
}

template <typename E>
void retention_backward(const Retention<E>& p, int64_t index, Real<E>* scratch) {
  const FlushSubnormals here;
  const Task<E> task(p, index);
  Workspace<Real<E>> w(scratch, p.K, task.V);
  const Kept<Real<E>> kept(w, p.T, p.dlog_decay);
  for (int64_t h = task.head; h < task.head + p.heads; h++) {
    Head<E> head(task, h, w);
    head.backward_in_order(kept);
    head.backward_reversed(kept);
  }
}

// One token: each column of the state is read and written once, `SIDE` vectors of columns at a time.
template <typename E>
void retention_step(const RetentionStep<E>& p, int64_t task, Real<E>*) {
  using R = Real<E>;
  const FlushSubnormals here;
  const int64_t b = task / p.H, h = task % p.H;
  const E* q = p.q + (b * p.Hq + h / (p.H / p.Hq)) * p.K;
  const E* k = p.k + (b * p.Hk + h / (p.H / p.Hk)) * p.K;
  const E* v = p.v + (b * p.Hv + h / (p.H / p.Hv)) * p.V;
  const Vec<R> decay = splat(R(::exp(double(p.log_decay[p.per_token ? task : h]))));
  for_vectors<R>(p.V, [&](int64_t column, int64_t count) INLINE_LAMBDA {
    R* state = p.state + task * p.K * p.V + column;
    const Vec<R> value = load(v + column, count);
    Vec<R> total{};
    for (int64_t row = 0; row < p.K;) {
      Vec<R> run{};
      for (const int64_t end = row + 16 < p.K ? row + 16 : p.K; row < end; row++, state += p.V) {
        const Vec<R> next = fma(splat(real(k[row])), value, decay * load(state, count));
        store(state, next, count);
        run = fma(splat(real(q[row])), next, run);
      }
      total += run;
    }
    store(p.o + task * p.V + column, p.scale * total, count);
  });
}

#define INSTANTIATE(E)                                                              \
  template int64_t retention_scratch(const Retention<E>&, bool);                    \
  template void retention_forward(const Retention<E>&, int64_t, Real<E>*);          \
  template void retention_backward(const Retention<E>&, int64_t, Real<E>*);         \
  template void retention_step(const RetentionStep<E>&, int64_t, Real<E>*);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace ISA
