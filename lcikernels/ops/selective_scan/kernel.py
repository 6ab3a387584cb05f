"""The selective scan in Triton: sequential in time, a program's states in registers.

The sequences, rows of a batch or packed in one, make one line of L tokens. A program owns BD channels of one
group in one segment of the line, and walks the sequences that are in it. A tile of states is [BN, BD] and its
loads run along BD: in the forward pass the states of a channel lie in one thread, and a sum over them asks no
other. So tensors of states are [..., N, D] here, and a is [N, D].

    i_  index of a tile     o_  offsets     m_  mask     p_  pointers

Time goes in chunks of CHUNK tokens of the line; the forward pass leaves the states that enter them. The
backward walks the chunks in reverse: once through a chunk for the states that enter every STEPS tokens of
it, then STEPS tokens at a time, whose states and decays stay in registers. Sums over channels are written
for each block of channels, a slab of each segment at a time, and added in order by `collect_kernel`.

Segments are as many as fill the GPU. Where one ends inside a sequence, a pass before finds what each adds to
a state that crosses it and what it leaves of that state, and `chain_kernel` joins them; then all run at once.
So the last bits depend on the number of multiprocessors; two runs on one GPU are equal.

What lies [B, D, T] in memory is copied to tokens and back by `views.copy_kernel`, at the speed of memory: 4
bytes an element and tensor, 0.06 ms at B 8, T 4096, D 2048 in 16 bits, beside 0.5 ms of a forward pass.
Loaded by strides, a token of 32 channels would be 32 sectors of 2 bytes: for three tensors and four warps 384
cycles a token of a multiprocessor's cache, whose arithmetic takes 145; and a store as many partial writes.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..checks import boundaries, channels_first, contiguous, empty_as, refuse
from ..curves import LN2, LOG2E, silu, silu_slope, softplus, softplus_slope, within
from ..launch import device, options, power_of_2
from ..views import copy, like, line, steps, tokens, wide

CHUNK = 64  # 1 byte of checkpoints for each channel and token at N = 16
SLABS = 6  # of a segment: the partial sums of db and dc take 0.7 bytes for each channel and token, not 4
SHORT, LONG = 256, 4096  # tokens: less are not cut, and no more sequences put together
MOST_STATES = 256  # 512 would leave the 8 warps of a program 4 channels, backward

# One compilation for all of them. And a D that is known to be a multiple of 4 would give a thread 4 channels
# of a tile, and spread their states over others.
SIZES = ("S", "T", "L", "D", "G", "SEGMENT")
MOST_APART = 4  # D between tokens of one tensor, each compiled anew: a half or a quarter of a projection


class Given(NamedTuple):
    """What every pass reads: x, dt, z [L, D], see Fixed for their steps, the others dense; bc [L, G, 2 N]."""

    x: Tensor
    dt: Tensor
    z: Tensor | None
    a: Tensor
    bc: Tensor
    d: Tensor | None
    bias: Tensor | None
    state: Tensor | None
    cu: Tensor | None


class Made(NamedTuple):
    """What the forward pass writes; total [segments, D], where y is missing: sums of the segments' steps."""

    y: Tensor | None
    final: Tensor
    checkpoints: Tensor | None
    total: Tensor | None


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


class Fixed(NamedTuple):
    """What a kernel is compiled for: N states and their tile [BN, BD]; see Tiles.

    X, DT, Z, DY: how many D it is from token to token in x, dt, z and dy. Where they are 1, one offset does
    for all: known when launched, they would take 5 more slots of 145.
    """

    N: int
    BN: int
    BD: int
    STEPS: int
    AHEAD: int
    CHUNK: int
    SOFTPLUS: bool
    X: int
    DT: int
    Z: int
    DY: int


@triton.jit
def start_of(p_cu, i_s, T):
    """The first token of sequence i_s."""
    if p_cu is None:
        return i_s * T
    else:
        return tl.load(p_cu + i_s)


@triton.jit
def ended(p_cu, S, T, t):
    """How many sequences have ended before token t, empty ones there among them; none before token 0."""
    if p_cu is None:
        return t // T
    else:
        low, high = t * 0, t * 0 + S
        while low < high:
            middle = (low + high) // 2
            over = tl.load(p_cu + middle + 1) <= t
            low, high = tl.where(over, middle + 1, low), tl.where(over, high, middle)
        return tl.where(t > 0, low, 0)


@triton.jit
def segment_of(i_k, SEGMENT, L):
    """The tokens of segment i_k, begin to end."""
    begin = tl.cast(i_k, L.dtype) * SEGMENT
    return begin, begin + tl.minimum(SEGMENT, L - begin)


@triton.jit
def sequences(p_cu, S, T, begin, end):
    """The first sequence in tokens begin to end, the one after the last, the one that end is inside of."""
    on = ended(p_cu, S, T, end)
    return ended(p_cu, S, T, begin), tl.where(start_of(p_cu, on, T) < end, on + 1, on), on


@triton.jit
def place(D, G, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """The program's segment (a step's row) and block; the block's group and channels, states, masks."""
    P = D // G
    blocks = tl.cdiv(P, BD)
    i_k, i_d = tl.program_id(0) // (G * blocks), tl.program_id(0) % (G * blocks)
    o_p, o_n = i_d % blocks * BD + tl.arange(0, BD), tl.arange(0, BN)
    return i_k, i_d, i_d // blocks, i_d // blocks * P + o_p, o_p < P, o_n, o_n < N


@triton.jit
def token(p, t, D, o, m):
    """Offsets o from token t of [L, D], in float32."""
    return tl.load(p + wide(t) * D + o, m, 0.0).to(tl.float32)


@triton.jit
def fetch(p, t, D, o):
    """Offsets o from token t of [L, D] as they lie, to be used later."""
    return tl.load(p + wide(t) * D + o)


@triton.jit
def put(p, t, D, o, value, m):
    tl.store(p + wide(t) * D + o, value.to(p.dtype.element_ty), m)


@triton.jit
def tile_of(i, o_n, o_d, N: tl.constexpr, D):
    """Offsets of tile i of [..., N, D]. As a sum with i * N * D the rest would fill registers for long."""
    return (wide(i) * N + o_n)[:, None] * D + o_d[None, :]


@triton.jit
def read(p, o, m, shape: tl.constexpr):
    """p[o] in float32; zeros where p is missing."""
    if p is None:
        return tl.zeros(shape, tl.float32)
    else:
        return tl.load(p + o, m, 0.0).to(tl.float32)


@triton.jit
def rates(p_a, o_h, m_h):
    """a for exp2. -inf becomes a number, for it would make NaN of a step of 0."""
    a = tl.load(p_a + o_h, m_h, 0.0)
    return tl.where(a < -1e30, -1e30, a) * LOG2E


@triton.jit
def step_size(p_dt, t, D, o, m, bias, SOFTPLUS: tl.constexpr):
    raw = token(p_dt, t, D, o, m) + bias
    return softplus(raw) if SOFTPLUS else raw


@triton.jit
def advance(H, A, delta, x, b):
    """The next state."""
    return tl.math.exp2(delta[None, :] * A) * H + (delta * x)[None, :] * b[:, None]


@triton.jit
def add(total, lost, value):
    """total + value, and what rounding has lost so far (Kahan): thousands of tokens lose what a few do."""
    corrected = value - lost
    new = total + corrected
    return new, (new - total) - corrected


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


@triton.jit
def step_kernel(
    p_x, p_dt, p_z, p_a, p_b, p_c, p_d, p_bias, p_state, p_y, D, G,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One token. The state is read and written as it lies, [D, N]."""
    i_b, _, g, o_d, m_d, o_n, m_n = place(D, G, N, BN, BD)
    i_b = wide(i_b)
    o_h, m_h = o_n[:, None] + o_d[None, :] * N, m_n[:, None] & m_d[None, :]
    x, bias, skip = token(p_x, i_b, D, o_d, m_d), read(p_bias, o_d, m_d, [BD]), read(p_d, o_d, m_d, [BD])
    delta = step_size(p_dt, i_b, D, o_d, m_d, bias, SOFTPLUS)
    b = tl.load(p_b + (i_b * G + g) * N + o_n, m_n, 0.0).to(tl.float32)
    c = tl.load(p_c + (i_b * G + g) * N + o_n, m_n, 0.0).to(tl.float32)
    p_state += i_b * D * N
    H = advance(tl.load(p_state + o_h, m_h, 0.0), rates(p_a, o_h, m_h), delta, x, b)
    tl.store(p_state + o_h, H, m_h)
    y = tl.sum(H * c[:, None], 0) + skip * x
    if p_z is not None:
        y *= silu(token(p_z, i_b, D, o_d, m_d))
    put(p_y, i_b, D, o_d, y, m_d)


class Tiles(NamedTuple):
    """BN, BD, warps; of STEPS tokens the backward keeps the states in registers.

    AHEAD: tokens from the loads of x, dt and z to their use, some 1000 cycles, as long as memory takes.
    """

    BN: int
    BD: int
    warps: int
    STEPS: int
    AHEAD: int


def tiles(N: int, sm: int, back: bool) -> Tiles:
    """For N states on compute capability sm / 10, in up to 8 warps: what 255 registers a thread hold."""
    BN, states = power_of_2(N), 8 if back and N > 16 else 16  # of a thread
    BD = min(32, 8 * 32 * states // BN)
    STEPS, AHEAD = (2, 8) if N <= 16 and sm >= 90 else (1, 4)
    return Tiles(BN, BD, max(1, BN * BD // (32 * states)), STEPS, AHEAD)


def cut(B: int, T: int, warps: int, processors: int) -> int:
    """Tokens of a segment that takes so many warps, on a GPU of so many multiprocessors.

    Where sequences are short or give every multiprocessor 3 warps: whole ones, up to LONG tokens together, as
    long as 4 warps are left. Else parts of SHORT tokens or more that give it 4 warps.
    """
    if T <= SHORT or B * warps >= 3 * processors:
        return T * max(1, min(B * warps // (4 * processors), LONG // T))
    parts = max(1, min(-(-4 * processors // warps), B * T // SHORT))
    return up(-(-B * T // parts), CHUNK)


def up(n: int, unit: int) -> int:
    """The next multiple."""
    return -(-n // unit) * unit


def refuse_more_states(N: int) -> None:
    if N > MOST_STATES:
        refuse("selective_scan", "a", f"[D, N] with N at most {MOST_STATES} for backend 'triton'", N)


class Problem:
    """The inputs as the kernels of one pass take them, and how they are cut."""

    def __init__(self, dy, x, dt, a, b, c, d, z, dt_bias, softplus, initial_state, cu_seqlens):
        refuse_more_states(a.shape[1])
        B, T, self.D = x.shape
        self.N, self.G = a.shape[1], b.shape[2] if b.dim() == 4 else 1
        self.S, self.L = B if cu_seqlens is None else cu_seqlens.shape[0] - 1, B * T
        self.given = Given(
            *map(rows, (x, dt, z)),
            a.mT.contiguous(),
            self.pair(b, c),
            *(u if u is None else u.float().contiguous() for u in (d, dt_bias)),
            initial_state if initial_state is None else initial_state.mT.contiguous(),
            contiguous(cu_seqlens),
        )
        self.dy = rows(dy)
        processors, sm = device(x)
        BN, self.BD, self.warps, self.STEPS, AHEAD = tiles(self.N, sm, dy is not None)
        self.blocks = self.G * -(-self.D // self.G // self.BD)
        self.segment = cut(B, T, self.blocks * self.warps, processors)
        self.segments = -(-self.L // self.segment)
        self.crossed = self.segments > 1 and (cu_seqlens is not None or self.segment % T > 0)
        self.programs = (self.segments * self.blocks,)
        self.line = self.S, T, self.L, self.D, self.G, self.segment
        self.fixed = Fixed(self.N, BN, self.BD, self.STEPS, AHEAD, CHUNK, softplus, *self.apart())
        self.options = options(self.warps)

    def apart(self) -> tuple[int, ...]:
        """How many D it is from token to token in x, dt, z, dy. Without z, kernels read what they have."""
        x, dt, dy = self.given.x, self.given.dt, self.given.x if self.dy is None else self.dy
        z = dy if self.given.z is None else self.given.z
        return tuple(u.stride(0) // self.D for u in (x, dt, z, dy))

    def pair(self, b: Tensor, c: Tensor) -> Tensor:
        """b and c side by side [L, G, 2 N], in float32: for every thread to convert took 2 of 12 slots."""
        bc = b.new_empty(*b.shape[:2], self.G, 2 * self.N, dtype=torch.float32)
        for u, half in zip((b, c), bc.split(self.N, -1)):
            copy(of_groups(u), half)
        return bc

    def states(self, *lead: int) -> Tensor:
        """Memory for states of each of `lead`."""
        return self.given.x.new_empty(*lead, self.N, self.D, dtype=torch.float32)

    def grad(self, u: Tensor | None) -> Tensor | None:
        """Memory for u's likes, as kernels write them."""
        return u if u is None else u.new_empty(self.L, self.D)

    def forward(self, made: Made, entering: Tensor | None) -> None:
        forward_kernel[self.programs](self.given, made, entering, *self.line, self.fixed, **self.options)

    def entering(self) -> Tensor | None:
        """The states that enter the segments [segments, N, D], where one ends inside a sequence."""
        if not self.crossed:
            return None
        states, added = self.states(self.segments), self.states(self.segments)
        total = added.new_empty(self.segments, self.D)
        self.forward(Made(None, added, None, total), None)
        self.chain(added, total, states, False)
        return states

    def leaving(self, dfinal: Tensor | None, grads: Tensor) -> None:
        """Sets grads to those of the states that leave the segments, where one ends inside a sequence."""
        if not self.crossed:
            return
        added, total = torch.empty_like(grads), grads.new_empty(self.segments, self.D)
        crossing_back_kernel[self.programs](
            self.given, self.dy, dfinal, added, total, *self.line, self.fixed, **self.options
        )
        self.chain(added, total, grads, True)

    def chain(self, added: Tensor, total: Tensor, states: Tensor, reverse: bool) -> None:
        chain_kernel[(-(-self.D // self.BD),)](
            self.given.a, added, total, states, self.D, self.segments, *self.fixed[:3], reverse,
            **self.options,
        )  # fmt: skip


def rows(u: Tensor | None) -> Tensor | None:
    """u [B, T, D] as [B T, D] whose tokens are few D apart."""
    if u is None:
        return None
    D, u = u.shape[-1], line(u)
    return u if u.stride(0) in range(0, D * MOST_APART + 1, D) else u.contiguous()


def of_state(state: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a state, that lies [.., N, D], as `empty_as` gives it."""
    return grad if channels_first(state) else grad.contiguous()


def of_groups(u: Tensor) -> Tensor:
    """b or c as [B, T, G, N]."""
    return u if u.dim() == 4 else u.unsqueeze(2)


def forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, D], the final state [B or S, D, N], the states that enter every 64th token (0: none)."""
    if cu_seqlens is not None:
        boundaries("selective_scan", cu_seqlens, x.shape[1])  # once: it waits for the device
    assert every in (0, CHUNK)
    p = Problem(None, x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    y, final = p.grad(x), p.states(p.S)
    checkpoints = p.states(-(-p.L // CHUNK) if every else 0)
    p.forward(Made(y, final, checkpoints if every else None, None), p.entering())
    return like(x, y), final.mT.contiguous(), checkpoints.view(-1, p.D, p.N)


def backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    every: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, a, b, c, d, z, dt_bias and the initial state; empty where one is missing."""
    assert every == CHUNK
    p = Problem(grad_y, x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    dfinal = grad_state if grad_state is None else grad_state.mT.contiguous()
    db, dc = empty_as(b), empty_as(c)
    length = p.segment + (CHUNK - 1 if p.segment % CHUNK else 0)  # of a segment and its first chunk's start
    slab = min(up(length, CHUNK), max(SHORT, up(-(-length // SLABS), CHUNK)))
    slabs = -(-length // slab)
    edges, da = p.states(slabs + 1, p.segments), p.states(slabs, p.segments)
    p.leaving(dfinal, edges[-1])
    back = Back(
        checkpoints.contiguous(),
        p.dy,
        dfinal,
        edges,
        *map(p.grad, (x, dt, z)),
        da,
        da.new_empty(p.programs[0], slab, 2 * p.N),
        *(da.new_empty(slabs, p.segments, p.D) for _ in range(2)),
        None if initial_state is None else p.states(p.S),
        da.new_empty(p.programs[0], CHUNK // p.STEPS, p.fixed.BN, p.BD),
    )
    BT = max(1, 2048 // p.fixed.BN)
    for i in reversed(range(slabs)):
        backward_kernel[p.programs](p.given, back, *p.line, slab, i, p.fixed, **p.options)
        collect_kernel[(p.segments * p.G * -(-slab // BT),)](
            back.dbc, tokens(of_groups(db)), tokens(of_groups(dc)), p.line[1], p.L, p.G, p.blocks // p.G,
            p.segment, slab, i, p.N, p.fixed.BN, BT, CHUNK,
        )  # fmt: skip
    return (
        like(x, back.dx),
        like(dt, back.ddt),
        da.sum((0, 1)).mT.contiguous(),
        db,
        dc,
        x.new_empty(0) if d is None else back.dd.sum((0, 1)).to(d.dtype),
        x.new_empty(0) if z is None else like(z, back.dz),
        x.new_empty(0) if dt_bias is None else back.dbias.sum((0, 1)).to(dt_bias.dtype),
        x.new_empty(0) if initial_state is None else of_state(initial_state, back.dstate.mT),
    )


def step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state: Tensor,
) -> Tensor:
    """y [B, D]; the state, contiguous, is advanced."""
    (B, D), N, G = x.shape, a.shape[1], b.shape[1] if b.dim() == 3 else 1
    refuse_more_states(N)
    BN, BD = power_of_2(N), 32
    inputs = [contiguous(u) for u in (x, dt, z, a, b, c, d, dt_bias)]
    y = torch.empty_like(inputs[0])
    step_kernel[(B * G * -(-D // G // BD),)](
        *inputs, state, y, D, G, N, BN, BD, dt_softplus, **options(1 if BN <= 16 else 4)
    )
    return y
