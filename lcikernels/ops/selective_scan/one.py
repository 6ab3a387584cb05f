"""One token of the scan, which updates states where they lie.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from ..curves import of_state, silu, state_of, within
from ..views import wide
from .line import advance, place, put, rates, read, step_size, token


class Token(NamedTuple):
    """Dense: x, dt, z [B, D], a [D, N], b, c [B, G, N], d, bias [D]."""

    x: Tensor
    dt: Tensor
    z: Tensor | None
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor | None
    bias: Tensor | None


class States(NamedTuple):
    """States [S, D, N] and elements from one index to the next; which of them a row has, None: its own."""

    p: Tensor
    row: int
    channel: int
    state: int
    rows: Tensor | None


@triton.jit(do_not_specialize=("S",))
def step_kernel(
    given, states, p_y, D, G, S, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr
):
    at = place(D, G, N, BN, BD)
    i_b = wide(at.k)
    o_h = at.n[:, None] + at.d[None, :] * N
    x = token(given.x, i_b, D, at.d, at.m_d)
    bias, skip = read(given.bias, at.d, at.m_d, [BD]), read(given.d, at.d, at.m_d, [BD])
    delta = step_size(given.dt, i_b, D, at.d, at.m_d, bias, SOFTPLUS)
    o_b = (i_b * G + at.g) * N + at.n
    b, c = read(given.b, o_b, at.m_n, [BN]), read(given.c, o_b, at.m_n, [BN])
    i_s, there = state_of(states.rows, i_b, S)
    p_state = states.p + i_s * states.row + wide(at.n)[:, None] * states.state
    p_state += wide(at.d)[None, :] * states.channel
    m_state = within(at.m_h, there)
    H = tl.load(p_state, m_state, 0.0).to(tl.float32)
    H = advance(H, rates(given.a, o_h, at.m_h), delta, x, b)
    tl.store(p_state, H.to(p_state.dtype.element_ty), m_state)
    y = tl.sum(H * c[:, None], 0) + skip * x
    if given.z is not None:
        y *= silu(token(given.z, i_b, D, at.d, at.m_d))
    put(p_y, i_b, D, at.d, of_state(y, states.rows, i_s, S), at.m_d)
