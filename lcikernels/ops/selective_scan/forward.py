"""The scan forward in time, and what joins the segments of a sequence."""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from ..curves import silu, softplus, within
from ..views import wide
from .line import (
    SIZES,
    advance,
    fetch,
    place,
    put,
    rates,
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


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(given, made, p_entering, S, T, L, D, G, SEGMENT, fixed: tl.constexpr):
    """Without y: what the segment adds to the state that leaves it (final), and the sum of its steps."""
    N: tl.constexpr = fixed.N
    BN: tl.constexpr = fixed.BN
    BD: tl.constexpr = fixed.BD
    CHUNK: tl.constexpr = fixed.CHUNK
    AHEAD: tl.constexpr = fixed.AHEAD
    i_k, _, g, o_d, m_d, o_n, m_n = place(D, G, N, BN, BD)
    D_x, D_dt, D_z = D * fixed.X, D * fixed.DT, D * fixed.Z
    m_h = m_n[:, None] & m_d[None, :]
    begin, end = segment_of(i_k, SEGMENT, L)
    A = rates(given.a, tile_of(0, o_n, o_d, N, D), m_h)
    bias, skip = read(given.bias, o_d, m_d, [BD]), read(given.d, o_d, m_d, [BD])
    o_x = tl.minimum(o_d, (g + 1) * (D // G) - 1)  # for loads without a mask
    p_gate = given.x if given.z is None else given.z
    H, total = tl.zeros([BN, BD], tl.float32), tl.zeros([BD], tl.float32)
    y = total  # stored a token later, behind the loads: none passes a store
    i_first, i_stop, i_on = sequences(given.cu, S, T, begin, end)
    for i_s in range(i_on if made.y is None else i_first, i_stop):
        starts, stops = start_of(given.cu, i_s, T), start_of(given.cu, i_s + 1, T)
        H = read(given.state, tile_of(i_s, o_n, o_d, N, D), within(m_h, starts >= begin), [BN, BD])
        H += read(p_entering, tile_of(i_k, o_n, o_d, N, D), within(m_h, starts < begin), [BN, BD])
        first, last = tl.maximum(starts, begin), tl.minimum(stops, end)
        xs, dts, zs = (), (), ()  # of the next tokens; behind the last one come its own
        for j in tl.static_range(AHEAD):
            near = tl.maximum(tl.minimum(first + j, last - 1), 0)
            xs, dts = xs + (fetch(given.x, near, D_x, o_x),), dts + (fetch(given.dt, near, D_dt, o_x),)
            zs = zs + (fetch(p_gate, near, D_z, o_x),)
        for i_c in range(first // CHUNK, tl.cdiv(last, CHUNK)):
            start, stop = tl.maximum(first, i_c * CHUNK), tl.minimum(last, (i_c + 1) * CHUNK)
            if made.checkpoints is not None:
                if start == i_c * CHUNK:
                    tl.store(made.checkpoints + tile_of(i_c, o_n, o_d, N, D), H, m_h)
            p_b = given.bc + (wide(start) * G + g) * 2 * N + o_n
            most = tl.cast(tl.minimum(last - 1 - start, 2 * CHUNK), tl.int32)
            for t in tl.range(0, tl.cast(stop - start, tl.int32), loop_unroll_factor=AHEAD):
                x, delta, z = xs[0].to(tl.float32), dts[0].to(tl.float32) + bias, zs[0].to(tl.float32)
                near = tl.minimum(t + AHEAD, most)
                xs = xs[1:] + (fetch(given.x, start, D_x, near * D_x + o_x),)
                dts = dts[1:] + (fetch(given.dt, start, D_dt, near * D_dt + o_x),)
                zs = zs[1:] + (fetch(p_gate, start, D_z, near * D_z + o_x),)
                b = tl.load(p_b + t * G * 2 * N, m_n, 0.0)
                delta = softplus(delta) if fixed.SOFTPLUS else delta
                if made.y is None:
                    H = advance(H, A, delta, x, b)
                    total += delta
                else:
                    c = tl.load(p_b + N + t * G * 2 * N, m_n, 0.0)
                    put(made.y, start, D, (t - 1) * D + o_d, y, within(m_d, start + t > first))
                    H = advance(H, A, delta, x, b)
                    y = tl.sum(H * c[:, None], 0)
                    if given.d is not None:
                        y += skip * x
                    if given.z is not None:
                        y *= silu(z)
        if made.y is not None:
            put(made.y, last - 1, D, o_d, y, within(m_d, first < last))
            if stops <= end:
                tl.store(made.final + tile_of(i_s, o_n, o_d, N, D), H, m_h)
    if made.y is None:
        tl.store(made.final + tile_of(i_k, o_n, o_d, N, D), H, m_h)
        crosses = start_of(given.cu, i_on, T) < begin
        tl.store(made.total + wide(i_k) * D + o_d, tl.where(crosses, total, float("inf")), m_d)


@triton.jit(do_not_specialize=("D", "segments"))
def chain_kernel(
    p_a, p_added, p_total, p_states, D, segments,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states where segments meet: what each leaves of the last one, and what it adds.

    An infinite p_total leaves nothing: no sequence goes through the segment from end to end.
    """
    o_d, o_n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    m_d = o_d < D
    m_h = (o_n < N)[:, None] & m_d[None, :]
    A = rates(p_a, tile_of(0, o_n, o_d, N, D), m_h)
    H = tl.zeros([BN, BD], tl.float32)
    for k in tl.range(segments, loop_unroll_factor=4):
        i_k = segments - 1 - k if REVERSE else k
        tl.store(p_states + tile_of(i_k, o_n, o_d, N, D), H, m_h)
        total = tl.load(p_total + wide(i_k) * D + o_d, m_d, 0.0)[None, :]
        H = tl.where((H == 0) | (total == float("inf")), 0.0, tl.math.exp2(total * A) * H)
        H += tl.load(p_added + tile_of(i_k, o_n, o_d, N, D), m_h, 0.0)
