"""The recurrence from chunk to chunk with many rows of the state at once, whose scores are in memory.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from .chunks import Cut, Heads, locate, put, tile


class Roles(NamedTuple):
    """x, y, z of the recurrence; w, whose products with the output's part from S are asked for; the scores P
    [B T, H, C] of a chunk that are not made here; what S is rounded to."""

    x: Heads
    y: Heads
    z: Heads
    w: Heads | None
    P: Heads | None
    dtype: tl.constexpr | None


class Decays(NamedTuple):
    """exp(A) and exp(A[end] - A) [B T, H], A the running sum of a chunk's rates."""

    since: Tensor
    until: Tensor


class Ends(NamedTuple):
    """What a walk starts from and leaves.

    out [B T, H, Z], part as out and of float32: what earlier rows gave, and what these give if out is not
    written. dots with w [B T, H, DOTS] of the output's part from S. enter, leave [segments, H, X, Z].
    """

    enter: Tensor | None
    leave: Tensor | None
    out: Heads | None
    part: Tensor | None
    dots: Tensor | None


class Walking(NamedTuple):
    """What `walk_kernel` is compiled for: TILES of BX rows from START on; a state's elements from one row
    and from one column to the next; the stages of its loads."""

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
    STAGES: int
    PRECISION: str


@triton.jit
def states(p, begin, o_x, o_z, first_x, first_z, fixed: tl.constexpr):
    """TILES of S^T [BZ, BX], from memory or zeros."""
    tiles = ()
    for j in tl.static_range(fixed.TILES):
        S_j = tl.zeros([fixed.BZ, fixed.BX], tl.float32)
        if p is not None:
            m = (o_z[:, None] < fixed.Z - first_z) & (o_x[None, :] < fixed.X - first_x - j * fixed.BX)
            o = o_z[:, None] * fixed.COLUMN + o_x[None, :] * fixed.ROW
            S_j += tl.load(p + (begin + j * fixed.BX * fixed.ROW) + o, m, 0.0).to(tl.float32)
        tiles += (S_j,)
    return tiles


@triton.jit
def read(state, roles, place, i_h, at, o_t, o_x, first_x, fixed: tl.constexpr):
    """S^T x^T of a chunk. All of S is rounded before the first product: a Hopper multiplies while it
    loads the next tile, but waits for a conversion between two products."""
    packed = ()
    for j in tl.static_range(fixed.TILES):
        packed += (state[j].to(roles.dtype),)
    out = tl.zeros([fixed.BZ, fixed.C], tl.float32)
    for j in tl.static_range(fixed.TILES):
        start = first_x + j * fixed.BX
        x = tile(roles.x, place, i_h, at, start, o_t[None, :], o_x[:, None], fixed.H, fixed.X)
        out = tl.dot(packed[j], x, out, input_precision=fixed.PRECISION)
    return out


@triton.jit(do_not_specialize=("cut",))
def walk_kernel(roles: Roles, decays: Decays, ends: Ends, cut: Cut, scale, fixed: tl.constexpr):
    """scale is in P, and forward in time in the output, else in S."""
    H: tl.constexpr = fixed.H
    Z: tl.constexpr = fixed.Z
    C: tl.constexpr = fixed.C
    tiles_z: tl.constexpr = triton.cdiv(Z, fixed.BZ)
    first_x: tl.constexpr = fixed.START
    first_z = tl.program_id(0) % tiles_z * fixed.BZ
    i_h, i_s = tl.program_id(0) // tiles_z % H, tl.program_id(0) // tiles_z // H
    place = locate(cut, i_s)
    first, count, _, _ = place
    o_t, o_x, o_z = tl.arange(0, C), tl.arange(0, fixed.BX), tl.arange(0, fixed.BZ)
    begin = (i_s.to(tl.int64) * H + i_h) * (fixed.X * Z) + first_x * fixed.ROW + first_z * fixed.COLUMN
    state = states(ends.enter, begin, o_x, o_z, first_x, first_z, fixed)
    head = first * H + i_h
    last = (count - 1) // C * C
    for i in tl.range(0, count, C, num_stages=fixed.STAGES):
        at = last - i if fixed.REVERSE else i
        t = at + o_t
        m_t, t_H = t < count, t.to(tl.int64) * H
        out = read(state, roles, place, i_h, at, o_t, o_x, first_x, fixed)
        out *= tl.load((decays.until if fixed.REVERSE else decays.since) + head + t_H, m_t, 0.0)[None, :]
        out *= 1.0 if fixed.REVERSE else scale
        if ends.dots is not None:
            w = tile(roles.w, place, i_h, at, first_z, o_t[None, :], o_z[:, None], H, Z)
            p_dots = ends.dots + head * fixed.DOTS + first_z // fixed.BZ
            tl.store(p_dots + t_H * fixed.DOTS, tl.sum(out * w, 0), m_t)
        m_out = m_t[None, :] if Z % fixed.BZ == 0 else m_t[None, :] & (o_z[:, None] < Z - first_z)
        o_out = (head * Z + first_z) + (t[None, :].to(tl.int64) * (H * Z) + o_z[:, None])
        if fixed.START > 0:  # z is loaded after: before it, 40 to 64 bytes spill
            out += tl.load(ends.part + o_out, m_out, 0.0)
        else:
            z = tile(roles.z, place, i_h, at, first_z, o_t[None, :], o_z[:, None], H, Z)
            if fixed.REVERSE:
                P = tile(roles.P, place, i_h, at, 0, o_t[:, None], o_t[None, :], H, C)
            else:
                P = tile(roles.P, place, i_h, at, 0, o_t[None, :], o_t[:, None], H, C)
            out = tl.dot(z, P, out, input_precision=fixed.PRECISION)
        if ends.out is None:
            tl.store(ends.part + o_out, out, m_out)
        else:
            put(out, ends.out, place, i_h, at, first_z, H, Z)
        if fixed.START > 0:
            z = tile(roles.z, place, i_h, at, first_z, o_t[None, :], o_z[:, None], H, Z)
        into = tl.load((decays.since if fixed.REVERSE else decays.until) + head + t_H, m_t, 0.0)
        into *= scale if fixed.REVERSE else 1.0
        z = (z * into[None, :]).to(z.dtype)
        whole = tl.load(decays.since + head + (tl.minimum(at + C, count) - 1).to(tl.int64) * H)
        after = ()
        for j in tl.static_range(fixed.TILES):
            y = tile(roles.y, place, i_h, at, first_x + j * fixed.BX, o_t[:, None], o_x[None, :], H, fixed.X)
            after += (tl.dot(z, y, state[j] * whole, input_precision=fixed.PRECISION),)
        state = after
    if ends.leave is not None:
        for j in tl.static_range(fixed.TILES):
            m = (o_z[:, None] < Z - first_z) & (o_x[None, :] < fixed.X - first_x - j * fixed.BX)
            o = o_z[:, None] * fixed.COLUMN + o_x[None, :] * fixed.ROW
            p = ends.leave + (begin + j * fixed.BX * fixed.ROW) + o
            tl.store(p, state[j].to(ends.leave.dtype.element_ty), m)
