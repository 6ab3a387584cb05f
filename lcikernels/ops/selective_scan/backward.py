"""The scan back in time, a slab of every segment at once.

What runs over time lies in registers: states of a channel in one thread, channels over the lanes of a warp.
So a sum over states asks no other thread. A sum over channels is the product of the tile with ones: the tile
goes through shared memory once, where a thread finds all channels of a state, and adds 32 numbers of its own;
by shuffles the 32 sums of two tokens would take 320 of them.
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from ..curves import LN2, silu, silu_slope, softplus, softplus_slope, within
from ..views import wide
from .line import (
    SIZES,
    add,
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


class Back(NamedTuple):
    """What the backward pass reads and writes besides.

    edges [slabs + 1, segments, N, D]: the gradients of the states between slabs; those of the last edge are
    given where a sequence goes on behind it. da, dd, dbias [slabs, segments, ...]. dbc [segments, G, blocks
    of a group, SLAB, 2 N]. scratch [segments, CHUNK / STEPS, N, D].
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


class Run(NamedTuple):
    """`count` tokens of one sequence and chunk, from `start` on; where their states, b and c, and sums are.

    front: start, or the last token of the line where an empty sequence is behind it: for loads.
    """

    start: int
    front: int
    count: int
    tile: Tensor
    b: Tensor
    sums: Tensor


class Sums(NamedTuple):
    """Gradients that go from token to token, and what rounding has lost of two."""

    H: Tensor
    A: Tensor
    skip: Tensor
    bias: Tensor
    lost_skip: Tensor
    lost_bias: Tensor


class Taken(NamedTuple):
    """STEPS tokens as the first sweep takes them: tuples."""

    x: tuple
    raw: tuple
    dy: tuple
    z: tuple
    b: tuple
    c: tuple


class Kept(NamedTuple):
    """... and what it leaves for the second."""

    delta: tuple
    dy: tuple
    before: tuple
    decay: tuple
    dc: tuple


@triton.jit
def window(i_k, slab, SEGMENT, SLAB, L, CHUNK: tl.constexpr):
    """Where the slab of segment i_k begins, in whole chunks, and its tokens, begin to end."""
    first, last = segment_of(i_k, SEGMENT, L)
    base = first // CHUNK * CHUNK + slab * SLAB
    return base, tl.maximum(first, base), tl.minimum(last, base + tl.minimum(SLAB, tl.maximum(L - base, 0)))


@triton.jit
def entering(given, back, start, stop, i_s, at, D, fixed: tl.constexpr):
    """The states that enter the tokens from start to stop, of sequence i_s."""
    kept = start % fixed.CHUNK == 0  # else a sequence starts here: segments that cut one end between chunks
    if given.state is None:
        m = within(at.m_h, kept & (start < stop))
        return tl.load(back.checkpoints + tile_of(start // fixed.CHUNK, at.n, at.d, fixed.N, D), m, 0.0)
    else:
        p, i = tl.where(kept, back.checkpoints, given.state), tl.where(kept, start // fixed.CHUNK, i_s)
        return tl.load(p + tile_of(i, at.n, at.d, fixed.N, D), within(at.m_h, start < stop), 0.0)


@triton.jit
def again(given, run, H, at, ours, D, G, fixed: tl.constexpr):
    """Leaves the states that enter every STEPS tokens."""
    D_x, D_dt, TILE = D * fixed.X, D * fixed.DT, fixed.N * D
    tiles = tl.cdiv(run.count, fixed.STEPS)
    near_x, near_dt = (), ()
    for j in tl.static_range(fixed.AHEAD):
        near = tl.maximum(tl.minimum(j, run.count - 1), 0)
        near_x = near_x + (fetch(given.x, run.front, D_x, near * D_x + at.x),)
        near_dt = near_dt + (fetch(given.dt, run.front, D_dt, near * D_dt + at.x),)
    for i in tl.range(tiles - 1):
        xs, deltas, bs = (), (), ()
        for j in tl.static_range(fixed.STEPS):
            t = i * fixed.STEPS + j
            bs = bs + (tl.load(run.b + t * G * 2 * fixed.N + at.n, at.m_n, 0.0),)
            xs, deltas = xs + (near_x[j].to(tl.float32),), deltas + (near_dt[j].to(tl.float32) + ours.bias,)
            near = tl.minimum(t + fixed.AHEAD, run.count - 1)
            near_x = near_x + (fetch(given.x, run.start, D_x, near * D_x + at.x),)
            near_dt = near_dt + (fetch(given.dt, run.start, D_dt, near * D_dt + at.x),)
        near_x, near_dt = near_x[fixed.STEPS :], near_dt[fixed.STEPS :]
        tl.store(run.tile + i * TILE, H, at.m_h)
        for j in tl.static_range(fixed.STEPS):
            H = advance(H, ours.a, softplus(deltas[j]) if fixed.SOFTPLUS else deltas[j], xs[j], bs[j])
    tl.store(run.tile + tl.maximum(tiles - 1, 0) * TILE, H, at.m_h)


@triton.jit
def ahead(back, p_gate, start, first, most, at, D, fixed: tl.constexpr):
    """dy and z of STEPS tokens from token `first` on counted from start, at most those up to `most`."""
    dys, zs = (), ()
    for j in tl.static_range(fixed.STEPS):
        t = tl.maximum(tl.minimum(first + j, most), 0)
        dys = dys + (fetch(back.dy, start, D * fixed.DY, t * D * fixed.DY + at.x),)
        zs = zs + (fetch(p_gate, start, D * fixed.Z, t * D * fixed.Z + at.x),)
    return dys, zs


@triton.jit
def loaded(given, run, first, near_dy, near_z, at, ours, D, G, fixed: tl.constexpr):
    """The STEPS tokens from `first` on; behind the end of the run its last one again, with a dy of zero: a
    mask would cost registers to clear."""
    D_x, D_dt = D * fixed.X, D * fixed.DT
    xs, raws, dys, zs, bs, cs = (), (), (), (), (), ()
    for j in tl.static_range(fixed.STEPS):
        t = first + j
        m_t = within(at.m_d, t < run.count)
        near = tl.minimum(t, run.count - 1)
        p_b = run.b + near * G * 2 * fixed.N + at.n
        bs, cs = bs + (tl.load(p_b, at.m_n, 0.0),), cs + (tl.load(p_b + fixed.N, at.m_n, 0.0),)
        xs = xs + (fetch(given.x, run.start, D_x, near * D_x + at.x).to(tl.float32),)
        raws = raws + (fetch(given.dt, run.start, D_dt, near * D_dt + at.x).to(tl.float32) + ours.bias,)
        dys, zs = dys + (tl.where(m_t, near_dy[j].to(tl.float32), 0.0),), zs + (near_z[j].to(tl.float32),)
    return Taken(xs, raws, dys, zs, bs, cs)


@triton.jit
def forth(given, back, run, u, H, first, at, ours, D, fixed: tl.constexpr):
    """STEPS tokens forward again: dz, and what stays in registers."""
    deltas, gs, before, decays, dcs = (), (), (), (), ()
    for j in tl.static_range(fixed.STEPS):
        x, dy, z = u.x[j], u.dy[j], u.z[j]
        m_t = within(at.m_d, first + j < run.count)
        delta = softplus(u.raw[j]) if fixed.SOFTPLUS else u.raw[j]
        delta = tl.where(m_t, delta, 0.0)  # 0: no state changes
        decay = tl.math.exp2(delta[None, :] * ours.a)
        deltas, before, decays = deltas + (delta,), before + (H,), decays + (decay,)
        H = decay * H + (delta * x)[None, :] * u.b[j][:, None]
        if given.z is not None:
            y = tl.sum(H * u.c[j][:, None], 0)
            if given.d is not None:
                y += ours.skip * x
            put(back.dz, run.start, D, (first + j) * D + at.d, dy * silu_slope(z) * y, m_t)
            dy *= silu(z)
        gs, dcs = gs + (dy,), dcs + (dy[None, :] * H,)
    return Kept(deltas, gs, before, decays, dcs)


@triton.jit
def back_again(back, run, u, kept, sums, first, at, ours, D, fixed: tl.constexpr):
    """STEPS tokens in reverse: dx and ddt; the sums, and products whose sums over channels are db."""
    dH, dA, dskip, dbias, lost_skip, lost_bias = sums
    dbs = ()
    for j in tl.static_range(fixed.STEPS - 1, -1, -1):
        x, delta, dy = u.x[j], kept.delta[j], kept.dy[j]
        o, m_t = (first + j) * D + at.d, within(at.m_d, first + j < run.count)
        dH += dy[None, :] * u.c[j][:, None]
        dbs = ((delta * x)[None, :] * dH,) + dbs
        through_b = tl.sum(dH * u.b[j][:, None], 0)
        dH *= kept.decay[j]
        through_decay = dH * kept.before[j]
        dA += delta[None, :] * through_decay
        ddt = x * through_b + tl.sum(through_decay * ours.a, 0) * LN2
        if fixed.SOFTPLUS:
            ddt *= softplus_slope(u.raw[j])
        put(back.dx, run.start, D, o, delta * through_b + ours.skip * dy, m_t)
        put(back.ddt, run.start, D, o, ddt, m_t)
        dskip, lost_skip = add(dskip, lost_skip, dy * x)
        dbias, lost_bias = add(dbias, lost_bias, tl.where(m_t, ddt, 0.0))
    return Sums(dH, dA, dskip, dbias, lost_skip, lost_bias), dbs


@triton.jit
def put_sums(p, step, count, first, second, fixed: tl.constexpr):
    """At p a tile's sums over channels, `step` behind it those of another, if count > 1; by one product."""
    BN: tl.constexpr = fixed.BN
    both = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [2 * BN, fixed.BD])
    ones = tl.full([fixed.BD, 1], 1.0, tl.float32)
    o_n, o_j = tl.arange(0, 2 * BN) // 2, tl.arange(0, 2 * BN) % 2
    total = tl.reshape(tl.dot(both, ones, input_precision="ieee"), [2 * BN])
    tl.store(p + o_j * step + o_n, total, (o_n < fixed.N) & (o_j < count))


@triton.jit
def gradients(given, back, run, sums, at, ours, D, G, fixed: tl.constexpr):
    """The tokens of a run in reverse, from the states that `again` has left."""
    STEPS: tl.constexpr = fixed.STEPS
    tiles = tl.cdiv(run.count, STEPS)
    p_gate = back.dy if given.z is None else given.z
    dys, zs = ahead(back, p_gate, run.front, (tiles - 1) * STEPS, run.count - 1, at, D, fixed)
    for i_back in tl.range(tiles, num_stages=2):  # states, b and c come while the STEPS tokens behind run
        first = (tiles - 1 - i_back) * STEPS
        H = tl.load(run.tile + (tiles - 1 - i_back) * fixed.N * D, at.m_h, 0.0)
        u = loaded(given, run, first, dys, zs, at, ours, D, G, fixed)
        dys, zs = ahead(back, p_gate, run.start, first - STEPS, first, at, D, fixed)
        kept = forth(given, back, run, u, H, first, at, ours, D, fixed)
        p_db, p_dc = run.sums + first * 2 * fixed.N, run.sums + first * 2 * fixed.N + fixed.N
        if STEPS == 2:
            put_sums(p_dc, 2 * fixed.N, run.count - first, kept.dc[0], kept.dc[1], fixed)
        sums, dbs = back_again(back, run, u, kept, sums, first, at, ours, D, fixed)
        if STEPS == 2:
            put_sums(p_db, 2 * fixed.N, run.count - first, dbs[0], dbs[1], fixed)
        else:
            put_sums(p_db, fixed.N, 2, dbs[0], kept.dc[0], fixed)
    return sums


@triton.jit(do_not_specialize=(*SIZES, "SLAB", "slab"))
def backward_kernel(given, back, S, T, L, D, G, SEGMENT, SLAB, slab, fixed: tl.constexpr):
    """One slab of every segment; slabs come last to first."""
    N: tl.constexpr = fixed.N
    BN: tl.constexpr = fixed.BN
    BD: tl.constexpr = fixed.BD
    CHUNK: tl.constexpr = fixed.CHUNK
    at = place(D, G, N, BN, BD)
    base, begin, end = window(at.k, slab, SEGMENT, SLAB, L, CHUNK)
    ours = constants(given, at, D, fixed)
    i_edge = slab * tl.cdiv(L, SEGMENT) + at.k
    none, nothing = tl.zeros([BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    dH = tl.load(back.edges + tile_of(i_edge + tl.cdiv(L, SEGMENT), at.n, at.d, N, D), at.m_h, 0.0)
    sums = Sums(dH, nothing, none, none, none, none)
    p_tile = back.scratch + tile_of(at.k * (CHUNK // fixed.STEPS), at.n, at.d, N, D)
    p_sums = back.dbc + wide(tl.program_id(0)) * SLAB * 2 * N
    i_first, i_stop, _ = sequences(given.cu, S, T, begin, end)
    i_s, stop, more = i_stop - 1, end, i_stop > i_first
    while more:
        starts = tl.minimum(start_of(given.cu, i_s, T), stop)  # whatever cu says: never behind the slab
        start = tl.maximum(tl.maximum(starts, begin), (stop - 1) // CHUNK * CHUNK)
        if stop == start_of(given.cu, i_s + 1, T):
            dH = read(back.dfinal, tile_of(i_s, at.n, at.d, N, D), at.m_h, [BN, BD])
            sums = Sums(dH, sums.A, sums.skip, sums.bias, sums.lost_skip, sums.lost_bias)
        p_b = given.bc + (wide(start) * G + at.g) * 2 * N
        count = tl.cast(stop - start, tl.int32)
        run = Run(start, tl.minimum(start, L - 1), count, p_tile, p_b, p_sums + (start - base) * 2 * N)
        again(given, run, entering(given, back, start, stop, i_s, at, D, fixed), at, ours, D, G, fixed)
        tl.debug_barrier()  # where the accesses are laid out differently, a thread reads what another wrote
        sums = gradients(given, back, run, sums, at, ours, D, G, fixed)
        tl.debug_barrier()  # ... and the next chunk writes where this one reads
        more = tl.where(start == starts, i_s > i_first, start > begin)
        if back.dstate is not None:
            p_state = back.dstate + tile_of(i_s, at.n, at.d, N, D)
            tl.store(p_state, sums.H, within(at.m_h, start == starts))
        i_s, stop = tl.where(start == starts, i_s - 1, i_s), start
    tl.store(back.edges + tile_of(i_edge, at.n, at.d, N, D), sums.H, at.m_h)
    tl.store(back.da + tile_of(i_edge, at.n, at.d, N, D), sums.A, at.m_h)
    tl.store(back.dd + wide(i_edge) * D + at.d, sums.skip, at.m_d)
    tl.store(back.dbias + wide(i_edge) * D + at.d, sums.bias, at.m_d)
