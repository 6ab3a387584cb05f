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
from triton import language as tl

from ..checks import boundaries, contiguous, refuse
from ..curves import LN2, LOG2E
from ..launch import cdiv, device, options, power_of_2
from ..views import line, steps, tokens

MOST = 512  # rows or columns of a state
CUT = 256  # tokens: segments are multiples of it
SHORT = 16  # tokens: not more go one by one, instead of a chunk's products of 64
BLOCK = 1024  # elements of a state that chain_kernel carries
LEAST = tl.constexpr(-1e3)  # exp of it is 0; less would swallow its neighbours in a sum


class Heads(NamedTuple):
    """A tensor [B T, heads, X] for a kernel: where it is, heads, elements from token to token, head to head.

    Constants, one model has one of each: a step that is no multiple of 16 would else take a load an element.
    """

    p: Tensor
    count: tl.constexpr
    token: tl.constexpr
    head: tl.constexpr


class Roles(NamedTuple):
    """x, y, z of the recurrence; w, whose products with the output's part from S are asked for."""

    x: Heads | None
    y: Heads
    z: Heads
    w: Heads | None


class Scores(NamedTuple):
    """Of a chunk P and its gradient [B T, H, C], exp(A) and exp(A[end] - A) [B T, H], drate [B T, H]."""

    P: Tensor
    dP: Tensor | None
    since: Tensor
    until: Tensor
    drate: Tensor | None


class Ends(NamedTuple):
    """What a walk starts from and leaves.

    out [B T, H, Z] and the dots with w [B T, Hw, Z] of its part that comes from S, [B T, H, DOTS]. enter,
    leave [segments, H, X, Z] have steps of ROW and COLUMN. faded [segments, H]: what is left of a state.
    """

    enter: Tensor | None
    out: Tensor | None
    dots: Tensor | None
    leave: Tensor | None
    faded: Tensor | None


class Scoring(NamedTuple):
    """What `scores_kernel` is compiled for."""

    H: int
    K: int
    V: int
    PER_TOKEN: bool
    C: int
    BK: int
    BV: int
    PRECISION: str


class Walking(NamedTuple):
    """What `walk_kernel` is compiled for."""

    H: int
    X: int
    Z: int
    ROW: int
    COLUMN: int
    START: int
    DOTS: int
    REVERSE: bool
    C: int
    BX: int
    BZ: int
    TILES: int
    PRECISION: str


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
def tile(x, first, i_h, H: tl.constexpr, X: tl.constexpr, o_t, m_t, start, o_x):
    """Tokens o_t from `first`, columns o_x from `start`, of the head of x that i_h reads.

    o_t and o_x are of two axes, start is of whole tiles and before X. float32 but for bfloat16: tf32 has
    float16's bits, and room for states that float16 has not. An offset in 64 bits is made anew for each tile;
    one that stays the same would stay in registers.
    """
    m = m_t if (o_x.numel - X) % o_x.numel == 0 else m_t & (o_x < X - start)
    p = x.p + (first * x.token + i_h // (H // x.count) * x.head + start)
    u = tl.load(p + o_t.to(tl.int64) * x.token + o_x, m, 0.0)
    return u if u.dtype == tl.bfloat16 else u.to(tl.float32)


@triton.jit
def power(A):
    """2^A of a float64, as exact as a GPU's exp2 of a float32 that A is not."""
    near = A.to(tl.float32)
    y = tl.math.exp2(near)
    return y + y * ((A - near.to(tl.float64)).to(tl.float32) * LN2)


@triton.jit
def products(
    x, y, here, m_t, i_h, H: tl.constexpr, X: tl.constexpr, C: tl.constexpr, BX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x y^T of a chunk."""
    o_t, o_x, scores = tl.arange(0, C), tl.arange(0, BX), tl.zeros([C, C], tl.float32)
    for i in range(0, X, BX):
        of_x = tile(x, here, i_h, H, X, o_t[:, None], m_t[:, None], i, o_x[None, :])
        of_y = tile(y, here, i_h, H, X, o_t[None, :], m_t[None, :], i, o_x[:, None])
        scores = tl.dot(of_x, of_y, scores, input_precision=PRECISION)
    return scores


@triton.jit(do_not_specialize=("T", "N", "S"))
def scores_kernel(q, k, v, do, to, p_rate, p_cu, scale, T, N, S, fixed: tl.constexpr):
    """The scores of a chunk, and the share of drate that is from pairs in it: the decay of token r weighs
    those of s < r <= t. They are summed, never subtracted from a larger sum.
    """
    H: tl.constexpr = fixed.H
    C: tl.constexpr = fixed.C
    i_h, i_c = tl.program_id(0) % H, tl.program_id(0) // H
    here, left = locate(p_cu, i_c, T, N, S, C)
    o_t = tl.arange(0, C)
    m_t, o_i, o_j = o_t < left, o_t[:, None], o_t[None, :]
    if fixed.PER_TOKEN:
        rate = tl.load(p_rate + here * H + i_h + o_t * H, m_t, 0.0)
    else:
        rate = tl.load(p_rate + i_h)
    rate = tl.where(rate < LEAST, LEAST, rate).to(tl.float64) * LOG2E
    A = tl.cumsum(rate, 0) if fixed.PER_TOKEN else tl.minimum(o_t + 1, left).to(tl.float64) * rate
    end = tl.sum(tl.where(o_t == C - 1, A, 0.0), 0)
    tl.store(to.since + here * H + i_h + o_t * H, power(A), m_t)
    tl.store(to.until + here * H + i_h + o_t * H, power(end - A), m_t)
    D = power(tl.where(o_j <= o_i, A[:, None] - A[None, :], LEAST)) * scale
    P = products(q, k, here, m_t, i_h, H, fixed.K, C, fixed.BK, fixed.PRECISION) * D
    o_P = (here * H + i_h) * C + (o_i * (H * C) + o_j)
    tl.store(to.P + o_P, P.to(to.P.dtype.element_ty), m_t[:, None])
    if to.dP is not None:
        dP = products(do, v, here, m_t, i_h, H, fixed.V, C, fixed.BV, fixed.PRECISION)
        tl.store(to.dP + o_P, (dP * D).to(to.dP.dtype.element_ty), m_t[:, None])
        if to.drate is not None:
            pairs = tl.where(o_j < o_i, P * dP, 0.0)
            after = tl.cumsum(pairs, 0, reverse=True)  # [r, s]: of all t >= r
            drate = tl.sum(tl.where(o_j < o_i, after, 0.0), 1)
            tl.store(to.drate + here * H + i_h + o_t * H, drate, m_t)


@triton.jit(do_not_specialize=("T", "N", "S", "L"))
def walk_kernel(roles, scores, ends, p_cu, scale, T, N, S, L, fixed: tl.constexpr):
    """TILES of S at once, from row START on; those after the first add to out.

    Without out a program has one tile, and finds `faded`. scale is in P, and forward in time in the output,
    else in S.
    """
    H: tl.constexpr = fixed.H
    X: tl.constexpr = fixed.X
    Z: tl.constexpr = fixed.Z
    C: tl.constexpr = fixed.C
    BX: tl.constexpr = fixed.BX
    BZ: tl.constexpr = fixed.BZ
    ROW: tl.constexpr = fixed.ROW
    COLUMN: tl.constexpr = fixed.COLUMN
    DOTS: tl.constexpr = fixed.DOTS
    tiles_z: tl.constexpr = triton.cdiv(Z, BZ)
    tiles_x: tl.constexpr = triton.cdiv(X, BX) if ends.out is None else 1
    tiles: tl.constexpr = tiles_z * tiles_x
    first_z = tl.program_id(0) % tiles_z * BZ
    first_x = tl.program_id(0) % tiles // tiles_z * BX if tiles_x > 1 else fixed.START
    i_h, i_s = tl.program_id(0) // tiles % H, tl.program_id(0) // tiles // H
    first, count = locate(p_cu, i_s, T, N, S, L)
    o_t, o_x, o_z = tl.arange(0, C), tl.arange(0, BX), tl.arange(0, BZ)
    begin = (i_s.to(tl.int64) * H + i_h) * (X * Z) + first_x * ROW + first_z * COLUMN
    o_state, m_z = o_z[:, None] * COLUMN + o_x[None, :] * ROW, o_z[:, None] < Z - first_z
    state, faded = (), tl.full([], 1.0, tl.float32)
    for j in tl.static_range(fixed.TILES):
        S_j = tl.zeros([BZ, BX], tl.float32)
        if ends.enter is not None:
            m_j = m_z & (o_x[None, :] < X - first_x - j * BX)
            S_j += tl.load(ends.enter + (begin + j * BX * ROW) + o_state, m_j, 0.0).to(tl.float32)
        state += (S_j,)
    if ends.out is not None:
        p_P = scores.P + (first * H + i_h) * C
        p_out = ends.out + ((first * H + i_h) * Z + first_z)
        if ends.dots is not None:
            p_dots = ends.dots + ((first * H + i_h) * DOTS + first_z // BZ)
    p_since, p_until = scores.since + (first * H + i_h), scores.until + (first * H + i_h)
    last = (count - 1) // C * C
    for i in range(0, count, C):
        at = last - i if fixed.REVERSE else i
        t = at + o_t
        m_t, t_H = t < count, t.to(tl.int64) * H
        if ends.out is not None:
            out = tl.zeros([BZ, C], tl.float32)
            for j in tl.static_range(fixed.TILES):
                x = tile(roles.x, first, i_h, H, X, t[None, :], m_t[None, :], first_x + j * BX, o_x[:, None])
                out = tl.dot(state[j].to(x.dtype), x, out, input_precision=fixed.PRECISION)
            out *= tl.load((p_until if fixed.REVERSE else p_since) + t_H, m_t, 0.0)[None, :]
            out *= 1.0 if fixed.REVERSE else scale
            if ends.dots is not None:
                w = tile(roles.w, first, i_h, H, Z, t[None, :], m_t[None, :], first_z, o_z[:, None])
                dots = tl.sum(out * w, 0)
                tl.store(p_dots + t_H * DOTS, dots, m_t)
            # Loaded any earlier, z would spill.
            z = tile(roles.z, first, i_h, H, Z, t[None, :], m_t[None, :], first_z, o_z[:, None])
            m_out = m_t[None, :] if (BZ - Z) % BZ == 0 else m_t[None, :] & m_z
            o_out = t[None, :].to(tl.int64) * (H * Z) + o_z[:, None]
            if fixed.START == 0:
                if fixed.REVERSE:
                    P = tl.load(p_P + t[:, None].to(tl.int64) * (H * C) + o_t[None, :], m_t[:, None], 0.0)
                else:
                    P = tl.load(p_P + t[None, :].to(tl.int64) * (H * C) + o_t[:, None], m_t[None, :], 0.0)
                out = tl.dot(z, P, out, input_precision=fixed.PRECISION)
            else:
                out += tl.load(p_out + o_out, m_out, 0.0).to(tl.float32)
            tl.store(p_out + o_out, out.to(p_out.dtype.element_ty), m_out)
        else:
            z = tile(roles.z, first, i_h, H, Z, t[None, :], m_t[None, :], first_z, o_z[:, None])
        into = tl.load((p_since if fixed.REVERSE else p_until) + t_H, m_t, 0.0)
        into *= scale if fixed.REVERSE else 1.0
        z = (z * into[None, :]).to(z.dtype)
        whole = tl.load(p_since + (tl.minimum(at + C, count) - 1).to(tl.int64) * H)
        faded *= whole
        after = ()
        for j in tl.static_range(fixed.TILES):
            y = tile(roles.y, first, i_h, H, X, t[:, None], m_t[:, None], first_x + j * BX, o_x[None, :])
            after += (tl.dot(z, y, state[j] * whole, input_precision=fixed.PRECISION),)
        state = after
    if ends.leave is not None:
        for j in tl.static_range(fixed.TILES):
            m_j = m_z & (o_x[None, :] < X - first_x - j * BX)
            p_leave = ends.leave + (begin + j * BX * ROW) + o_state
            tl.store(p_leave, state[j].to(ends.leave.dtype.element_ty), m_j)
    if ends.faded is not None:
        tl.store(ends.faded + i_s * H + i_h, faded)


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


@triton.jit
def vector(x, i_b, t, i_h, o, m):
    """Elements o of a token and head of x, a Tokens."""
    p = x.p + steps(i_b, x.row) + steps(t, x.token) + steps(i_h, x.group)
    return tl.load(p + steps(o, x.channel), m, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=("T", "Hq", "Hk", "Hv", "H", "rate_row"))
def recurrent_kernel(
    q, k, v, p_rate, p_enter, p_leave, p_o, rate_row, scale, T, Hq, Hk, Hv, H, K, V,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Token by token, with all rows and BV columns of a state. rate_row: 0 where all tokens have one rate."""
    tiles = tl.cdiv(V, BV)
    i_v, i_h = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H
    i_b = (tl.program_id(0) // tiles // H).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    o_state = (i_b * H + i_h) * K * V + (o_k[:, None] * V + o_v[None, :])
    m_state = m_k[:, None] & m_v[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if p_enter is not None:
        state += tl.load(p_enter + o_state, m_state, 0.0)
    for t in range(T):
        row = i_b * T + t
        b_q = vector(q, i_b, t, i_h // (H // Hq), o_k, m_k)
        b_k = vector(k, i_b, t, i_h // (H // Hk), o_k, m_k)
        b_v = vector(v, i_b, t, i_h // (H // Hv), o_v, m_v)
        decay = tl.math.exp2(tl.load(p_rate + row * rate_row + i_h) * LOG2E)
        state = state * decay + b_k[:, None] * b_v[None, :]
        o = tl.sum(b_q[:, None] * state, 0) * scale
        tl.store(p_o + (row * H + i_h) * V + o_v, o.to(p_o.dtype.element_ty), m_v)
    tl.store(p_leave + o_state, state, m_state)


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
        self.q, self.k, self.v = q, k, v
        self.rate, self.cu_seqlens = contiguous(log_decay), contiguous(cu_seqlens)
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

    def score(self, q: Heads, k: Heads, v: Heads, do: Heads | None = None, drate=None) -> None:
        """P, its gradient, the decays."""
        B, T, H, C = self.B, self.T, self.H, self.C
        P = self.empty(B, T, H, C, dtype=kept(self.q.dtype))
        dP = None if do is None else torch.empty_like(P)
        self.scores = Scores(P, dP, self.empty(B, T, H), self.empty(B, T, H), drate)
        S, chunks = self.pieces(C)
        BK, BV = (max(16, min(64, power_of_2(X))) for X in (self.K, self.V))
        fixed = Scoring(H, self.K, self.V, self.rate.dim() == 3, C, BK, BV, self.precision)
        scores_kernel[(chunks * H,)](
            q, k, v, do, self.scores, self.rate, self.cu_seqlens, self.scale, T, self.N, S, fixed,
            **options(4),
        )  # fmt: skip

    def walk(self, roles: Roles, scores: Scores, ends: Ends, reverse: bool, swapped: bool = False) -> Tensor:
        """out. Rows that a program has no room for are walked after the others, and add to it.

        swapped: rows are V's.
        """
        X, Z = roles.y.p.shape[2], roles.z.p.shape[2]
        t = tiles(X, Z, roles.y.p.dtype)
        columns, tiles_x, at_once = cdiv(Z, t.BZ), cdiv(X, t.BX), t.TILES
        programs = columns * self.segments * self.H
        if ends.out is None:
            programs, tiles_x, at_once = programs * tiles_x, 1, 1
        DOTS = 0 if ends.dots is None else ends.dots.shape[3]
        for first in range(0, tiles_x, at_once):
            fixed = Walking(
                self.H, X, Z, *((1, X) if swapped else (Z, 1)), first * t.BX, DOTS, reverse,
                self.C, t.BX, t.BZ, min(at_once, tiles_x - first), self.precision,
            )  # fmt: skip
            walk_kernel[(programs,)](
                roles, scores, ends, self.cu_seqlens, self.scale, self.T, self.N, self.S, self.L, fixed,
                **options(t.warps), num_stages=1,
            )  # fmt: skip
            if ends.dots is not None:
                ends = ends._replace(dots=ends.dots[..., columns:])
        return ends.out

    def between_segments(self, y, z, reverse, enter, leave=None, others=None, crossing=None) -> Tensor:
        """The states that enter the segments [segments, H, K, V], found without walking them one by one."""
        states = self.empty(self.segments, self.H, self.K, self.V, dtype=kept(self.q.dtype))
        faded = self.empty(self.segments, self.H)
        ends = Ends(None, None, None, states, faded)
        self.walk(Roles(None, y, z, None), self.scores, ends, reverse)
        KV = self.K * self.V
        chain_kernel[(cdiv(KV, BLOCK) * self.H * self.N,)](
            states, faded, enter, leave, self.cu_seqlens, others, crossing,
            self.S, self.L, self.H, KV, reverse, BLOCK, **options(4),
        )  # fmt: skip
        return states


def heads(x: Tensor) -> Heads:
    """x [B, T, heads, X] as kernels take it: a view where tokens are equally far apart, else a copy."""
    rows = line(x)
    _, count, X = rows.shape
    return Heads(rows, *map(tl.constexpr, (count, rows.stride(0), X if count == 1 else rows.stride(1))))


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
    q, k, v = map(heads, (q, k, v))
    p.score(q, k, v)
    if p.cut:
        enter = p.between_segments(k, v, False, enter, final)
    p.walk(Roles(q, k, v, None), p.scores, Ends(enter, o, None, None if p.cut else final, None), False)
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
    of_q, of_k, of_v, of_do = map(heads, (q, k, v, grad_o))
    enter, end = contiguous(initial_state), contiguous(grad_state)
    dinitial = p.empty(p.N, p.H, p.K, p.V)
    drate, crossing, out_of, into = None, None, None, None
    if need_log_decay:
        t = tiles(p.V, p.K, v.dtype)
        tiles_k = cdiv(p.K, t.BZ) * cdiv(p.V, t.BX * t.TILES)
        drate, crossing = p.empty(p.B, p.T, p.H), p.empty(p.segments, p.H, cdiv(p.K * p.V, BLOCK))
        out_of, into = (p.empty(p.B, p.T, p.H, tiles_k) for _ in "qk")
    p.score(of_q, of_k, of_v, of_do, drate)
    if p.cut:
        enter = p.between_segments(of_k, of_v, False, enter)
        end = p.between_segments(of_q, of_do, True, end, dinitial, enter, crossing)
    of_dP = p.scores._replace(P=p.scores.dP)
    ends = Ends(enter, p.of_all_heads(q), out_of, None, None)
    dq = shared(p.walk(Roles(of_do, of_v, of_k, of_q), of_dP, ends, False, True), q)
    ends = Ends(end, p.of_all_heads(k), into, None, None)
    dk = shared(p.walk(Roles(of_v, of_do, of_q, of_k), of_dP, ends, True, True), k)
    ends = Ends(end, p.of_all_heads(v), None, None if p.cut else dinitial, None)
    dv = shared(p.walk(Roles(of_k, of_q, of_do, None), p.scores, ends, True), v)
    if drate is None:
        return dq, dk, dv, dinitial.new_zeros(1), dinitial
    rate_kernel[(p.segments * p.H,)](
        p.cu_seqlens, out_of, into, crossing, drate, p.T, p.N, p.S, p.H, tiles_k, crossing.shape[2], p.C,
        **options(4),
    )  # fmt: skip
    drate = drate.sum((0, 1)) if log_decay.dim() == 1 else drate
    return dq, dk, dv, drate, dinitial


def shared(grad: Tensor, u: Tensor) -> Tensor:
    """The gradient of u, summed over the heads that share one of u's."""
    return grad if grad.shape == u.shape else grad.unflatten(2, (u.shape[2], -1)).sum(3)


def recurrent(p: Problem, enter: Tensor | None, leave: Tensor, o: Tensor) -> None:
    """Fill o and `leave`, which may be `enter`."""
    BK = max(16, power_of_2(p.K))
    BV = max(1, min(32, MOST * 32 // BK, power_of_2(p.V)))
    rate_row = p.H if p.rate.dim() > 1 else 0
    recurrent_kernel[(p.B * p.H * cdiv(p.V, BV),)](
        *map(tokens, (p.q, p.k, p.v)), p.rate, enter, leave, o, rate_row, p.scale, p.T,
        *p.heads, p.H, p.K, p.V, BK, BV,
        **options(min(8, max(1, BK * BV // 1024))),
    )  # fmt: skip


def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float) -> Tensor:
    """o [B, H, V]; `state`, contiguous, is updated in place."""
    per_token = log_decay.dim() == 2
    p = Problem(*(u[:, None] for u in (q, k, v)), log_decay[:, None] if per_token else log_decay, scale, None)
    o = v.new_empty(p.B, 1, p.H, p.V)
    recurrent(p, state, state, o)
    return o[:, 0]
