"""The scores of chunks: products of each two tokens of one, and the decays. For heads too wide for `fused`.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from .chunks import Heads, locate, tile
from .decays import between, power, running


class Pairs(NamedTuple):
    """q, k, and for the gradients v, do."""

    q: Heads
    k: Heads
    v: Heads | None
    do: Heads | None


class Scores(NamedTuple):
    """Of a chunk P and its gradient [B T, H, C], exp(A) and exp(A[end] - A) [B T, H], drate [B T, H]."""

    P: Tensor
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
def products(
    x, y, place, i_h, H: tl.constexpr, X: tl.constexpr, C: tl.constexpr, BX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x y^T of a chunk."""
    o_t, o_x, scores = tl.arange(0, C), tl.arange(0, BX), tl.zeros([C, C], tl.float32)
    for i in range(0, X, BX):
        of_x = tile(x, place, i_h, 0, i, o_t[:, None], o_x[None, :], H, X)
        of_y = tile(y, place, i_h, 0, i, o_t[None, :], o_x[:, None], H, X)
        scores = tl.dot(of_x, of_y, scores, input_precision=PRECISION)
    return scores


@triton.jit
def of_pairs(pairs):
    """The share of drate that is from pairs [t, s] in a chunk: the decay of token r weighs those of
    s < r <= t. They are summed, never subtracted from a larger sum."""
    o_t = tl.arange(0, pairs.shape[0])
    before = o_t[None, :] < o_t[:, None]
    after = tl.cumsum(tl.where(before, pairs, 0.0), 0, reverse=True)  # [r, s]: of all t >= r
    return tl.sum(tl.where(before, after, 0.0), 1)


@triton.jit(do_not_specialize=("cut",))
def scores_kernel(pairs, to, p_rate, cut, scale, fixed: tl.constexpr):
    """The scores of a chunk, its decays, and its own share of drate."""
    H: tl.constexpr = fixed.H
    C: tl.constexpr = fixed.C
    i_h, i_c = tl.program_id(0) % H, tl.program_id(0) // H
    place = locate(cut, i_c)
    first, count, _, _ = place
    o_t = tl.arange(0, C)
    m_t, o_row = o_t < count, first * H + i_h + o_t * H
    coarse, fine, end_coarse, end_fine = running(p_rate, first, i_h, 0, count, H, C, fixed.PER_TOKEN)
    tl.store(to.since + o_row, power(coarse, fine), m_t)
    tl.store(to.until + o_row, power(end_coarse - coarse, end_fine - fine), m_t)
    D = between(coarse, fine, scale, True)
    P = products(pairs.q, pairs.k, place, i_h, H, fixed.K, C, fixed.BK, fixed.PRECISION) * D
    o_P = (first * H + i_h) * C + (o_t[:, None] * (H * C) + o_t[None, :])
    tl.store(to.P + o_P, P.to(to.P.dtype.element_ty), m_t[:, None])
    if to.dP is not None:
        dP = products(pairs.do, pairs.v, place, i_h, H, fixed.V, C, fixed.BV, fixed.PRECISION)
        tl.store(to.dP + o_P, (dP * D).to(to.dP.dtype.element_ty), m_t[:, None])
        if to.drate is not None:
            tl.store(to.drate + o_row, of_pairs(P * dP), m_t)
