"""Where tokens are that kernels walk chunk by chunk: heads of tensors, sequences that are cut into segments.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from functools import cache
from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..views import line


class Heads(NamedTuple):
    """A tensor [B T, heads, X] for a kernel: where it is, heads, elements from token to token, head to head.

    Constants, one model has one of each: a step that is no multiple of 16 would else take a load an element.
    Without steps p is a descriptor of [B, heads, T, X], which loads tiles ahead, and zeros outside of it.
    """

    p: Tensor | TensorDescriptor
    count: tl.constexpr
    token: tl.constexpr | None
    head: tl.constexpr | None


class Cut(NamedTuple):
    """Boundaries of packed sequences, tokens of a row, sequences, segments of a row, tokens of a segment.

    Sequence n of a packed row has the segments from cu[n] // L + n on: never too few, some without tokens.
    """

    p_cu: Tensor | None
    T: int
    N: int
    S: int
    L: int


@cache
def constant(value: int | tl.dtype) -> tl.constexpr:
    """What a kernel is compiled for; a NamedTuple's annotation does not make it one."""
    return tl.constexpr(value)


def heads(x: Tensor) -> Heads:
    """x [B, T, heads, X] as kernels take it: itself where tokens are equally far apart, else a copy."""
    (B, T, count, X), (row, token, head, channel) = x.shape, x.stride()
    apart = row if T == 1 else token
    within = (count == 1 or abs(head) <= token) and (X == 1 or channel == 1)
    if not within or (B > 1 and row != T * apart):
        x, apart, head = line(x), count * X, X
    return Heads(x, constant(count), constant(apart), constant(X if count == 1 else head))


def describable(x: Tensor) -> bool:
    """Whether the GPU's unit for copies of tiles can address x: steps are multiples of 16 bytes."""
    steps = [step * x.element_size() for n, step in zip(x.shape[:3], x.stride()) if n > 1]
    aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return aligned and x.stride(3) == 1


def described(x: Tensor, C: int, BX: int) -> Heads:
    """x [B, T, heads, X], of tiles of C tokens and BX columns; never a copy."""
    B, T, count, X = x.shape
    row, token, head, _ = (step if n > 1 else X + -X % 8 for n, step in zip(x.shape, x.stride()))
    of = TensorDescriptor(x, [B, count, T, X], [row, head, token, 1], [1, 1, C, BX])
    return Heads(of, constant(count), None, None)


@triton.jit
def boundary(cut, n):
    """That of packed sequences, inside of the row whatever it is."""
    return tl.minimum(tl.maximum(tl.load(cut.p_cu + n), 0), cut.T)


@triton.jit
def locate(cut, i_s):
    """Of segment i_s: its first token in [B T], how many it has, its row, its first token in that."""
    if cut.p_cu is None:
        row = i_s // cut.S
        start = (i_s - row * cut.S) * cut.L
        return row.to(tl.int64) * cut.T + start, tl.minimum(cut.T - start, cut.L), row, start
    else:
        n, beyond = i_s * 0, i_s * 0 + cut.N
        while n + 1 < beyond:
            middle = (n + beyond) // 2
            left = boundary(cut, middle) // cut.L + middle <= i_s
            n, beyond = tl.where(left, middle, n), tl.where(left, beyond, middle)
        begin = boundary(cut, n)
        start = begin + (i_s - begin // cut.L - n) * cut.L
        count = tl.minimum(tl.maximum(boundary(cut, n + 1) - start, 0), cut.L)
        return start.to(tl.int64), count, i_s * 0, start


@triton.jit
def tile(x, place, i_h, at, start, o_t, o_x, H: tl.constexpr, X: tl.constexpr):
    """Tokens at + o_t of a place, columns start + o_x, of the head of x that i_h reads.

    o_t and o_x are of two axes, start is of whole tiles and before X. float32 but for bfloat16: tf32 has
    float16's bits, and room for states that float16 has not. An offset in 64 bits is made anew for each tile;
    one that stays the same would stay in registers.
    """
    first, count, row, begin = place
    i = i_h // (H // x.count)
    if x.token is None:
        u = tl.reshape(x.p.load([row, i, begin + at, start]), [o_t.numel, o_x.numel])
        u = u if o_t.shape[1] == 1 else tl.trans(u)
    else:
        m = at + o_t < count if (o_x.numel - X) % o_x.numel == 0 else (at + o_t < count) & (o_x < X - start)
        if x.head > 0 and x.token % x.head == 0:  # one register for all: apart, K=256 V=512 would spill
            p = x.p + ((first * (x.token // x.head) + i) * x.head + start)
        else:
            p = x.p + (first * x.token + i * x.head + start)
        u = tl.load(p + (at + o_t).to(tl.int64) * x.token + o_x, m, 0.0)
    return u if u.dtype == tl.bfloat16 else u.to(tl.float32)


@triton.jit
def put(u, x, place, i_h, at, start, H: tl.constexpr, X: tl.constexpr):
    """u^T [BX, C] to tokens from `at` of a place, columns from `start`, of x, which has all H heads."""
    first, count, row, begin = place
    if x.token is None:
        u = tl.trans(u.to(x.p.dtype))
        x.p.store([row, i_h, begin + at, start], tl.reshape(u, [1, 1, u.shape[0], u.shape[1]]))
    else:
        o_x, t = tl.arange(0, u.shape[0])[:, None], at + tl.arange(0, u.shape[1])[None, :]
        o = (first * H + i_h) * X + start + (t.to(tl.int64) * (H * X) + o_x)
        tl.store(x.p + o, u.to(x.p.dtype.element_ty), (t < count) & (o_x < X - start))
