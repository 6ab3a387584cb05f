"""The gradient of the rates: of small heads all of it, of wide ones what `scores` and walks leave for it.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from .chunks import Cut, locate, tile
from .decays import between, power, running
from .gradients import Outer
from .scores import Pairs, of_pairs


class Weighed(NamedTuple):
    """What each rate weighs: dots out of the state and into it [B T, H, DOTS], products of the states that
    cross a chunk [chunks, H, TILES]."""

    out_of: Tensor
    into: Tensor
    crossing: Tensor


@triton.jit(do_not_specialize=("cut", "H", "DOTS", "TILES"))
def rate_kernel(of: Weighed, p_drate, cut: Cut, H, DOTS, TILES, C: tl.constexpr):
    """Adds to drate [B T, H] the pairs that are not in one chunk: out of the state, into it, and across."""
    i_h, i_c = tl.program_id(0) % H, tl.program_id(0) // H
    first, count, _, _ = locate(cut, i_c)
    o_t = tl.arange(0, C)
    o_i, o_j = o_t[:, None], o_t[None, :]
    m_t, o_drate = o_t < count, (first * H + i_h) + o_t * H
    out_of, into, crossing = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([], tl.float32)
    for i in range(DOTS):
        out_of += tl.load(of.out_of + o_drate * DOTS + i, m_t, 0.0)
        into += tl.load(of.into + o_drate * DOTS + i, m_t, 0.0)
    for i in range(TILES):
        crossing += tl.load(of.crossing + (i_c.to(tl.int64) * H + i_h) * TILES + i)
    drate = tl.load(p_drate + o_drate, m_t, 0.0)
    drate += tl.sum(tl.where(o_j >= o_i, out_of[None, :], 0.0), 1)
    drate += tl.sum(tl.where(o_j < o_i, into[None, :], 0.0), 1)
    tl.store(p_drate + o_drate, drate + crossing, m_t)


class Rating(NamedTuple):
    """What `small_rate_kernel` is compiled for; TILES: products of a state that `chain_kernel` left."""

    H: int
    K: int
    V: int
    PER_TOKEN: bool
    C: int
    BK: int
    BV: int
    TILES: int
    PRECISION: str


@triton.jit(do_not_specialize=("cut",))
def small_rate_kernel(
    of: Pairs, outer: Outer, p_crossing, p_drate, p_rate, cut: Cut, scale, fixed: tl.constexpr
):
    """drate of a chunk: pairs in it, out of the state, into it, and across. With `gradients` in one kernel
    these would spill 400 bytes."""
    H: tl.constexpr = fixed.H
    K: tl.constexpr = fixed.K
    V: tl.constexpr = fixed.V
    PRECISION: tl.constexpr = fixed.PRECISION
    i_h, i_c = tl.program_id(0) % H, tl.program_id(0) // H
    place = locate(cut, i_c)
    first, count, _, _ = place
    o_t, o_k, o_v = tl.arange(0, fixed.C), tl.arange(0, fixed.BK), tl.arange(0, fixed.BV)
    coarse, fine, end_coarse, end_fine = running(p_rate, first, i_h, 0, count, H, fixed.C, fixed.PER_TOKEN)
    row, o_state = i_c.to(tl.int64) * H + i_h, o_k[None, :] * V + o_v[:, None]
    m_state = (o_k < K)[None, :] & (o_v < V)[:, None]
    q = tile(of.q, place, i_h, 0, 0, o_t[:, None], o_k[None, :], H, K)
    k = tile(of.k, place, i_h, 0, 0, o_t[:, None], o_k[None, :], H, K)
    v = tile(of.v, place, i_h, 0, 0, o_t[:, None], o_v[None, :], H, V)
    do = tile(of.do, place, i_h, 0, 0, o_t[:, None], o_v[None, :], H, V)
    pairs = tl.dot(q, tl.trans(k), input_precision=PRECISION) * between(coarse, fine, scale, True)
    pairs *= tl.dot(do, tl.trans(v), input_precision=PRECISION)
    drate = of_pairs(pairs)
    state = tl.load(outer.enter + row * (K * V) + o_state, m_state, 0.0).to(q.dtype)
    out_of = tl.sum(tl.dot(do, state, input_precision=PRECISION) * q, 1) * power(coarse, fine) * scale
    state = tl.load(outer.leave + row * (K * V) + o_state, m_state, 0.0).to(q.dtype)
    into = tl.sum(tl.dot(v, state, input_precision=PRECISION) * k, 1)
    into *= power(end_coarse - coarse, end_fine - fine)
    drate += tl.cumsum(out_of, 0, reverse=True)
    drate += tl.sum(tl.where(o_t[None, :] < o_t[:, None], into[None, :], 0.0), 1)
    o = tl.arange(0, triton.next_power_of_2(fixed.TILES))
    drate += tl.sum(tl.load(p_crossing + row * fixed.TILES + o, o < fixed.TILES, 0.0), 0)
    tl.store(p_drate + (first * H + i_h) + o_t * H, drate, o_t < count)
