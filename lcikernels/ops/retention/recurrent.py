"""Retention token by token: a step, and sequences too short for chunks.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from ..curves import LOG2E, of_state, state_of, within
from ..views import Tokens, steps


class Inputs(NamedTuple):
    """q, k, v, and log_decay [H] or [B T, H]."""

    q: Tokens
    k: Tokens
    v: Tokens
    rate: Tensor


class Cache(NamedTuple):
    """The states that enter and those that leave, S of them, their strides; rows: which of them a row of the
    batch has, None its own."""

    enter: Tensor | None
    leave: Tensor
    rows: Tensor | None
    S: int
    b: int
    h: int
    k: int
    v: int


class Counts(NamedTuple):
    """Tokens, heads of q, of k, of v, of all; rate_row: from token to token, 0 where all have one rate."""

    T: int
    q: int
    k: int
    v: int
    H: int
    rate_row: int


@triton.jit
def vector(x, i_b, t, i_h, o, m):
    """Elements o of a token and head of x, a Tokens."""
    p = x.p + steps(i_b, x.row) + steps(t, x.token) + steps(i_h, x.group)
    return tl.load(p + steps(o, x.channel), m, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=("counts",))
def recurrent_kernel(
    of: Inputs, cache: Cache, p_o, counts: Counts, scale, K, V, BK: tl.constexpr, BV: tl.constexpr
):
    """All rows and BV columns of a state."""
    H = counts.H
    tiles = tl.cdiv(V, BV)
    i_v, i_h = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H
    i_b = (tl.program_id(0) // tiles // H).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    i_s, there = state_of(cache.rows, i_b, cache.S)
    o_state = (o_k.to(tl.int64) * cache.k)[:, None] + (o_v.to(tl.int64) * cache.v)[None, :]
    o_state += i_s * cache.b + i_h.to(tl.int64) * cache.h
    m_state = within(m_k[:, None] & m_v[None, :], there)
    state = tl.zeros([BK, BV], tl.float32)
    if cache.enter is not None:
        state += tl.load(cache.enter + o_state, m_state, 0.0).to(tl.float32)
    for t in range(counts.T):
        row = i_b * counts.T + t
        q = vector(of.q, i_b, t, i_h // (H // counts.q), o_k, m_k)
        k = vector(of.k, i_b, t, i_h // (H // counts.k), o_k, m_k)
        v = vector(of.v, i_b, t, i_h // (H // counts.v), o_v, m_v)
        decay = tl.math.exp2(tl.load(of.rate + row * counts.rate_row + i_h) * LOG2E)
        state = state * decay + k[:, None] * v[None, :]
        o = of_state(tl.sum(q[:, None] * state, 0) * scale, cache.rows, i_s, cache.S)
        tl.store(p_o + (row * H + i_h) * V + o_v, o.to(p_o.dtype.element_ty), m_v)
    tl.store(cache.leave + o_state, state.to(cache.leave.dtype.element_ty), m_state)
