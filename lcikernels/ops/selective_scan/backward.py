"""The scan back in time, a slab of every segment at once, and the sums over blocks of channels."""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from ..curves import LN2, silu, silu_slope, softplus, softplus_slope, within
from ..views import steps, wide
from .line import (
    SIZES,
    add,
    advance,
    ended,
    fetch,
    place,
    put,
    rates,
    read,
    segment_of,
    sequences,
    start_of,
    step_size,
    tile_of,
    token,
)


class Back(NamedTuple):
    """What the backward pass reads and writes besides; scratch: CHUNK / STEPS tiles for each program.

    edges [slabs + 1, segments, N, D]: the gradients of the states between slabs; those of the last edge are
    given where a sequence goes on behind it. da, dd, dbias [slabs, segments, ...]. dbc [segments, G, blocks
    of a group, SLAB, 2 N].
    """

    checkpoints: Tensor
    dy: Tensor
    dfinal: Tensor | None
    edges: Tensor
    dx: Tensor
    ddt: Tensor
    dz: Tensor | None
    da: Tensor
    dbc: Tensor
    dd: Tensor
    dbias: Tensor
    dstate: Tensor | None
    scratch: Tensor


@triton.jit(do_not_specialize=SIZES)
def crossing_back_kernel(
    given, p_dy, p_dfinal, p_added, p_total, S, T, L, D, G, SEGMENT, fixed: tl.constexpr
):
    """What the segment adds to the gradient of the state that enters it, and the sum of its steps."""
    N: tl.constexpr = fixed.N
    BN: tl.constexpr = fixed.BN
    BD: tl.constexpr = fixed.BD
    i_k, _, g, o_d, m_d, o_n, m_n = place(D, G, N, BN, BD)
    D_dt, D_z, D_dy = D * fixed.DT, D * fixed.Z, D * fixed.DY
    m_h = m_n[:, None] & m_d[None, :]
    begin, end = segment_of(i_k, SEGMENT, L)
    A, bias = rates(given.a, tile_of(0, o_n, o_d, N, D), m_h), read(given.bias, o_d, m_d, [BD])
    i_s = ended(given.cu, S, T, begin)
    starts, stops = start_of(given.cu, i_s, T), start_of(given.cu, i_s + 1, T)
    last = tl.where(starts < begin, tl.minimum(stops, end), begin)
    dH = read(p_dfinal, tile_of(i_s, o_n, o_d, N, D), within(m_h, stops <= end), [BN, BD])
    total = tl.zeros([BD], tl.float32)
    for back in tl.range(0, last - begin, loop_unroll_factor=fixed.AHEAD):
        t = last - 1 - back
        delta = step_size(given.dt, t, D_dt, o_d, m_d, bias, fixed.SOFTPLUS)
        dy = token(p_dy, t, D_dy, o_d, m_d)
        if given.z is not None:
            dy *= silu(token(given.z, t, D_z, o_d, m_d))
        c = tl.load(given.bc + (wide(t) * G + g) * 2 * N + N + o_n, m_n, 0.0)
        dH = tl.math.exp2(delta[None, :] * A) * (dH + dy[None, :] * c[:, None])
        total += delta
    tl.store(p_added + tile_of(i_k, o_n, o_d, N, D), dH, m_h)
    crosses = start_of(given.cu, ended(given.cu, S, T, end), T) < begin
    tl.store(p_total + wide(i_k) * D + o_d, tl.where(crosses, total, float("inf")), m_d)


@triton.jit
def window(i_k, slab, SEGMENT, SLAB, L, CHUNK: tl.constexpr):
    """Where the slab of segment i_k begins, in whole chunks, and its tokens, begin to end."""
    first, last = segment_of(i_k, SEGMENT, L)
    base = first // CHUNK * CHUNK + slab * SLAB
    return base, tl.maximum(first, base), tl.minimum(last, base + tl.minimum(SLAB, tl.maximum(L - base, 0)))


@triton.jit(do_not_specialize=(*SIZES, "SLAB", "slab"))
def backward_kernel(given, back, S, T, L, D, G, SEGMENT, SLAB, slab, fixed: tl.constexpr):
    """One slab of every segment; slabs come last to first."""
    N: tl.constexpr = fixed.N
    BN: tl.constexpr = fixed.BN
    BD: tl.constexpr = fixed.BD
    CHUNK: tl.constexpr = fixed.CHUNK
    AHEAD: tl.constexpr = fixed.AHEAD
    STEPS: tl.constexpr = fixed.STEPS
    i_k, i_d, g, o_d, m_d, o_n, m_n = place(D, G, N, BN, BD)
    D_x, D_dt, D_z, D_dy = D * fixed.X, D * fixed.DT, D * fixed.Z, D * fixed.DY
    m_h = m_n[:, None] & m_d[None, :]
    base, begin, end = window(i_k, slab, SEGMENT, SLAB, L, CHUNK)
    A = rates(given.a, tile_of(0, o_n, o_d, N, D), m_h)
    bias, skip = read(given.bias, o_d, m_d, [BD]), read(given.d, o_d, m_d, [BD])
    o_x = tl.minimum(o_d, (g + 1) * (D // G) - 1)
    p_gate = back.dy if given.z is None else given.z
    i_edge = slab * tl.cdiv(L, SEGMENT) + i_k
    dH = tl.load(back.edges + tile_of(i_edge + tl.cdiv(L, SEGMENT), o_n, o_d, N, D), m_h, 0.0)
    dA, dskip, dbias = tl.zeros([BN, BD], tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    lost_skip, lost_bias = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    p_tile = back.scratch + wide(tl.program_id(0)) * (CHUNK // STEPS) * BN * BD
    p_tile += tl.arange(0, BN)[:, None] * BD + tl.arange(0, BD)[None, :]
    p_sums = back.dbc + wide(tl.program_id(0)) * SLAB * 2 * N
    i_first, i_stop, _ = sequences(given.cu, S, T, begin, end)
    i_s, stop, more = i_stop - 1, end, i_stop > i_first
    while more:
        starts = start_of(given.cu, i_s, T)
        start = tl.maximum(tl.maximum(starts, begin), (stop - 1) // CHUNK * CHUNK)
        if stop == start_of(given.cu, i_s + 1, T):
            dH = read(back.dfinal, tile_of(i_s, o_n, o_d, N, D), m_h, [BN, BD])
        kept = start % CHUNK == 0  # else a sequence starts here: segments that cut one end between chunks
        if given.state is None:
            m_kept = within(m_h, kept & (start < stop))
            H = tl.load(back.checkpoints + tile_of(start // CHUNK, o_n, o_d, N, D), m_kept, 0.0)
        else:
            p_h = tl.where(kept, back.checkpoints, given.state)
            i_h = tl.where(kept, start // CHUNK, i_s)
            H = tl.load(p_h + tile_of(i_h, o_n, o_d, N, D), within(m_h, start < stop), 0.0)
        count = tl.cast(stop - start, tl.int32)
        tiles = tl.cdiv(count, STEPS)
        p_b, p_db = given.bc + (wide(start) * G + g) * 2 * N, p_sums + (start - base) * 2 * N
        front = tl.minimum(start, L - 1)  # of an empty sequence behind the last token
        near_x, near_dt = (), ()
        for j in tl.static_range(AHEAD):
            near = tl.maximum(tl.minimum(j, count - 1), 0)
            near_x = near_x + (fetch(given.x, front, D_x, near * D_x + o_x),)
            near_dt = near_dt + (fetch(given.dt, front, D_dt, near * D_dt + o_x),)
        for i in range(tiles - 1):
            xs, deltas, bs = (), (), ()
            for j in tl.static_range(STEPS):
                t = i * STEPS + j
                bs = bs + (tl.load(p_b + t * G * 2 * N + o_n, m_n, 0.0),)
                xs, deltas = xs + (near_x[j].to(tl.float32),), deltas + (near_dt[j].to(tl.float32) + bias,)
                near = tl.minimum(t + AHEAD, count - 1)
                near_x = near_x + (fetch(given.x, start, D_x, near * D_x + o_x),)
                near_dt = near_dt + (fetch(given.dt, start, D_dt, near * D_dt + o_x),)
            near_x, near_dt = near_x[STEPS:], near_dt[STEPS:]
            tl.store(p_tile + i * (BN * BD), H)
            for j in tl.static_range(STEPS):
                H = advance(H, A, softplus(deltas[j]) if fixed.SOFTPLUS else deltas[j], xs[j], bs[j])
        tl.store(p_tile + tl.maximum(tiles - 1, 0) * (BN * BD), H)
        tl.debug_barrier()  # where the accesses are laid out differently, a thread reads what another wrote
        near_dy, near_z = (), ()
        for j in tl.static_range(STEPS):
            near = tl.maximum(tl.minimum((tiles - 1) * STEPS + j, count - 1), 0)
            near_dy = near_dy + (fetch(back.dy, front, D_dy, near * D_dy + o_x),)
            near_z = near_z + (fetch(p_gate, front, D_z, near * D_z + o_x),)
        for i_back in range(tiles):
            i = tiles - 1 - i_back
            H = tl.load(p_tile + i * (BN * BD))
            xs, raws, dys, zs, bs, cs = (), (), (), (), (), ()
            for j in tl.static_range(STEPS):
                t = i * STEPS + j
                m_t = within(m_d, t < count)
                o_b, m_b = t * G * 2 * N + o_n, within(m_n, t < count)
                bs, cs = bs + (tl.load(p_b + o_b, m_b, 0.0),), cs + (tl.load(p_b + N + o_b, m_b, 0.0),)
                xs = xs + (token(given.x, start, D_x, t * D_x + o_d, m_t),)
                raws = raws + (token(given.dt, start, D_dt, t * D_dt + o_d, m_t) + bias,)
                dys = dys + (tl.where(m_t, near_dy[j].to(tl.float32), 0.0),)
                zs = zs + (near_z[j].to(tl.float32),)
            near_dy, near_z = (), ()
            for j in tl.static_range(STEPS):
                near = tl.maximum((i - 1) * STEPS + j, 0)
                near_dy = near_dy + (fetch(back.dy, start, D_dy, near * D_dy + o_x),)
                near_z = near_z + (fetch(p_gate, start, D_z, near * D_z + o_x),)
            deltas, gs, before, decays = (), (), (), ()
            for j in tl.static_range(STEPS):
                t = i * STEPS + j
                x, dy, z = xs[j], dys[j], zs[j]
                o, m_t, m_b = t * D + o_d, within(m_d, t < count), within(m_n, t < count)
                delta = softplus(raws[j]) if fixed.SOFTPLUS else raws[j]
                delta = tl.where(m_t, delta, 0.0)  # 0: no state changes
                decay = tl.math.exp2(delta[None, :] * A)
                deltas, before, decays = deltas + (delta,), before + (H,), decays + (decay,)
                H = decay * H + (delta * x)[None, :] * bs[j][:, None]
                if given.z is not None:
                    y = tl.sum(H * cs[j][:, None], 0)
                    if given.d is not None:
                        y += skip * x
                    put(back.dz, start, D, o, dy * silu_slope(z) * y, m_t)
                    dy *= silu(z)
                gs = gs + (dy,)
                tl.store(p_db + N + t * 2 * N + o_n, tl.sum(dy[None, :] * H, 1), m_b)
            for j in tl.static_range(STEPS - 1, -1, -1):
                t = i * STEPS + j
                x, delta, dy = xs[j], deltas[j], gs[j]
                o, m_t, m_b = t * D + o_d, within(m_d, t < count), within(m_n, t < count)
                dH += dy[None, :] * cs[j][:, None]
                tl.store(p_db + t * 2 * N + o_n, tl.sum((delta * x)[None, :] * dH, 1), m_b)
                through_b = tl.sum(dH * bs[j][:, None], 0)
                dH *= decays[j]
                through_decay = dH * before[j]
                dA += delta[None, :] * through_decay
                ddt = x * through_b + tl.sum(through_decay * A, 0) * LN2
                if fixed.SOFTPLUS:
                    ddt *= softplus_slope(raws[j])
                put(back.dx, start, D, o, delta * through_b + skip * dy, m_t)
                put(back.ddt, start, D, o, ddt, m_t)
                dskip, lost_skip = add(dskip, lost_skip, dy * x)
                dbias, lost_bias = add(dbias, lost_bias, tl.where(m_t, ddt, 0.0))
        tl.debug_barrier()  # ... and the next chunk writes where this one reads
        more = tl.where(start == starts, i_s > i_first, start > begin)
        if back.dstate is not None:
            tl.store(back.dstate + tile_of(i_s, o_n, o_d, N, D), dH, within(m_h, start == starts))
        i_s, stop = tl.where(start == starts, i_s - 1, i_s), start
    tl.store(back.edges + tile_of(i_edge, o_n, o_d, N, D), dH, m_h)
    tl.store(back.da + tile_of(i_edge, o_n, o_d, N, D), dA, m_h)
    tl.store(back.dd + wide(i_edge) * D + o_d, dskip, m_d)
    tl.store(back.dbias + wide(i_edge) * D + o_d, dbias, m_d)


@triton.jit(do_not_specialize=("T", "L", "G", "blocks", "SEGMENT", "SLAB", "slab"))
def collect_kernel(
    p_dbc, db_to, dc_to, T, L, G, blocks, SEGMENT, SLAB, slab,
    N: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """db and dc [B, T, G, N] in a slab of every segment: the sums over the blocks of a group."""
    tiles = tl.cdiv(SLAB, BT)
    i_t, g = tl.program_id(0) % tiles, tl.program_id(0) // tiles % G
    i_k = tl.program_id(0) // tiles // G
    base, begin, end = window(i_k, slab, SEGMENT, SLAB, L, CHUNK)
    o_t, o_n = i_t * BT + tl.arange(0, BT)[:, None], tl.arange(0, BN)[None, :]
    m = (base + o_t >= begin) & (base + o_t < end) & (o_n < N)
    db, dc = tl.zeros([BT, BN], tl.float32), tl.zeros([BT, BN], tl.float32)
    lost_db, lost_dc = tl.zeros([BT, BN], tl.float32), tl.zeros([BT, BN], tl.float32)
    p_dbc += (wide(i_k) * G + g) * blocks * SLAB * 2 * N
    for i in range(blocks):
        o = wide(i) * SLAB * 2 * N + o_t * 2 * N + o_n
        db, lost_db = add(db, lost_db, tl.load(p_dbc + o, m, 0.0))
        dc, lost_dc = add(dc, lost_dc, tl.load(p_dbc + N + o, m, 0.0))
    i_b, t = (base + o_t) // T, (base + o_t) % T
    summed(db_to, i_b, t, g, o_n, db, m)
    summed(dc_to, i_b, t, g, o_n, dc, m)


@triton.jit
def summed(to, i_b, t, g, o_n, value, m):
    """Stores a tile of db or dc."""
    o = steps(i_b, to.row) + steps(t, to.token) + steps(g, to.group) + steps(o_n, to.channel)
    tl.store(to.p + o, value.to(to.p.dtype.element_ty), m)
