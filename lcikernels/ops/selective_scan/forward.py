"""The scan forward in time."""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from ..curves import silu, softplus, within
from ..views import wide
from .line import (
    SIZES,
    advance,
    constants,
    fetch,
    place,
    put,
    read,
    segment_of,
    sequences,
    start_of,
    tile_of,
)


class Made(NamedTuple):
    """What the forward pass writes; total [segments, D], where y is missing: sums of the segments' steps."""

    y: Tensor | None
    final: Tensor
    checkpoints: Tensor | None
    total: Tensor | None


class Near(NamedTuple):
    """x, dt and z of the next AHEAD tokens, as they lie; behind the last token come its own."""

    x: tuple
    dt: tuple
    z: tuple


class Walk(NamedTuple):
    """What goes from token to token; y is stored a token later, behind the loads: none passes a store."""

    near: Near
    H: Tensor
    y: Tensor
    total: Tensor


@triton.jit
def near_from(given, p_gate, first, last, at, D, fixed: tl.constexpr):
    """Those from token `first` of the line on."""
    xs, dts, zs = (), (), ()
    for j in tl.static_range(fixed.AHEAD):
        t = tl.maximum(tl.minimum(first + j, last - 1), 0)
        xs = xs + (fetch(given.x, t, D * fixed.X, at.x),)
        dts, zs = dts + (fetch(given.dt, t, D * fixed.DT, at.x),), zs + (fetch(p_gate, t, D * fixed.Z, at.x),)
    return Near(xs, dts, zs)


@triton.jit
def shifted(near, given, p_gate, start, t, at, D, fixed: tl.constexpr):
    """`near` a token later: without its first, with token t from `start` on."""
    D_x, D_dt, D_z = D * fixed.X, D * fixed.DT, D * fixed.Z
    xs = near.x[1:] + (fetch(given.x, start, D_x, t * D_x + at.x),)
    dts = near.dt[1:] + (fetch(given.dt, start, D_dt, t * D_dt + at.x),)
    return Near(xs, dts, near.z[1:] + (fetch(p_gate, start, D_z, t * D_z + at.x),))


@triton.jit
def run(given, made, p_gate, walk, start, stop, first, last, at, ours, D, G, fixed: tl.constexpr):
    """The tokens from start to stop, part of those of a sequence from first to last."""
    near, H, y, total = walk
    p_b = given.bc + (wide(start) * G + at.g) * 2 * fixed.N + at.n
    most = tl.cast(tl.minimum(last - 1 - start, 2 * fixed.CHUNK), tl.int32)
    # b and c come to shared memory AHEAD tokens before their use: an L2 hit takes as long as two tokens.
    for t in tl.range(0, tl.cast(stop - start, tl.int32), loop_unroll_factor=fixed.AHEAD, num_stages=2):
        x, delta = near.x[0].to(tl.float32), near.dt[0].to(tl.float32) + ours.bias
        z = near.z[0].to(tl.float32)
        near = shifted(near, given, p_gate, start, tl.minimum(t + fixed.AHEAD, most), at, D, fixed)
        b = tl.load(p_b + t * G * 2 * fixed.N, at.m_n, 0.0)
        delta = softplus(delta) if fixed.SOFTPLUS else delta
        if made.y is None:
            H = advance(H, ours.a, delta, x, b)
            total += delta
        else:
            c = tl.load(p_b + fixed.N + t * G * 2 * fixed.N, at.m_n, 0.0)
            put(made.y, start, D, (t - 1) * D + at.d, y, within(at.m_d, start + t > first))
            H = advance(H, ours.a, delta, x, b)
            y = tl.sum(H * c[:, None], 0)
            if given.d is not None:
                y += ours.skip * x
            if given.z is not None:
                y *= silu(z)
    return Walk(near, H, y, total)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(given, made, p_entering, S, T, L, D, G, SEGMENT, fixed: tl.constexpr):
    """Without y: what the segment adds to the state that leaves it (final), and the sum of its steps."""
    N: tl.constexpr = fixed.N
    BN: tl.constexpr = fixed.BN
    BD: tl.constexpr = fixed.BD
    CHUNK: tl.constexpr = fixed.CHUNK
    at = place(D, G, N, BN, BD)
    begin, end = segment_of(at.k, SEGMENT, L)
    ours = constants(given, at, D, fixed)
    p_gate = given.x if given.z is None else given.z
    H, total = tl.zeros([BN, BD], tl.float32), tl.zeros([BD], tl.float32)
    y = total
    i_first, i_stop, i_on = sequences(given.cu, S, T, begin, end)
    for i_s in range(i_on if made.y is None else i_first, i_stop):
        starts, stops = start_of(given.cu, i_s, T), start_of(given.cu, i_s + 1, T)
        H = read(given.state, tile_of(i_s, at.n, at.d, N, D), within(at.m_h, starts >= begin), [BN, BD])
        H += read(p_entering, tile_of(at.k, at.n, at.d, N, D), within(at.m_h, starts < begin), [BN, BD])
        first, last = tl.maximum(starts, begin), tl.minimum(stops, end)
        walk = Walk(near_from(given, p_gate, first, last, at, D, fixed), H, y, total)
        for i_c in range(first // CHUNK, tl.cdiv(last, CHUNK)):
            start, stop = tl.maximum(first, i_c * CHUNK), tl.minimum(last, (i_c + 1) * CHUNK)
            if made.checkpoints is not None:
                if start == i_c * CHUNK:
                    tl.store(made.checkpoints + tile_of(i_c, at.n, at.d, N, D), walk.H, at.m_h)
            walk = run(given, made, p_gate, walk, start, stop, first, last, at, ours, D, G, fixed)
        _, H, y, total = walk
        if made.y is not None:
            put(made.y, last - 1, D, at.d, y, within(at.m_d, first < last))
            if stops <= end:
                tl.store(made.final + tile_of(i_s, at.n, at.d, N, D), H, at.m_h)
    if made.y is None:
        tl.store(made.final + tile_of(at.k, at.n, at.d, N, D), H, at.m_h)
        crosses = start_of(given.cu, i_on, T) < begin
        tl.store(made.total + wide(at.k) * D + at.d, tl.where(crosses, total, float("inf")), at.m_d)
