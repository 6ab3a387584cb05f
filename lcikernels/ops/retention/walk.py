"""The recurrence from chunk to chunk, what joins the segments of a sequence, the gradient of the rates."""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from .scores import Heads, locate, tile


class Roles(NamedTuple):
    """x, y, z of the recurrence; w, whose products with the output's part from S are asked for."""

    x: Heads | None
    y: Heads
    z: Heads
    w: Heads | None


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
