"""What a program of the convolution has: its tokens and channels, how they are read and written.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from ..curves import within
from ..views import apart, steps, together


class Filter(NamedTuple):
    """What is read besides x: weight [D, W], bias [D], the state before each sequence [N, D, W-1], where
    packed sequences begin."""

    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None
    cu: Tensor | None


@triton.jit
def locate(i, p_cu, T, N, BT, BEFORE):
    """What tile `i` is: its row and sequence, its first token t, and, counted from t, the start of the
    sequence, the end of the tile's own tokens, the end of the sequence.

    A sequence has BEFORE tokens more, before its start. It has one tile at least, if it is empty, too. Own
    tokens are of the row whatever p_cu says.
    """
    if p_cu is None:
        count = tl.cdiv(T + BEFORE, BT)
        row = i // count
        n, begin, end, first = row, 0, T, row * count
    else:
        # Sequence n has the tiles from (cu[n] + n * BEFORE) // BT + n on: never too few, some without tokens.
        row, n, beyond = i * 0, i * 0, N
        while n + 1 < beyond:
            middle = (n + beyond) // 2
            left = (tl.load(p_cu + middle) + middle * BEFORE) // BT + middle <= i
            n, beyond = tl.where(left, middle, n), tl.where(left, beyond, middle)
        begin = tl.minimum(tl.maximum(tl.load(p_cu + n), 0), T)
        end = tl.minimum(tl.load(p_cu + n + 1), T)
        first = tl.minimum((begin + n * BEFORE) // BT + n, i)
    t = begin - BEFORE + (i - first) * BT
    own = tl.maximum(tl.minimum(end - t, BT), 0)
    return row.to(tl.int64), n.to(tl.int64), (i * 0 + t).to(tl.int64), begin - t, own, end - t


@triton.jit
def channels(i, D, BD: tl.constexpr):
    """Tile and channels of program `i`."""
    blocks = tl.cdiv(D, BD)
    o_d = i % blocks * BD + tl.arange(0, BD)
    return i // blocks, o_d, o_d < D


@triton.jit
def begin_at(x, row, t):
    """Where token t of a row is."""
    return x.p + steps(row, x.row) + steps(t, x.token)


@triton.jit
def filters(given, o_d, m_d, W: tl.constexpr):
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(given.weight + o_d * W + w, m_d, 0.0).to(tl.float32),)
    bias = tl.zeros([o_d.shape[0]], tl.float32)
    if given.bias is not None:
        bias += tl.load(given.bias + o_d, m_d, 0.0).to(tl.float32)
    return taps, bias


@triton.jit
def token(x, p_x, p_initial, s, begin, end, o_d, m_d, W):
    """Token s of a sequence, or of the state before it."""
    m = within(m_d, (begin <= s) & (end > s))
    u = tl.load(p_x + steps(s, x.token) + steps(o_d, x.channel), m, 0.0).to(tl.float32)
    if p_initial is not None:
        i = W - 1 - begin + s
        u += tl.load(p_initial + o_d * (W - 1) + i, within(m_d, (i >= 0) & (begin > s)), 0.0)
    return u


@triton.jit
def fetch(x, p_x, s, stop, o_d, m_d, U: tl.constexpr):
    """The U tokens from s on, zeros from `stop` on, in float32."""
    if x.token is None:
        o_t = s + tl.arange(0, U)
        p = p_x + steps(o_d, x.channel)[:, None] + o_t[None, :]
        if s + U <= stop:
            run = tl.load(p, m_d[:, None], 0.0)
        else:  # a mask of single tokens would make single loads of them
            run = tl.load(p, m_d[:, None] & (o_t < stop)[None, :], 0.0)
        return apart(run.to(tl.float32), o_d.shape[0], U)
    else:
        us = ()
        for j in tl.static_range(U):
            p = p_x + steps(s + j, x.token) + steps(o_d, x.channel)
            us = us + (tl.load(p, within(m_d, s + j < stop), 0.0).to(tl.float32),)
        return us


@triton.jit
def put(y, p_y, s, value, m_d, o_d):
    """Stores one token of memory of our own: y.token is D or 1, and 32 bits hold the offset of a tile."""
    o = s if y.token is None else s * y.token
    tl.store(p_y + o + steps(o_d, y.channel), value.to(p_y.dtype.element_ty), m_d)


@triton.jit
def put_run(y, p_y, s, stop, values, o_d, m_d, U: tl.constexpr):
    """Stores the U tokens from s on that are before `stop`."""
    o_t, run = s + tl.arange(0, U), together(values, o_d.shape[0], U).to(p_y.dtype.element_ty)
    p = p_y + steps(o_d, y.channel)[:, None] + o_t[None, :]
    if s + U <= stop:
        tl.store(p, run, m_d[:, None])
    else:
        tl.store(p, run, m_d[:, None] & (o_t < stop)[None, :])
