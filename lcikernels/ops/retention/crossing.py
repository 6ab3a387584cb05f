"""The states that enter the segments of a sequence: what each adds, without output, then one after another.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from .chunks import Cut, Heads, boundary, locate, tile
from .decays import power, running


class Added(NamedTuple):
    """What a segment makes of y (x) z [segments, H, X, Z], and what it leaves of a state [segments, H]."""

    states: Tensor
    faded: Tensor | None


class Crossing(NamedTuple):
    """What `crossing_kernel` is compiled for."""

    H: int
    X: int
    Z: int
    REVERSE: bool
    PER_TOKEN: bool
    C: int
    BX: int
    BZ: int
    PRECISION: str


@triton.jit(do_not_specialize=("cut",))
def crossing_kernel(y: Heads, z: Heads, to: Added, p_rate, cut: Cut, scale, fixed: tl.constexpr):
    """A tile [BZ, BX] of S^T behind a segment, from zeros: S <- exp(A[end]) S + y^T (exp(A[end] - A) z)."""
    H: tl.constexpr = fixed.H
    X: tl.constexpr = fixed.X
    Z: tl.constexpr = fixed.Z
    C: tl.constexpr = fixed.C
    tiles_z: tl.constexpr = triton.cdiv(Z, fixed.BZ)
    tiles: tl.constexpr = tiles_z * triton.cdiv(X, fixed.BX)
    first_z, first_x = tl.program_id(0) % tiles_z * fixed.BZ, tl.program_id(0) % tiles // tiles_z * fixed.BX
    i_h, i_s = tl.program_id(0) // tiles % H, tl.program_id(0) // tiles // H
    place = locate(cut, i_s)
    first, count, _, _ = place
    o_t, o_x, o_z = tl.arange(0, C), tl.arange(0, fixed.BX), tl.arange(0, fixed.BZ)
    state, faded = tl.zeros([fixed.BZ, fixed.BX], tl.float32), tl.full([], 1.0, tl.float32)
    last = (count - 1) // C * C
    for i in range(0, count, C):
        at = last - i if fixed.REVERSE else i
        coarse, fine, end_coarse, end_fine = running(p_rate, first, i_h, at, count, H, C, fixed.PER_TOKEN)
        whole = power(end_coarse, end_fine)
        into = power(coarse, fine) * scale if fixed.REVERSE else power(end_coarse - coarse, end_fine - fine)
        of_z = tile(z, place, i_h, at, first_z, o_t[None, :], o_z[:, None], H, Z)
        of_y = tile(y, place, i_h, at, first_x, o_t[:, None], o_x[None, :], H, X)
        of_z = (of_z * into[None, :]).to(of_z.dtype)
        state = tl.dot(of_z, of_y, state * whole, input_precision=fixed.PRECISION)
        faded *= whole
    begin = (i_s.to(tl.int64) * H + i_h) * (X * Z) + first_x * Z + first_z
    m = (o_z[:, None] < Z - first_z) & (o_x[None, :] < X - first_x)
    tl.store(to.states + begin + (o_z[:, None] + o_x[None, :] * Z), state.to(to.states.dtype.element_ty), m)
    if to.faded is not None:
        tl.store(to.faded + i_s * H + i_h, faded)


@triton.jit(do_not_specialize=("cut", "H"))
def chain_kernel(
    of: Added, p_enter, p_leave, p_others, p_crossing, cut: Cut, H, KV, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """In of.states what each segment adds becomes what enters it; enter and leave are [N, H, K V].

    crossing [segments, H, tiles]: their products with `others`, which enter at the other end, as those leave.
    """
    tiles = tl.cdiv(KV, BLOCK)
    i_x, i_h, i_n = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H, tl.program_id(0) // tiles // H
    if cut.p_cu is None:
        first, count = i_n * cut.S, cut.S
    else:
        begin, end = boundary(cut, i_n), boundary(cut, i_n + 1)
        first, count = begin // cut.L + i_n, tl.cdiv(tl.maximum(end - begin, 0), cut.L)
    o = i_x * BLOCK + tl.arange(0, BLOCK)
    m = o < KV
    o_n = (i_n.to(tl.int64) * H + i_h) * KV + o
    state = tl.zeros([BLOCK], tl.float32)
    if p_enter is not None:
        state += tl.load(p_enter + o_n, m, 0.0)
    for i in range(count):
        i_s = (first + (count - 1 - i if REVERSE else i)).to(tl.int64) * H + i_h
        more = tl.load(of.states + i_s * KV + o, m, 0.0).to(tl.float32)
        tl.store(of.states + i_s * KV + o, state.to(of.states.dtype.element_ty), m)
        faded = tl.load(of.faded + i_s)
        if p_crossing is not None:
            other = tl.load(p_others + i_s * KV + o, m, 0.0).to(tl.float32)
            tl.store(p_crossing + i_s * tiles + i_x, tl.sum(other * state, 0) * faded)
        state = state * faded + more
    if p_leave is not None:
        tl.store(p_leave + o_n, state, m)
