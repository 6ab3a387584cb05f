"""What segments add to a state that crosses them, and what they leave of it; joined where they meet.

Forward in time `forward_kernel` finds it, when it is given no y.
"""

import triton
from triton import language as tl

from ..curves import silu, within
from ..views import wide
from .line import SIZES, ended, place, rates, read, segment_of, start_of, step_size, tile_of, token


@triton.jit(do_not_specialize=SIZES)
def crossing_back_kernel(
    given, p_dy, p_dfinal, p_added, p_total, S, T, L, D, G, SEGMENT, fixed: tl.constexpr
):
    """What the segment adds to the gradient of the state that enters it, and the sum of its steps."""
    N: tl.constexpr = fixed.N
    BN: tl.constexpr = fixed.BN
    BD: tl.constexpr = fixed.BD
    at = place(D, G, N, BN, BD)
    D_dt, D_z, D_dy = D * fixed.DT, D * fixed.Z, D * fixed.DY
    begin, end = segment_of(at.k, SEGMENT, L)
    A, bias = rates(given.a, tile_of(0, at.n, at.d, N, D), at.m_h), read(given.bias, at.d, at.m_d, [BD])
    i_s = tl.minimum(ended(given.cu, S, T, begin), S - 1)
    starts, stops = start_of(given.cu, i_s, T), start_of(given.cu, i_s + 1, T)
    last = tl.where(starts < begin, tl.minimum(stops, end), begin)
    dH = read(p_dfinal, tile_of(i_s, at.n, at.d, N, D), within(at.m_h, stops <= end), [BN, BD])
    total = tl.zeros([BD], tl.float32)
    for back in tl.range(0, last - begin, loop_unroll_factor=fixed.AHEAD):
        t = last - 1 - back
        delta = step_size(given.dt, t, D_dt, at.d, at.m_d, bias, fixed.SOFTPLUS)
        dy = token(p_dy, t, D_dy, at.d, at.m_d)
        if given.z is not None:
            dy *= silu(token(given.z, t, D_z, at.d, at.m_d))
        c = tl.load(given.bc + (wide(t) * G + at.g) * 2 * N + N + at.n, at.m_n, 0.0)
        dH = tl.math.exp2(delta[None, :] * A) * (dH + dy[None, :] * c[:, None])
        total += delta
    tl.store(p_added + tile_of(at.k, at.n, at.d, N, D), dH, at.m_h)
    crosses = start_of(given.cu, ended(given.cu, S, T, end), T) < begin
    tl.store(p_total + wide(at.k) * D + at.d, tl.where(crosses, total, float("inf")), at.m_d)


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
