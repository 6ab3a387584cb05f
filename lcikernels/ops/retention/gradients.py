"""All gradients of a chunk of small heads, where the states at its ends are in memory.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from ..curves import within
from .chunks import Cut, locate, tile
from .decays import between, power, running
from .scores import Pairs


class Grads(NamedTuple):
    """dq, dk, dv [B T, as many heads as programs make, K or V]."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class Outer(NamedTuple):
    """The states that enter the chunks, and the gradients of those that leave, [chunks, H, K, V]."""

    enter: Tensor
    leave: Tensor


class Gradients(NamedTuple):
    """What `gradients_kernel` is compiled for. A program goes through HEADS heads, of which SHARED_Q have one
    gradient of q, and so on; ONE: they all share q and k."""

    H: int
    K: int
    V: int
    HEADS: int
    SHARED_Q: int
    SHARED_K: int
    SHARED_V: int
    ONE: bool
    PER_TOKEN: bool
    C: int
    BK: int
    BV: int
    PRECISION: str


@triton.jit
def handed_on(grad, p, first, count, i_h, r, SHARED: tl.constexpr, H: tl.constexpr, X: tl.constexpr):
    """grad [C, BX] for the next head that shares it, or stored and 0 for the next that does not."""
    o_t, o_x = tl.arange(0, grad.shape[0]), tl.arange(0, grad.shape[1])
    row: tl.constexpr = H // SHARED * X
    p += first * row + i_h // SHARED * X + o_t.to(tl.int64)[:, None] * row + o_x[None, :]
    last = r % SHARED == SHARED - 1
    m = within((o_t < count)[:, None] & (o_x < X)[None, :], last)
    tl.store(p, grad.to(p.dtype.element_ty), m)
    return tl.where(last, 0.0, grad) if SHARED > 1 else tl.zeros_like(grad)


@triton.jit(do_not_specialize=("cut",))
def gradients_kernel(of: Pairs, to: Grads, outer: Outer, p_rate, cut: Cut, scale, fixed: tl.constexpr):
    """A chunk of HEADS heads, one after another."""
    H: tl.constexpr = fixed.H
    K: tl.constexpr = fixed.K
    V: tl.constexpr = fixed.V
    C: tl.constexpr = fixed.C
    PRECISION: tl.constexpr = fixed.PRECISION
    groups: tl.constexpr = H // fixed.HEADS
    i_g, i_c = tl.program_id(0) % groups, tl.program_id(0) // groups
    place = locate(cut, i_c)
    first, count, _, _ = place
    o_t, o_k, o_v = tl.arange(0, C), tl.arange(0, fixed.BK), tl.arange(0, fixed.BV)
    m_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    dq, dk = tl.zeros([C, fixed.BK], tl.float32), tl.zeros([C, fixed.BK], tl.float32)
    dv = tl.zeros([C, fixed.BV], tl.float32)
    if fixed.ONE:
        q = tile(of.q, place, i_g * fixed.HEADS, 0, 0, o_t[:, None], o_k[None, :], H, K)
        k = tile(of.k, place, i_g * fixed.HEADS, 0, 0, o_t[:, None], o_k[None, :], H, K)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    for r in range(fixed.HEADS):
        i_h = i_g * fixed.HEADS + r
        head, o_state = (i_c.to(tl.int64) * H + i_h) * (K * V), o_k[:, None] * V + o_v[None, :]
        if not fixed.ONE:
            q = tile(of.q, place, i_h, 0, 0, o_t[:, None], o_k[None, :], H, K)
            k = tile(of.k, place, i_h, 0, 0, o_t[:, None], o_k[None, :], H, K)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        v = tile(of.v, place, i_h, 0, 0, o_t[:, None], o_v[None, :], H, V)
        do = tile(of.do, place, i_h, 0, 0, o_t[:, None], o_v[None, :], H, V)
        coarse, fine, end_coarse, end_fine = running(p_rate, first, i_h, 0, count, H, C, fixed.PER_TOKEN)
        since, until = power(coarse, fine) * scale, power(end_coarse - coarse, end_fine - fine)
        D = between(coarse, fine, scale, True)
        P, dP = scores * D, tl.dot(do, tl.trans(v), input_precision=PRECISION)
        P, dP = P.to(q.dtype), (dP * D).to(q.dtype)
        state = tl.load(outer.enter + head + o_state, m_state, 0.0)
        of_q = tl.dot(do, tl.trans(state).to(q.dtype), input_precision=PRECISION) * since[:, None]
        dq = tl.dot(dP, k, dq + of_q, input_precision=PRECISION)
        dq = handed_on(dq, to.dq, first, count, i_h, r, fixed.SHARED_Q, H, K)
        dstate = tl.load(outer.leave + head + o_state, m_state, 0.0)
        of_k = tl.dot(v, tl.trans(dstate).to(q.dtype), input_precision=PRECISION) * until[:, None]
        dk = tl.dot(tl.trans(dP), q, dk + of_k, input_precision=PRECISION)
        dk = handed_on(dk, to.dk, first, count, i_h, r, fixed.SHARED_K, H, K)
        of_v = tl.dot(k, dstate.to(q.dtype), input_precision=PRECISION) * until[:, None]
        dv = tl.dot(tl.trans(P), do, dv + of_v, input_precision=PRECISION)
        dv = handed_on(dv, to.dv, first, count, i_h, r, fixed.SHARED_V, H, V)
