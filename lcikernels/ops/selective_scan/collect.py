"""db and dc: what the backward pass leaves for each block of channels, added in order."""

import triton
from triton import language as tl

from ..views import steps, wide
from .backward import window
from .line import add


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
