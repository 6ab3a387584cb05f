"""The selective scan in Triton: sequential in time, a program's states in registers.

A program owns BD channels of one group in one segment of a sequence. A tile of states is [BN, BD] and its
loads run along BD: in the forward pass the states of a channel lie in one thread, and a sum over them asks no
other. So tensors of states are [..., N, D] here, and a is [N, D].

    i_  index of a tile     o_  offsets     m_  mask     p_  pointers

Time goes in chunks of CHUNK tokens, counted along a row; the forward pass leaves the states that enter them.
The backward walks the chunks in reverse: once through a chunk for the states that enter every STEPS tokens
of it, then STEPS tokens at a time, whose states and decays stay in registers. Sums over channels are written
for each block of channels, and added in order by the caller.

Where sequences and channels are too few to fill a GPU, a sequence is cut into segments: one pass finds what
each adds to a state that crosses it and what it leaves of that state, `chain_kernel` joins them, and all run
at once.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..checks import boundaries, contiguous
from ..curves import LN2, LOG2E, silu, silu_slope, softplus, softplus_slope, within

CHUNK = 64  # 1 byte of checkpoints for each channel and token at N = 16
STEPS = 2  # unrolled: what 255 registers hold, backward

# One compilation for all of them. And a D that is known to be a multiple of 4 would give a thread 4 channels
# of a tile, and spread their states over others.
SIZES = ("T", "D", "G", "segments", "SEGMENT")


@triton.jit
def place(p_cu, i, blocks, segments, SEGMENT, T):
    """Program i's block of channels, segment, sequence, row; its tokens begin to end, the sequence's last."""
    i_d, i_k, i_s = i % blocks, i // blocks % segments, (i // blocks // segments).to(tl.int64)
    if p_cu is None:
        row, first, last = i_s, 0, T
    else:
        row, first, last = i_s * 0, tl.load(p_cu + i_s), tl.load(p_cu + i_s + 1)
    begin = first + i_k * SEGMENT
    return i_d, i_k, i_s, row, begin, tl.minimum(begin + SEGMENT, last), last


@triton.jit
def channels(i_d, D, G, BD: tl.constexpr):
    """The block's group and channels."""
    P = D // G
    blocks = tl.cdiv(P, BD)
    o_p = i_d % blocks * BD + tl.arange(0, BD)
    return i_d // blocks, i_d // blocks * P + o_p, o_p < P


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
def step_size(raw, m, SOFTPLUS: tl.constexpr):
    """0 behind the end: it changes no state."""
    return tl.where(m, softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def add(total, lost, value):
    """total + value, and what rounding has lost so far (Kahan): thousands of tokens lose what a few do."""
    corrected = value - lost
    new = total + corrected
    return new, (new - total) - corrected


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_x, p_dt, p_z, p_a, p_bc, p_d, p_bias, p_state, p_cu, p_y, p_final, p_checkpoints, p_total,
    T, D, G, segments, SEGMENT,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Without p_y: what the segment adds to a state that crosses it (p_final), and the sum of its steps."""
    blocks = G * tl.cdiv(D // G, BD)
    i_d, i_k, i_s, row, begin, end, last = place(p_cu, tl.program_id(0), blocks, segments, SEGMENT, T)
    g, o_d, m_d = channels(i_d, D, G, BD)
    o_n = tl.arange(0, BN)
    m_n = o_n < N
    o_h, m_h = o_n[:, None] * D + o_d[None, :], m_n[:, None] & m_d[None, :]
    piece = i_s * segments + i_k
    A = rates(p_a, o_h, m_h)
    H = read(p_state, piece * N * D + o_h, m_h, [BN, BD])
    bias, skip = read(p_bias, o_d, m_d, [BD]), read(p_d, o_d, m_d, [BD])
    total = tl.zeros([BD], tl.float32)
    for i_c in range(begin // CHUNK, tl.cdiv(end, CHUNK)):
        start, stop = tl.maximum(begin, i_c * CHUNK), tl.minimum(end, (i_c + 1) * CHUNK)
        if p_checkpoints is not None:
            if start == i_c * CHUNK:
                tl.store(p_checkpoints + (row * tl.cdiv(T, CHUNK) + i_c) * N * D + o_h, H, m_h)
        for t in range(start, stop, STEPS):
            at, b_at = (row * T + t) * D, ((row * T + t) * G + g) * 2 * N
            for j in tl.static_range(STEPS):
                m_t, m_b = within(m_d, t + j < stop), within(m_n, t + j < stop)
                x = tl.load(p_x + (at + j * D) + o_d, m_t, 0.0).to(tl.float32)
                delta = step_size(
                    tl.load(p_dt + (at + j * D) + o_d, m_t).to(tl.float32) + bias, m_t, SOFTPLUS
                )
                b = tl.load(p_bc + (b_at + j * 2 * G * N) + o_n, m_b, 0.0)
                H = tl.math.exp2(delta[None, :] * A) * H + (delta * x)[None, :] * b[:, None]
                if p_y is None:
                    total += delta
                else:
                    c = tl.load(p_bc + (b_at + j * 2 * G * N + N) + o_n, m_b, 0.0)
                    y = tl.sum(H * c[:, None], 0) + skip * x
                    if p_z is not None:
                        y *= silu(tl.load(p_z + (at + j * D) + o_d, m_t).to(tl.float32))
                    tl.store(p_y + (at + j * D) + o_d, y.to(p_y.dtype.element_ty), m_t)
    if p_y is None:
        tl.store(p_final + piece * N * D + o_h, H, m_h)
        tl.store(p_total + piece * D + o_d, total, m_d)
    elif (end == last) & ((begin < last) | (i_k == 0)):
        tl.store(p_final + i_s * N * D + o_h, H, m_h)


@triton.jit(do_not_specialize=("D", "segments"))
def chain_kernel(
    p_a, p_edge, p_added, p_total, p_states, D, segments,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states where segments meet: the edge, then what each segment leaves of the last one and adds."""
    blocks = tl.cdiv(D, BD)
    i_d, i_s = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    o_d, o_n = i_d * BD + tl.arange(0, BD), tl.arange(0, BN)
    m_d = o_d < D
    o_h, m_h = o_n[:, None] * D + o_d[None, :], (o_n < N)[:, None] & m_d[None, :]
    A = rates(p_a, o_h, m_h)
    H = read(p_edge, i_s * N * D + o_h, m_h, [BN, BD])
    for k in range(segments):
        piece = i_s * segments + (segments - 1 - k if REVERSE else k)
        tl.store(p_states + piece * N * D + o_h, H, m_h)
        total = tl.load(p_total + piece * D + o_d, m_d, 0.0)
        H = tl.math.exp2(total[None, :] * A) * H + tl.load(p_added + piece * N * D + o_h, m_h, 0.0)


@triton.jit(do_not_specialize=SIZES)
def crossing_back_kernel(
    p_dt, p_z, p_a, p_bc, p_bias, p_cu, p_dy, p_added,
    T, D, G, segments, SEGMENT,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the gradient of a state that crosses it, last token first."""
    blocks = G * tl.cdiv(D // G, BD)
    i_d, i_k, i_s, row, begin, end, _ = place(p_cu, tl.program_id(0), blocks, segments, SEGMENT, T)
    g, o_d, m_d = channels(i_d, D, G, BD)
    o_n = tl.arange(0, BN)
    m_n = o_n < N
    o_h, m_h = o_n[:, None] * D + o_d[None, :], m_n[:, None] & m_d[None, :]
    A, bias = rates(p_a, o_h, m_h), read(p_bias, o_d, m_d, [BD])
    dH = tl.zeros([BN, BD], tl.float32)
    for back in range(0, end - begin, STEPS):
        for j in tl.static_range(STEPS):
            t = end - 1 - back - j
            m_t, m_b = within(m_d, t >= begin), within(m_n, t >= begin)
            at = (row * T + t) * D
            delta = step_size(tl.load(p_dt + at + o_d, m_t, 0.0).to(tl.float32) + bias, m_t, SOFTPLUS)
            dy = tl.load(p_dy + at + o_d, m_t, 0.0).to(tl.float32)
            if p_z is not None:
                dy *= silu(tl.load(p_z + at + o_d, m_t, 0.0).to(tl.float32))
            c = tl.load(p_bc + ((row * T + t) * G + g) * 2 * N + N + o_n, m_b, 0.0)
            dH = tl.math.exp2(delta[None, :] * A) * (dH + dy[None, :] * c[:, None])
    tl.store(p_added + (i_s * segments + i_k) * N * D + o_h, dH, m_h)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    p_x, p_dt, p_z, p_a, p_bc, p_d, p_bias, p_state, p_cu, p_checkpoints, p_dy, p_dfinal,
    p_dx, p_ddt, p_dz, p_da, p_dbc, p_dd, p_dbias, p_dstate, p_scratch,
    T, D, G, segments, SEGMENT,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """p_dbc [rows, T, G, blocks of a group, 2 N]; p_scratch: CHUNK / STEPS tiles for each program."""
    blocks = G * tl.cdiv(D // G, BD)
    i_d, i_k, i_s, row, begin, end, _ = place(p_cu, tl.program_id(0), blocks, segments, SEGMENT, T)
    g, o_d, m_d = channels(i_d, D, G, BD)
    o_n = tl.arange(0, BN)
    m_n = o_n < N
    o_h, m_h = o_n[:, None] * D + o_d[None, :], m_n[:, None] & m_d[None, :]
    piece = i_s * segments + i_k
    A = rates(p_a, o_h, m_h)
    bias, skip = read(p_bias, o_d, m_d, [BD]), read(p_d, o_d, m_d, [BD])
    dH = read(p_dfinal, piece * N * D + o_h, m_h, [BN, BD])
    dA, dskip, dbias = tl.zeros([BN, BD], tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    lost_skip, lost_bias = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    p_tile = p_scratch + tl.program_id(0).to(tl.int64) * (CHUNK // STEPS) * BN * BD
    p_tile += tl.arange(0, BN)[:, None] * BD + tl.arange(0, BD)[None, :]
    for back in range(tl.cdiv(end, CHUNK) - begin // CHUNK):
        i_c = tl.cdiv(end, CHUNK) - 1 - back
        start, stop = tl.maximum(begin, i_c * CHUNK), tl.minimum(end, (i_c + 1) * CHUNK)
        if start == i_c * CHUNK:
            H = tl.load(p_checkpoints + (row * tl.cdiv(T, CHUNK) + i_c) * N * D + o_h, m_h, 0.0)
        else:
            H = read(p_state, piece * N * D + o_h, m_h, [BN, BD])
        for t in range(start, stop, STEPS):
            tl.store(p_tile + (t - start) // STEPS * (BN * BD), H)
            at, b_at = (row * T + t) * D, ((row * T + t) * G + g) * 2 * N
            for j in tl.static_range(STEPS):
                m_t = within(m_d, t + j < stop)
                x = tl.load(p_x + (at + j * D) + o_d, m_t, 0.0).to(tl.float32)
                delta = step_size(
                    tl.load(p_dt + (at + j * D) + o_d, m_t, 0.0).to(tl.float32) + bias, m_t, SOFTPLUS
                )
                b = tl.load(p_bc + (b_at + j * 2 * G * N) + o_n, within(m_n, t + j < stop), 0.0)
                H = tl.math.exp2(delta[None, :] * A) * H + (delta * x)[None, :] * b[:, None]
        tl.debug_barrier()  # where the accesses are laid out differently, a thread reads what another wrote
        tiles = tl.cdiv(stop - start, STEPS)
        for i in range(tiles):
            t = start + (tiles - 1 - i) * STEPS
            at, b_at = (row * T + t) * D, ((row * T + t) * G + g) * 2 * N
            dbc_at = (((row * T + t) * G + g) * (blocks // G) + i_d % (blocks // G)) * 2 * N
            H = tl.load(p_tile + (tiles - 1 - i) * (BN * BD))
            xs, deltas, dys, before, decays = (), (), (), (), ()
            for j in tl.static_range(STEPS):
                m_t, m_b = within(m_d, t + j < stop), within(m_n, t + j < stop)
                x = tl.load(p_x + (at + j * D) + o_d, m_t, 0.0).to(tl.float32)
                delta = step_size(
                    tl.load(p_dt + (at + j * D) + o_d, m_t).to(tl.float32) + bias, m_t, SOFTPLUS
                )
                b = tl.load(p_bc + (b_at + j * 2 * G * N) + o_n, m_b, 0.0)
                c = tl.load(p_bc + (b_at + j * 2 * G * N + N) + o_n, m_b, 0.0)
                dy = tl.load(p_dy + (at + j * D) + o_d, m_t, 0.0).to(tl.float32)
                decay = tl.math.exp2(delta[None, :] * A)
                xs, deltas, before, decays = xs + (x,), deltas + (delta,), before + (H,), decays + (decay,)
                H = decay * H + (delta * x)[None, :] * b[:, None]
                if p_z is not None:
                    z = tl.load(p_z + (at + j * D) + o_d, m_t, 0.0).to(tl.float32)
                    dz = dy * silu_slope(z) * (tl.sum(H * c[:, None], 0) + skip * x)
                    tl.store(p_dz + (at + j * D) + o_d, dz.to(p_dz.dtype.element_ty), m_t)
                    dy *= silu(z)
                dys = dys + (dy,)
                tl.store(p_dbc + (dbc_at + j * 2 * N * blocks + N) + o_n, tl.sum(dy[None, :] * H, 1), m_b)
            for j in tl.static_range(STEPS - 1, -1, -1):
                m_t, m_b = within(m_d, t + j < stop), within(m_n, t + j < stop)
                x, delta, dy = xs[j], deltas[j], dys[j]
                b = tl.load(p_bc + (b_at + j * 2 * G * N) + o_n, m_b, 0.0)
                c = tl.load(p_bc + (b_at + j * 2 * G * N + N) + o_n, m_b, 0.0)
                dH += dy[None, :] * c[:, None]
                tl.store(
                    p_dbc + (dbc_at + j * 2 * N * blocks) + o_n, tl.sum((delta * x)[None, :] * dH, 1), m_b
                )
                through_b = tl.sum(dH * b[:, None], 0)
                dH *= decays[j]
                through_decay = dH * before[j]
                dA += delta[None, :] * through_decay
                ddt = x * through_b + tl.sum(through_decay * A, 0) * LN2
                if SOFTPLUS:
                    ddt *= softplus_slope(tl.load(p_dt + (at + j * D) + o_d, m_t).to(tl.float32) + bias)
                tl.store(
                    p_dx + (at + j * D) + o_d, (delta * through_b + skip * dy).to(p_dx.dtype.element_ty), m_t
                )
                tl.store(p_ddt + (at + j * D) + o_d, ddt.to(p_ddt.dtype.element_ty), m_t)
                dskip, lost_skip = add(dskip, lost_skip, dy * x)
                dbias, lost_bias = add(dbias, lost_bias, tl.where(m_t, ddt, 0.0))
        tl.debug_barrier()  # ... and the next chunk writes where this one reads
    tl.store(p_da + piece * N * D + o_h, dA, m_h)
    tl.store(p_dstate + piece * N * D + o_h, dH, m_h)
    tl.store(p_dd + piece * D + o_d, dskip, m_d)
    tl.store(p_dbias + piece * D + o_d, dbias, m_d)


@triton.jit
def step_kernel(
    p_x, p_dt, p_z, p_a, p_b, p_c, p_d, p_bias, p_state, p_y, D, G,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One token. The state is read and written as it lies, [D, N]."""
    blocks = G * tl.cdiv(D // G, BD)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    g, o_d, m_d = channels(tl.program_id(0) % blocks, D, G, BD)
    o_n = tl.arange(0, BN)
    m_n = o_n < N
    o_h, m_h = o_d[:, None] * N + o_n[None, :], m_d[:, None] & m_n[None, :]
    x = tl.load(p_x + i_b * D + o_d, m_d, 0.0).to(tl.float32)
    delta = tl.load(p_dt + i_b * D + o_d, m_d, 0.0).to(tl.float32) + read(p_bias, o_d, m_d, [BD])
    delta = step_size(delta, m_d, SOFTPLUS)
    b = tl.load(p_b + (i_b * G + g) * N + o_n, m_n, 0.0).to(tl.float32)
    c = tl.load(p_c + (i_b * G + g) * N + o_n, m_n, 0.0).to(tl.float32)
    p_state += i_b * D * N
    H = tl.load(p_state + o_h, m_h, 0.0) * tl.math.exp2(delta[:, None] * rates(p_a, o_h, m_h))
    H += (delta * x)[:, None] * b[None, :]
    tl.store(p_state + o_h, H, m_h)
    y = tl.sum(H * c[None, :], 1) + read(p_d, o_d, m_d, [BD]) * x
    if p_z is not None:
        y *= silu(tl.load(p_z + i_b * D + o_d, m_d, 0.0).to(tl.float32))
    tl.store(p_y + i_b * D + o_d, y.to(p_y.dtype.element_ty), m_d)


def tiles(N: int) -> tuple[int, int, int]:
    """BN, BD and warps for N states: a channel a lane, 16 states a thread, 8 from N = 129 on."""
    BN, BD = triton.next_power_of_2(N), 32 if N <= 128 else 16
    return BN, BD, min(max(1, BN // 16), 16)


def segments(warps: int, T: int, x: Tensor) -> int:
    """Parts of a sequence, 256 tokens at least: for 4 warps on each multiprocessor where there are not 3."""
    chips = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return 1 if warps >= 3 * chips else max(1, min(-(-4 * chips // warps), T // 256))


class Problem:
    """The inputs as the kernels take them, and how they are cut."""

    def __init__(self, x, dt, a, b, c, d, z, dt_bias, softplus, initial_state, cu_seqlens):
        self.B, self.T, self.D = x.shape
        self.N, self.G = a.shape[1], b.shape[2] if b.dim() == 4 else 1
        self.S = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.x, self.dt, self.z, self.cu_seqlens = map(contiguous, (x, dt, z, cu_seqlens))
        self.softplus = softplus
        self.a = a.mT.contiguous()
        self.bc = torch.cat((b, c), -1).float()  # every thread reads them: to convert them took 2 of 12 slots
        self.d, self.bias = (u if u is None else u.float().contiguous() for u in (d, dt_bias))
        self.initial = initial_state if initial_state is None else initial_state.mT.contiguous()
        self.BN, self.BD, self.warps = tiles(self.N)
        self.blocks = self.G * -(-self.D // self.G // self.BD)
        parts = segments(self.S * self.blocks * self.warps, self.T, x)
        self.segment = -(-self.T // parts // CHUNK) * CHUNK
        self.segments = -(-self.T // self.segment)
        self.programs = (self.S * self.segments * self.blocks,)
        self.scan = self.T, self.D, self.G, self.segments, self.segment, self.N, self.BN, self.BD
        self.options = dict(num_warps=self.warps, enable_fp_fusion=True)
        # The compiler saves registers for more warps, even where it has to spill for that.
        self.all_registers = {} if torch.version.hip else dict(maxnreg=min(255, 2048 // self.warps))

    def states(self, *lead: int) -> Tensor:
        """Memory for states of each of `lead`."""
        return self.x.new_empty(*lead, self.N, self.D, dtype=torch.float32)

    def forward(self, entering: Tensor | None, y: Tensor | None, final, checkpoints, total) -> None:
        forward_kernel[self.programs](
            self.x, self.dt, self.z, self.a, self.bc, self.d, self.bias, entering, self.cu_seqlens,
            y, final, checkpoints, total, *self.scan, CHUNK, STEPS, self.softplus, **self.options,
        )  # fmt: skip

    def entering(self) -> tuple[Tensor | None, Tensor | None]:
        """The states that enter the segments [S, segments, N, D], None: zeros. The sums of their steps."""
        if self.segments == 1:
            return self.initial, None
        added = self.states(self.S, self.segments)
        total = self.x.new_empty(self.S, self.segments, self.D, dtype=torch.float32)
        self.forward(None, None, added, None, total)
        return self.chain(self.initial, added, total, False), total

    def leaving(self, grad_y: Tensor, grad_final: Tensor | None, total: Tensor | None) -> Tensor | None:
        """The gradient of the state that leaves each segment."""
        if self.segments == 1:
            return grad_final
        added = self.states(self.S, self.segments)
        crossing_back_kernel[self.programs](
            self.dt, self.z, self.a, self.bc, self.bias, self.cu_seqlens, grad_y, added,
            *self.scan, STEPS, self.softplus, **self.options,
        )  # fmt: skip
        return self.chain(grad_final, added, total, True)

    def chain(self, edge: Tensor | None, added: Tensor, total: Tensor, reverse: bool) -> Tensor:
        states = torch.empty_like(added)
        chain_kernel[(self.S * -(-self.D // self.BD),)](
            self.a,
            edge,
            added,
            total,
            states,
            self.D,
            self.segments,
            self.N,
            self.BN,
            self.BD,
            reverse,
            **self.options,
        )
        return states


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
    """y [B, T, D], the final state [B or S, D, N], the state that enters every 64th token (0: none)."""
    if cu_seqlens is not None:
        boundaries("selective_scan", cu_seqlens, x.shape[1])  # once: it waits for the device
    p = Problem(x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    y, final = torch.empty_like(p.x), p.states(p.S)
    checkpoints = p.states(p.B, -(-p.T // CHUNK) if every else 0)
    p.forward(p.entering()[0], y, final, checkpoints if every else None, None)
    return y, final.mT.contiguous(), checkpoints.view(-1, p.B, p.D, p.N)


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
    p = Problem(x, dt, a, b, c, d, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    grad_y, grad_final = grad_y.contiguous(), grad_state if grad_state is None else grad_state.mT.contiguous()
    entering, total = p.entering()
    dx, ddt, dz = (u if u is None else torch.empty_like(u) for u in (p.x, p.dt, p.z))
    da, dstate = p.states(p.S, p.segments), p.states(p.S, p.segments)
    dd, dbias = (da.new_empty(p.S, p.segments, p.D) for _ in range(2))
    dbc = da.new_empty(p.B, p.T, p.G, p.blocks // p.G, 2 * p.N)
    scratch = da.new_empty(p.programs[0], CHUNK // STEPS, p.BN, p.BD)
    backward_kernel[p.programs](
        p.x, p.dt, p.z, p.a, p.bc, p.d, p.bias, entering, p.cu_seqlens, checkpoints, grad_y,
        p.leaving(grad_y, grad_final, total), dx, ddt, dz, da, dbc, dd, dbias, dstate, scratch,
        *p.scan, CHUNK, STEPS, p.softplus, **p.options, **p.all_registers,
    )  # fmt: skip
    db, dc = (u.to(b.dtype, copy=True).reshape(b.shape) for u in dbc.sum(3).split(p.N, -1))
    return (
        dx,
        ddt,
        da.sum((0, 1)).mT.contiguous(),
        db,
        dc,
        x.new_empty(0) if d is None else dd.sum((0, 1)).to(d.dtype),
        x.new_empty(0) if z is None else dz,
        x.new_empty(0) if dt_bias is None else dbias.sum((0, 1)).to(dt_bias.dtype),
        dstate[:, 0].mT.contiguous(),
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
    """y [B, D]; the state is advanced."""
    (B, D), N, G = x.shape, a.shape[1], b.shape[1] if b.dim() == 3 else 1
    BN, BD = triton.next_power_of_2(N), 32
    inputs = [contiguous(u) for u in (x, dt, z, a, b, c, d, dt_bias)]
    dense, y = state.contiguous(), torch.empty_like(inputs[0])
    step_kernel[(B * G * -(-D // G // BD),)](
        *inputs, dense, y, D, G, N, BN, BD, dt_softplus,
        num_warps=1 if BN <= 16 else 4, enable_fp_fusion=True,
    )  # fmt: skip
    if dense is not state:
        state.copy_(dense)
    return y
