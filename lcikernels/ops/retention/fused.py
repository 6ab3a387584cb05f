"""The recurrence of small heads: a state is one tile, scores are made where they are used.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from typing import NamedTuple

import triton
from triton import language as tl

from .chunks import Cut, locate, put, tile
from .decays import between, power, running
from .walk import Ends, Roles


class Fused(NamedTuple):
    """What `fused_kernel` is compiled for; ROW, COLUMN: a state's elements from one to the next."""

    H: int
    X: int
    Z: int
    ROW: int
    COLUMN: int
    REVERSE: bool
    PER_TOKEN: bool
    C: int
    BX: int
    BZ: int
    PRECISION: str


@triton.jit(do_not_specialize=("cut",))
def fused_kernel(roles: Roles, ends: Ends, p_rate, cut: Cut, scale, fixed: tl.constexpr):
    """S^T [BZ, BX] has all rows. scale is in P, and forward in time in the output, else in S."""
    H: tl.constexpr = fixed.H
    X: tl.constexpr = fixed.X
    Z: tl.constexpr = fixed.Z
    C: tl.constexpr = fixed.C
    PRECISION: tl.constexpr = fixed.PRECISION
    tiles_z: tl.constexpr = triton.cdiv(Z, fixed.BZ)
    first_z = tl.program_id(0) % tiles_z * fixed.BZ
    i_h, i_s = tl.program_id(0) // tiles_z % H, tl.program_id(0) // tiles_z // H
    place = locate(cut, i_s)
    first, count, _, _ = place
    o_t, o_x, o_z = tl.arange(0, C), tl.arange(0, fixed.BX), tl.arange(0, fixed.BZ)
    begin = (i_s.to(tl.int64) * H + i_h) * (X * Z) + first_z * fixed.COLUMN
    o_state = o_z[:, None] * fixed.COLUMN + o_x[None, :] * fixed.ROW
    m_z = o_z[:, None] < Z - first_z
    m_state = m_z & (o_x[None, :] < X)
    state = tl.zeros([fixed.BZ, fixed.BX], tl.float32)
    if ends.enter is not None:
        state += tl.load(ends.enter + begin + o_state, m_state, 0.0).to(tl.float32)
    last = (count - 1) // C * C
    for i in range(0, count, C):
        at = last - i if fixed.REVERSE else i
        x = tile(roles.x, place, i_h, at, 0, o_t[None, :], o_x[:, None], H, X)
        y = tile(roles.y, place, i_h, at, 0, o_t[:, None], o_x[None, :], H, X)
        P = tl.dot(y, x, input_precision=PRECISION)
        coarse, fine, end_coarse, end_fine = running(p_rate, first, i_h, at, count, H, C, fixed.PER_TOKEN)
        P = (P * between(coarse, fine, scale, fixed.REVERSE)).to(x.dtype)
        since, until = power(coarse, fine) * scale, power(end_coarse - coarse, end_fine - fine)
        out = tl.dot(state.to(x.dtype), x, input_precision=PRECISION)
        out *= (until if fixed.REVERSE else since)[None, :]
        z = tile(
            roles.z, place, i_h, at, first_z, o_t[None, :], o_z[:, None], H, Z
        )  # earlier, it would spill
        out = tl.dot(z, P, out, input_precision=PRECISION)
        put(out, ends.out, place, i_h, at, first_z, H, Z)
        z = (z * (since if fixed.REVERSE else until)[None, :]).to(z.dtype)
        state = tl.dot(z, y, state * power(end_coarse, end_fine), input_precision=PRECISION)
    if ends.leave is not None:
        tl.store(ends.leave + begin + o_state, state.to(ends.leave.dtype.element_ty), m_state)
