"""Where chunks of tokens are, and their scores: the products of each two of its tokens, and the decays."""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from ..curves import LN2, LOG2E

LEAST = tl.constexpr(-1e3)  # exp of it is 0; less would swallow its neighbours in a sum


class Heads(NamedTuple):
    """A tensor [B T, heads, X] for a kernel: where it is, heads, elements from token to token, head to head.

    Constants, one model has one of each: a step that is no multiple of 16 would else take a load an element.
    """

    p: Tensor
    count: tl.constexpr
    token: tl.constexpr
    head: tl.constexpr


class Scores(NamedTuple):
    """Of a chunk P and its gradient [B T, H, C], exp(A) and exp(A[end] - A) [B T, H], drate [B T, H].

    Without output a walk reads the decays alone.
    """

    P: Tensor | None
    dP: Tensor | None
    since: Tensor
    until: Tensor
    drate: Tensor | None


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
    i = i_h // (H // x.count)
    if x.head > 0 and x.token % x.head == 0:  # one register for all tensors: apart, K=256 V=512 would spill
        p = x.p + ((first * (x.token // x.head) + i) * x.head + start)
    else:
        p = x.p + (first * x.token + i * x.head + start)
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
