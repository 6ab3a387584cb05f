"""What the backward pass leaves, added in order: of blocks of channels for db and dc, of slabs and segments
for da, dd and ddt_bias."""

import triton
from triton import language as tl

from ..views import steps, wide
from .backward import window
from .line import add, tile_of


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


@triton.jit(do_not_specialize=("parts", "D"))
def totals_kernel(back, p_da, p_dd, p_dbias, parts, D, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """da [D, N], dd and dbias [D] from the parts that `back` has of them."""
    o_d, o_n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    m_d = o_d < D
    m_h = (o_n < N)[:, None] & m_d[None, :]
    da, dd, dbias = tl.zeros([BN, BD], tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    lost_a, lost_d, lost_bias = da, dd, dbias
    for i in tl.range(parts, loop_unroll_factor=4):
        o = wide(i) * D + o_d
        da, lost_a = add(da, lost_a, tl.load(back.da + tile_of(i, o_n, o_d, N, D), m_h, 0.0))
        dd, lost_d = add(dd, lost_d, tl.load(back.dd + o, m_d, 0.0))
        dbias, lost_bias = add(dbias, lost_bias, tl.load(back.dbias + o, m_d, 0.0))
    tl.store(p_da + wide(o_d)[None, :] * N + o_n[:, None], da, m_h)
    if p_dd is not None:
        tl.store(p_dd + o_d, dd, m_d)
    if p_dbias is not None:
        tl.store(p_dbias + o_d, dbias, m_d)
