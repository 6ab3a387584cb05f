"""The line of tokens that the scan's kernels walk: which part of it is a program's, and what it reads there.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from ..curves import LOG2E, softplus
from ..views import steps, wide

# One compilation for all of them. And a D that is known to be a multiple of 4 would give a thread 4 channels
# of a tile, and spread their states over others.
SIZES = ("S", "T", "L", "D", "G", "SEGMENT")


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


class Block(NamedTuple):
    """What a program has: segment k, a block of channels in group g; states N and channels D with masks.

    x: its channels for loads without a mask, the last one in the place of those behind it.
    """

    k: int
    g: int
    n: int
    d: int
    x: int
    m_n: int
    m_d: int
    m_h: int


class Channels(NamedTuple):
    """What the program's channels have at all times: a, times log2(e), dt_bias and d."""

    a: Tensor
    bias: Tensor
    skip: Tensor


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
    """The first sequence in tokens begin to end, the one after the last, the one that end is inside of.

    At most S of them, whatever p_cu says.
    """
    on = ended(p_cu, S, T, end)
    stop = tl.minimum(tl.where(start_of(p_cu, on, T) < end, on + 1, on), S)
    return ended(p_cu, S, T, begin), stop, on


@triton.jit
def place(D, G, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """The program's segment (a step's row) and block."""
    P = D // G
    blocks = tl.cdiv(P, BD)
    i_k, i_d = tl.program_id(0) // (G * blocks), tl.program_id(0) % (G * blocks)
    o_p, o_n = i_d % blocks * BD + tl.arange(0, BD), tl.arange(0, BN)
    g, m_d, m_n = i_d // blocks, o_p < P, o_n < N
    o_d = g * P + o_p
    o_x = tl.minimum(o_d, (g + 1) * P - 1)
    return Block(i_k, g, o_n, o_d, o_x, m_n, m_d, m_n[:, None] & m_d[None, :])


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
def constants(given, at, D, fixed: tl.constexpr):
    a = rates(given.a, tile_of(0, at.n, at.d, fixed.N, D), at.m_h)
    bias, skip = read(given.bias, at.d, at.m_d, [fixed.BD]), read(given.d, at.d, at.m_d, [fixed.BD])
    return Channels(a, bias, skip)


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


@triton.jit
def pair_kernel(b, c, p_bc, T, G, N: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """bc [B, T, G, 2 N] in float32 from b and c, both Tokens: to convert took threads 2 of 12 slots."""
    tiles = tl.cdiv(T, BT)
    i_t, g = tl.program_id(0) % tiles, tl.program_id(0) // tiles % G
    i_b, o_t, o_n = tl.program_id(0) // tiles // G, i_t * BT + tl.arange(0, BT), tl.arange(0, BN)
    m = (o_t < T)[:, None] & (o_n < N)[None, :]
    p_to = p_bc + ((wide(i_b) * T + o_t)[:, None] * G + g) * 2 * N + o_n[None, :]
    tl.store(p_to, of_group(b, i_b, o_t, g, o_n, m), m)
    tl.store(p_to + N, of_group(c, i_b, o_t, g, o_n, m), m)


@triton.jit
def of_group(u, i_b, o_t, g, o_n, m):
    p = u.p + steps(i_b, u.row) + steps(g, u.group)
    return tl.load(p + steps(o_t, u.token)[:, None] + steps(o_n, u.channel)[None, :], m, 0.0).to(tl.float32)
