"""Retention in Triton, chunk by chunk, a program's state in its registers. Nothing is saved for the backward.

    i_  index of a tile     o_  offsets     m_  mask     p_  pointers

The output and three gradients are one recurrence in four roles:

    S[t] = decay[t] S[t-1] + y[t] (x) z[t]          out[t] = x[t] . S[t]
    o:   x = q,  y = k,  z = v                      dq:  x = do, y = v,  z = k      forward in time
    dv:  x = k,  y = q,  z = do                     dk:  x = v,  y = do, z = q      backward

In a chunk of C tokens that is products of matrices. With A the running sum of log_decay in the chunk and S
the state that enters it (backward in time: the gradient of the one that leaves, with P transposed and the two
decays exchanged):

    P = (x y^T) * exp(A[t] - A[s]) for s <= t       out = P z + exp(A) x . S
    S <- exp(A[end]) S + y^T (exp(A[end] - A) z)

`scores_kernel` finds the P that o and dv share, the one of dq and dk, and the decays, of all chunks at once.
A program of `walk_kernel` owns BZ columns of one head's state in one segment of a sequence, and walks its
chunks with S^T in registers: a tensor core takes it from there. A segment is a whole sequence where that
fills the GPU, and a chunk where the gradient of log_decay asks for all states; else as many tokens as fill
it. Where it is a part of its sequence, a walk without output finds what each adds to the state, and
`chain_kernel` joins these. So the last bits depend on the number of multiprocessors; two runs on one GPU are
equal. Where heads share q, k or v, gradients are made for each head and then summed.

Sequence n of a packed row has the segments from cu[n] // L + n on, of L tokens: never too few, some without
tokens.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton import language as tl

from ..checks import boundaries, contiguous, refuse
from ..curves import LN2, LOG2E, of_state, state_of, within
from ..launch import cdiv, device, options, power_of_2

MOST = 512  # rows or columns of a state
CUT = 256  # tokens: segments are multiples of it
SHORT = 16  # tokens: not more go one by one, instead of a chunk's products of 64
BLOCK = 1024  # elements of a state that chain_kernel carries
LEAST = tl.constexpr(-1e3)  # exp of it is 0; less would swallow its neighbours in a sum


@triton.jit
def locate(p_cu, i_s, T, N, S, L):
    """Of segment i_s: its first token in [B T], and how many it has."""
    if p_cu is None:
        row = i_s // S
        start = (i_s - row * S) * L
        return row.to(tl.int64) * T + start, tl.minimum(T - start, L)
    else:
        n, beyond = i_s * 0, i_s * 0 + N
        while n + 1 < beyond:
            middle = (n + beyond) // 2
            left = tl.load(p_cu + middle) // L + middle <= i_s
            n, beyond = tl.where(left, middle, n), tl.where(left, beyond, middle)
        begin, end = tl.load(p_cu + n), tl.load(p_cu + n + 1)
        start = begin + (i_s - begin // L - n) * L
        return start.to(tl.int64), tl.minimum(tl.maximum(end - start, 0), L)


@triton.jit
def tile(p, first, heads: tl.constexpr, i_h, H: tl.constexpr, X: tl.constexpr, o_t, m_t, start, o_x):
    """Tokens o_t from `first`, columns o_x from `start`, of the head of [B T, heads, X] that i_h reads.

    o_t and o_x are of two axes, start is of whole tiles and before X. float32 but for bfloat16: tf32 has
    float16's bits, and room for states that float16 has not. An offset in 64 bits is made anew for each tile;
    one that stays the same would stay in registers.
    """
    m = m_t if (o_x.numel - X) % o_x.numel == 0 else m_t & (o_x < X - start)
    p += (first * heads + i_h // (H // heads)) * X + start
    x = tl.load(p + o_t.to(tl.int64) * (heads * X) + o_x, m, 0.0)
    return x if x.dtype == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def power(A):
    """2^A of a float64, as exact as a GPU's exp2 of a float32 that A is not."""
    near = A.to(tl.float32)
    y = tl.math.exp2(near)
    return y + y * ((A - near.to(tl.float64)).to(tl.float32) * LN2)


@triton.jit
def products(
    p_x, p_y, here, m_t, i_h, Hx: tl.constexpr, Hy: tl.constexpr, H: tl.constexpr, X: tl.constexpr,
    C: tl.constexpr, BX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x y^T of a chunk."""
    o_t, o_x, scores = tl.arange(0, C), tl.arange(0, BX), tl.zeros([C, C], tl.float32)
    for i in range(0, X, BX):
        x = tile(p_x, here, Hx, i_h, H, X, o_t[:, None], m_t[:, None], i, o_x[None, :])
        y = tile(p_y, here, Hy, i_h, H, X, o_t[None, :], m_t[None, :], i, o_x[:, None])
        scores = tl.dot(x, y, scores, input_precision=PRECISION)
    return scores


@triton.jit(do_not_specialize=("T", "N", "S"))
def scores_kernel(
    p_q, p_k, p_v, p_do, p_rate, p_cu, p_P, p_dP, p_since, p_until, p_drate, scale, T, N, S,
    Hq: tl.constexpr, Hk: tl.constexpr, Hv: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    PER_TOKEN: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk P and its gradient [B T, H, C], exp(A) and exp(A[end] - A) [B T, H].

    And the share of drate [B T, H] that is from pairs in the chunk: the decay of token r weighs those of
    s < r <= t. They are summed, never subtracted from a larger sum.
    """
    i_h, i_c = tl.program_id(0) % H, tl.program_id(0) // H
    here, left = locate(p_cu, i_c, T, N, S, C)
    o_t = tl.arange(0, C)
    m_t, o_i, o_j = o_t < left, o_t[:, None], o_t[None, :]
    if PER_TOKEN:
        rate = tl.load(p_rate + here * H + i_h + o_t * H, m_t, 0.0)
    else:
        rate = tl.load(p_rate + i_h)
    rate = tl.where(rate < LEAST, LEAST, rate).to(tl.float64) * LOG2E
    A = tl.cumsum(rate, 0) if PER_TOKEN else tl.minimum(o_t + 1, left).to(tl.float64) * rate
    end = tl.sum(tl.where(o_t == C - 1, A, 0.0), 0)
    tl.store(p_since + here * H + i_h + o_t * H, power(A), m_t)
    tl.store(p_until + here * H + i_h + o_t * H, power(end - A), m_t)
    D = power(tl.where(o_j <= o_i, A[:, None] - A[None, :], LEAST)) * scale
    P = products(p_q, p_k, here, m_t, i_h, Hq, Hk, H, K, C, BK, PRECISION) * D
    o_P = (here * H + i_h) * C + (o_i * (H * C) + o_j)
    tl.store(p_P + o_P, P.to(p_P.dtype.element_ty), m_t[:, None])
    if p_dP is not None:
        dP = products(p_do, p_v, here, m_t, i_h, H, Hv, H, V, C, BV, PRECISION)
        tl.store(p_dP + o_P, (dP * D).to(p_dP.dtype.element_ty), m_t[:, None])
        if p_drate is not None:
            pairs = tl.where(o_j < o_i, P * dP, 0.0)
            after = tl.cumsum(pairs, 0, reverse=True)  # [r, s]: of all t >= r
            drate = tl.sum(tl.where(o_j < o_i, after, 0.0), 1)
            tl.store(p_drate + here * H + i_h + o_t * H, drate, m_t)


@triton.jit(do_not_specialize=("T", "N", "S", "L"))
def walk_kernel(
    p_x, p_y, p_z, p_w, p_P, p_since, p_until, p_cu, p_enter, p_out, p_dots, p_leave, p_faded, scale,
    T, N, S, L, Hx: tl.constexpr, Hy: tl.constexpr, Hz: tl.constexpr, Hw: tl.constexpr, H: tl.constexpr,
    X: tl.constexpr, Z: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, START: tl.constexpr,
    DOTS: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B T, H, Z] and the dots with w [B T, Hw, Z] of its part that comes from S, [B T, H, DOTS].

    TILES of S at once, from row START on; those after the first add to out. Without out a program has one
    tile, and finds `faded` [segments, H], what a segment leaves of a state. enter, leave [segments, H, X, Z]
    have steps of ROW and COLUMN. scale is in P, and forward in time in the output, else in S.
    """
    tiles_z: tl.constexpr = triton.cdiv(Z, BZ)
    tiles_x: tl.constexpr = triton.cdiv(X, BX) if p_out is None else 1
    tiles: tl.constexpr = tiles_z * tiles_x
    first_z = tl.program_id(0) % tiles_z * BZ
    first_x = tl.program_id(0) % tiles // tiles_z * BX if tiles_x > 1 else START
    i_h, i_s = tl.program_id(0) // tiles % H, tl.program_id(0) // tiles // H
    first, count = locate(p_cu, i_s, T, N, S, L)
    o_t, o_x, o_z = tl.arange(0, C), tl.arange(0, BX), tl.arange(0, BZ)
    begin = (i_s.to(tl.int64) * H + i_h) * (X * Z) + first_x * ROW + first_z * COLUMN
    o_state, m_z = o_z[:, None] * COLUMN + o_x[None, :] * ROW, o_z[:, None] < Z - first_z
    state, faded = (), tl.full([], 1.0, tl.float32)
    for j in tl.static_range(TILES):
        S_j = tl.zeros([BZ, BX], tl.float32)
        if p_enter is not None:
            m_j = m_z & (o_x[None, :] < X - first_x - j * BX)
            S_j += tl.load(p_enter + (begin + j * BX * ROW) + o_state, m_j, 0.0).to(tl.float32)
        state += (S_j,)
    if p_out is not None:
        p_P += (first * H + i_h) * C
        p_out += (first * H + i_h) * Z + first_z
        if p_dots is not None:
            p_dots += (first * H + i_h) * DOTS + first_z // BZ
    p_since += first * H + i_h
    p_until += first * H + i_h
    last = (count - 1) // C * C
    for i in range(0, count, C):
        at = last - i if REVERSE else i
        t = at + o_t
        m_t, t_H = t < count, t.to(tl.int64) * H
        if p_out is not None:
            out = tl.zeros([BZ, C], tl.float32)
            for j in tl.static_range(TILES):
                x = tile(p_x, first, Hx, i_h, H, X, t[None, :], m_t[None, :], first_x + j * BX, o_x[:, None])
                out = tl.dot(state[j].to(x.dtype), x, out, input_precision=PRECISION)
            out *= tl.load((p_until if REVERSE else p_since) + t_H, m_t, 0.0)[None, :]
            out *= 1.0 if REVERSE else scale
            if p_dots is not None:
                w = tile(p_w, first, Hw, i_h, H, Z, t[None, :], m_t[None, :], first_z, o_z[:, None])
                dots = tl.sum(out * w, 0)
                tl.store(p_dots + t_H * DOTS, dots, m_t)
            # Loaded any earlier, z would spill.
            z = tile(p_z, first, Hz, i_h, H, Z, t[None, :], m_t[None, :], first_z, o_z[:, None])
            m_out = m_t[None, :] if (BZ - Z) % BZ == 0 else m_t[None, :] & m_z
            o_out = t[None, :].to(tl.int64) * (H * Z) + o_z[:, None]
            if START == 0:
                if REVERSE:
                    P = tl.load(p_P + t[:, None].to(tl.int64) * (H * C) + o_t[None, :], m_t[:, None], 0.0)
                else:
                    P = tl.load(p_P + t[None, :].to(tl.int64) * (H * C) + o_t[:, None], m_t[None, :], 0.0)
                out = tl.dot(z, P, out, input_precision=PRECISION)
            else:
                out += tl.load(p_out + o_out, m_out, 0.0).to(tl.float32)
            tl.store(p_out + o_out, out.to(p_out.dtype.element_ty), m_out)
        else:
            z = tile(p_z, first, Hz, i_h, H, Z, t[None, :], m_t[None, :], first_z, o_z[:, None])
        into = tl.load((p_since if REVERSE else p_until) + t_H, m_t, 0.0) * (scale if REVERSE else 1.0)
        z = (z * into[None, :]).to(z.dtype)
        whole = tl.load(p_since + (tl.minimum(at + C, count) - 1).to(tl.int64) * H)
        faded *= whole
        after = ()
        for j in tl.static_range(TILES):
            y = tile(p_y, first, Hy, i_h, H, X, t[:, None], m_t[:, None], first_x + j * BX, o_x[None, :])
            after += (tl.dot(z, y, state[j] * whole, input_precision=PRECISION),)
        state = after
    if p_leave is not None:
        for j in tl.static_range(TILES):
            m_j = m_z & (o_x[None, :] < X - first_x - j * BX)
            tl.store(p_leave + (begin + j * BX * ROW) + o_state, state[j].to(p_leave.dtype.element_ty), m_j)
    if p_faded is not None:
        tl.store(p_faded + i_s * H + i_h, faded)


@triton.jit(do_not_specialize=("S", "L", "H"))
def chain_kernel(
    p_states, p_faded, p_enter, p_leave, p_cu, p_others, p_crossing, S, L, H, KV,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In states [segments, H, K V] what each adds becomes what enters it; enter and leave are [N, H, K V].

    crossing [segments, H, tiles]: their products with `others`, which enter at the other end, as those leave.
    """
    tiles = tl.cdiv(KV, BLOCK)
    i_x, i_h, i_n = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H, tl.program_id(0) // tiles // H
    if p_cu is None:
        first, count = i_n * S, S
    else:
        begin = tl.load(p_cu + i_n)
        first, count = begin // L + i_n, tl.cdiv(tl.load(p_cu + i_n + 1) - begin, L)
    o = i_x * BLOCK + tl.arange(0, BLOCK)
    m = o < KV
    o_n = (i_n.to(tl.int64) * H + i_h) * KV + o
    state = tl.zeros([BLOCK], tl.float32)
    if p_enter is not None:
        state += tl.load(p_enter + o_n, m, 0.0)
    for i in range(count):
        i_s = (first + (count - 1 - i if REVERSE else i)).to(tl.int64) * H + i_h
        more = tl.load(p_states + i_s * KV + o, m, 0.0).to(tl.float32)
        tl.store(p_states + i_s * KV + o, state.to(p_states.dtype.element_ty), m)
        faded = tl.load(p_faded + i_s)
        if p_crossing is not None:
            other = tl.load(p_others + i_s * KV + o, m, 0.0).to(tl.float32)
            tl.store(p_crossing + i_s * tiles + i_x, tl.sum(other * state, 0) * faded)
        state = state * faded + more
    if p_leave is not None:
        tl.store(p_leave + o_n, state, m)


@triton.jit(do_not_specialize=("T", "N", "S", "H", "tiles_k", "tiles"))
def rate_kernel(p_cu, p_out_of, p_into, p_crossing, p_drate, T, N, S, H, tiles_k, tiles, C: tl.constexpr):
    """Adds to drate [B T, H] the pairs that are not in one chunk: out of the state, into it, and across."""
    i_h, i_c = tl.program_id(0) % H, tl.program_id(0) // H
    first, count = locate(p_cu, i_c, T, N, S, C)
    o_t = tl.arange(0, C)
    o_i, o_j = o_t[:, None], o_t[None, :]
    m_t, o_drate = o_t < count, (first * H + i_h) + o_t * H
    out_of, into, crossing = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([], tl.float32)
    for i in range(tiles_k):
        out_of += tl.load(p_out_of + o_drate * tiles_k + i, m_t, 0.0)
        into += tl.load(p_into + o_drate * tiles_k + i, m_t, 0.0)
    for i in range(tiles):
        crossing += tl.load(p_crossing + (i_c.to(tl.int64) * H + i_h) * tiles + i)
    drate = tl.load(p_drate + o_drate, m_t, 0.0)
    drate += tl.sum(tl.where(o_j >= o_i, out_of[None, :], 0.0), 1)
    drate += tl.sum(tl.where(o_j < o_i, into[None, :], 0.0), 1)
    tl.store(p_drate + o_drate, drate + crossing, m_t)


@triton.jit(do_not_specialize=("T", "Hq", "Hk", "Hv", "H", "rate_row", "S"))
def recurrent_kernel(
    p_q, p_k, p_v, p_rate, p_enter, p_leave, p_o, rate_row, scale, T, Hq, Hk, Hv, H, K, V,
    p_rows, S, state_b, state_h, state_k, state_v,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Token by token, with all rows and BV columns of a state. rate_row: 0 where all tokens have one rate.

    p_rows: which of S states, of these strides, a row of the batch has; None: its own.
    """
    tiles = tl.cdiv(V, BV)
    i_v, i_h = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H
    i_b = (tl.program_id(0) // tiles // H).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    i_s, there = state_of(p_rows, i_b, S)
    o_state = (o_k.to(tl.int64) * state_k)[:, None] + (o_v.to(tl.int64) * state_v)[None, :]
    o_state += i_s * state_b + i_h.to(tl.int64) * state_h
    m_state = within(m_k[:, None] & m_v[None, :], there)
    state = tl.zeros([BK, BV], tl.float32)
    if p_enter is not None:
        state += tl.load(p_enter + o_state, m_state, 0.0).to(tl.float32)
    for t in range(T):
        row = i_b * T + t
        q = tl.load(p_q + (row * Hq + i_h // (H // Hq)) * K + o_k, m_k, 0.0).to(tl.float32)
        k = tl.load(p_k + (row * Hk + i_h // (H // Hk)) * K + o_k, m_k, 0.0).to(tl.float32)
        v = tl.load(p_v + (row * Hv + i_h // (H // Hv)) * V + o_v, m_v, 0.0).to(tl.float32)
        decay = tl.math.exp2(tl.load(p_rate + row * rate_row + i_h) * LOG2E)
        state = state * decay + k[:, None] * v[None, :]
        o = of_state(tl.sum(q[:, None] * state, 0) * scale, p_rows, i_s, S)
        tl.store(p_o + (row * H + i_h) * V + o_v, o.to(p_o.dtype.element_ty), m_v)
    tl.store(p_leave + o_state, state.to(p_leave.dtype.element_ty), m_state)


class Walk(NamedTuple):
    """Tiles of a state, how many a program has, its warps."""

    BX: int
    BZ: int
    TILES: int
    warps: int


@cache
def tiles(X: int, Z: int, dtype: torch.dtype) -> Walk:
    """64 columns for 4 warps, a warp group: S^T is multiplied from the registers it is summed in.

    A thread has 128 elements of it, 64 in float32: more would spill.
    """
    BX, BZ = (max(16, min(most, power_of_2(size))) for size, most in ((X, 64), (Z, 128)))
    warps = 8 if BZ == 128 else 4
    rows = 32 * warps if dtype != torch.float32 else 16 * warps
    return Walk(BX, BZ, cdiv(min(X, rows), BX), warps)


def chunk(dtype: torch.dtype, sm: int) -> int:
    """Its tokens. A Hopper multiplies 64 at least; with them a GPU before would spill, with 32 float32."""
    if dtype == torch.float32:
        return 16
    return 64 if dtype == torch.bfloat16 and sm >= 90 else 32


def segment(T: int, rows: int, N: int, walks: int, multiprocessors: int) -> int:
    """The tokens of a segment: more than T where `walks` of each of N sequences fill the GPU.

    Packed sequences are taken to be of one length: to know would wait for the device.
    """
    if N * walks >= multiprocessors:
        return T + 1
    L = cdiv(rows * T * walks, 2 * multiprocessors * CUT) * CUT
    return L if L < T else T + 1


class Problem:
    """The inputs as the kernels take them, and how they are cut."""

    def __init__(self, q, k, v, log_decay, scale, cu_seqlens, need_log_decay=False):
        self.q, self.k, self.v, self.rate, self.cu_seqlens = map(contiguous, (q, k, v, log_decay, cu_seqlens))
        self.B, self.T, _, self.K = q.shape
        self.V, self.scale, self.heads = v.shape[3], scale, [u.shape[2] for u in (q, k, v)]
        self.H = max(self.heads)
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        multiprocessors, sm = device(q)
        self.C = chunk(q.dtype, sm)
        self.precision = "tf32" if q.dtype == torch.float16 and sm else "ieee"
        walks = self.H * cdiv(self.V, tiles(self.K, self.V, q.dtype).BZ)
        whole = segment(self.T, self.B, self.N, walks, multiprocessors)
        self.L = self.C if need_log_decay else whole
        self.cut = need_log_decay or self.L <= self.T
        self.S, self.segments = self.pieces(self.L)

    def pieces(self, L: int) -> tuple[int, int]:
        """How many of L tokens a row has, and all."""
        S = cdiv(self.T, L)
        return S, self.B * S if self.cu_seqlens is None else self.T // L + self.N

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype)

    def of_all_heads(self, u: Tensor) -> Tensor:
        """Memory for a gradient of u, for each head that reads it."""
        return u.new_empty(self.B, self.T, self.H, u.shape[3])

    def score(self, do=None, drate=None) -> None:
        """P, its gradient, the decays."""
        B, T, H, C = self.B, self.T, self.H, self.C
        self.P = self.empty(B, T, H, C, dtype=kept(self.q.dtype))
        self.dP = None if do is None else torch.empty_like(self.P)
        self.since, self.until = self.empty(B, T, H), self.empty(B, T, H)
        S, chunks = self.pieces(C)
        BK, BV = (max(16, min(64, power_of_2(X))) for X in (self.K, self.V))
        scores_kernel[(chunks * H,)](
            self.q, self.k, self.v, do, self.rate, self.cu_seqlens, self.P, self.dP, self.since, self.until,
            drate, self.scale, T, self.N, S, *self.heads, H, self.K, self.V,
            self.rate.dim() == 3, C, BK, BV, self.precision, **options(4),
        )  # fmt: skip

    def decays(self) -> None:
        """What `score` finds beside P, alone."""
        rate = self.rate.clamp(min=LEAST.value).double().expand(self.B, self.T, self.H)
        A = pad(rate, (0, 0, 0, -self.T % self.C)).unflatten(1, (-1, self.C)).cumsum(2)
        self.since, self.until = (
            u.exp().flatten(1, 2)[:, : self.T].float().contiguous() for u in (A, A[:, :, -1:] - A)
        )

    def walk(
        self, x, y, z, P, reverse, enter, out=None, swapped=False, w=None, dots=None, leave=None, faded=None
    ) -> Tensor | None:
        """out. Rows that a program has no room for are walked after the others, and add to it.

        swapped: rows are V's.
        """
        X, Z = y.shape[3], z.shape[3]
        t = tiles(X, Z, y.dtype)
        columns, tiles_x, at_once = cdiv(Z, t.BZ), cdiv(X, t.BX), t.TILES
        programs = columns * self.segments * self.H
        if out is None:
            programs, tiles_x, at_once = programs * tiles_x, 1, 1
        heads = [1 if u is None else u.shape[2] for u in (x, y, z, w)]
        steps, DOTS = (1, X) if swapped else (Z, 1), 0 if dots is None else dots.shape[3]
        for first in range(0, tiles_x, at_once):
            TILES = min(at_once, tiles_x - first)
            walk_kernel[(programs,)](
                x, y, z, w, P, self.since, self.until, self.cu_seqlens, enter, out, dots, leave, faded,
                self.scale, self.T, self.N, self.S, self.L, *heads, self.H, X, Z, *steps, first * t.BX, DOTS,
                reverse, self.C, t.BX, t.BZ, TILES, self.precision, **options(t.warps), num_stages=1,
            )  # fmt: skip
            dots = None if dots is None else dots[..., columns:]
        return out

    def between_segments(self, y, z, reverse, enter, leave=None, others=None, crossing=None) -> Tensor:
        """The states that enter the segments [segments, H, K, V], found without walking them one by one."""
        states = self.empty(self.segments, self.H, self.K, self.V, dtype=kept(self.q.dtype))
        faded = self.empty(self.segments, self.H)
        self.walk(None, y, z, None, reverse, None, leave=states, faded=faded)
        KV = self.K * self.V
        chain_kernel[(cdiv(KV, BLOCK) * self.H * self.N,)](
            states, faded, enter, leave, self.cu_seqlens, others, crossing,
            self.S, self.L, self.H, KV, reverse, BLOCK, **options(4),
        )  # fmt: skip
        return states


def check(q: Tensor, v: Tensor) -> None:
    for name, axis, size in (("q", "K", q.shape[3]), ("v", "V", v.shape[3])):
        if size > MOST:
            refuse("retention", name, f"[B, T, H, {axis}] with {axis} at most {MOST}", size)


def kept(dtype: torch.dtype) -> torch.dtype:
    """Of P and the states between segments: products with bfloat16 round them anyway; float16 has no room."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in v's dtype and the final state [B or N, H, K, V]."""
    if cu_seqlens is not None:
        boundaries("retention", cu_seqlens, q.shape[1])
    check(q, v)
    p = Problem(q, k, v, log_decay, scale, cu_seqlens)
    enter = contiguous(initial_state)
    o, final = p.empty(p.B, p.T, p.H, p.V, dtype=v.dtype), p.empty(p.N, p.H, p.K, p.V)
    if p.T <= SHORT and cu_seqlens is None:
        recurrent(p, enter, final, o)
        return o, final
    p.score()
    if p.cut:
        enter = p.between_segments(p.k, p.v, False, enter, final)
    p.walk(p.q, p.k, p.v, p.P, False, enter, o, leave=None if p.cut else final)
    return o, final


def backward(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    need_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (zeros [1] where it is not needed) and the initial state."""
    check(q, v)
    p = Problem(q, k, v, log_decay, scale, cu_seqlens, need_log_decay)
    q, k, v, do = p.q, p.k, p.v, contiguous(grad_o)
    enter, end = contiguous(initial_state), contiguous(grad_state)
    dinitial = p.empty(p.N, p.H, p.K, p.V)
    drate, crossing, out_of, into = None, None, None, None
    if need_log_decay:
        t = tiles(p.V, p.K, v.dtype)
        tiles_k = cdiv(p.K, t.BZ) * cdiv(p.V, t.BX * t.TILES)
        drate, crossing = p.empty(p.B, p.T, p.H), p.empty(p.segments, p.H, cdiv(p.K * p.V, BLOCK))
        out_of, into = (p.empty(p.B, p.T, p.H, tiles_k) for _ in "qk")
    p.score(do, drate)
    if p.cut:
        enter = p.between_segments(k, v, False, enter)
        end = p.between_segments(q, do, True, end, dinitial, enter, crossing)
    dq = shared(p.walk(do, v, k, p.dP, False, enter, p.of_all_heads(q), True, q, out_of), q)
    dk = shared(p.walk(v, do, q, p.dP, True, end, p.of_all_heads(k), True, k, into), k)
    leave = None if p.cut else dinitial
    dv = shared(p.walk(k, q, do, p.P, True, end, p.of_all_heads(v), leave=leave), v)
    if drate is None:
        return dq, dk, dv, dinitial.new_zeros(1), dinitial
    rate_kernel[(p.segments * p.H,)](
        p.cu_seqlens, out_of, into, crossing, drate, p.T, p.N, p.S, p.H, tiles_k, crossing.shape[2], p.C,
        **options(4),
    )  # fmt: skip
    drate = drate.sum((0, 1)) if log_decay.dim() == 1 else drate
    return dq, dk, dv, drate, dinitial


def crossing(k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """What all tokens add to the state that enters them, [B, H, K, V]."""
    return crossed(k, v, log_decay, 1.0, False)


def crossing_back(q: Tensor, grad_o: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """What they add to the gradient of that state, [B, H, K, V]."""
    return crossed(q, grad_o, log_decay, scale, True)


def crossed(y: Tensor, z: Tensor, log_decay: Tensor, scale: float, reverse: bool) -> Tensor:
    """The state behind all of y (x) z, from one end to the other."""
    check(y, z)
    H = log_decay.shape[-1]
    z = z if H in (y.shape[2], z.shape[2]) else z.repeat_interleave(H // z.shape[2], 2)
    p = Problem(y, y, z, log_decay, scale, None)
    p.decays()
    state = p.empty(p.B, p.H, p.K, p.V)
    if p.cut:
        p.between_segments(p.k, p.v, reverse, None, state)
    else:
        p.walk(None, p.k, p.v, None, reverse, None, leave=state)
    return state


def shared(grad: Tensor, u: Tensor) -> Tensor:
    """The gradient of u, summed over the heads that share one of u's."""
    return grad if grad.shape == u.shape else grad.unflatten(2, (u.shape[2], -1)).sum(3)


def recurrent(
    p: Problem, enter: Tensor | None, leave: Tensor, o: Tensor, state_indices: Tensor | None = None
) -> None:
    """Fill o and `leave`, which lies as `enter` or is `enter`."""
    BK = max(16, power_of_2(p.K))
    BV = max(1, min(32, MOST * 32 // BK, power_of_2(p.V)))
    rate_row = p.H if p.rate.dim() > 1 else 0
    recurrent_kernel[(p.B * p.H * cdiv(p.V, BV),)](
        p.q, p.k, p.v, p.rate, enter, leave, o, rate_row, p.scale, p.T, *p.heads, p.H, p.K, p.V,
        state_indices, len(leave), *leave.stride(), BK, BV,
        **options(min(8, max(1, BK * BV // 1024))),
    )  # fmt: skip


def takes(state: Tensor, dtype: torch.dtype) -> bool:
    """States of every dtype and any strides."""
    return True


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
) -> Tensor:
    """o [B, H, V]; `state` is updated in place."""
    per_token = log_decay.dim() == 2
    p = Problem(*(u[:, None] for u in (q, k, v)), log_decay[:, None] if per_token else log_decay, scale, None)
    o = v.new_empty(p.B, 1, p.H, p.V)
    recurrent(p, state, state, o, contiguous(state_indices))
    return o[:, 0]
