"""The gradient of the rates beside what pairs in one chunk give, of heads too wide for `gradients`."""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from .chunks import Cut, locate


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
