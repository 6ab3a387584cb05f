"""Tokens where they lie: strides as Triton's kernels take them, runs of tokens, copies into another order.

i_  index of a tile     o_  offsets     m_  mask     p_  pointers
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from .checks import channels_first, empty_as
from .launch import cdiv, power_of_2


class Tokens(NamedTuple):
    """A tensor [B, T, D] or [B, T, G, D] for a kernel: where it is, elements from one index to the next.

    None is 1: the axis along which memory is contiguous, known when a kernel is compiled. Of T and D at most
    one is, D where both could be.
    """

    p: Tensor
    row: int | None
    token: int | None
    group: int | None
    channel: int | None


def tokens(x: Tensor) -> Tokens:
    """x as kernels take it, copying nothing."""
    row, token, *group, channel = x.stride()
    if channel == 1 or x.shape[-1] == 1:
        channel = None
    elif token == 1:
        token = None
    return Tokens(x, row, token, group[0] if group else 0, channel)


@triton.jit
def wide(i):
    """Before a token or an index is multiplied: B T D may be more than 2^31."""
    return tl.cast(i, tl.int64)


@triton.jit
def steps(o, step):
    """Offset of index o on an axis of a Tokens."""
    return o if step is None else wide(o) * step


@triton.jit
def apart(x, B: tl.constexpr, U: tl.constexpr):
    """The U columns of x [B, U], of which a thread has whole rows: 16 bytes of a channel in one load."""
    if U == 1:
        return (tl.reshape(x, [B]),)
    else:
        even, odd = tl.split(tl.reshape(x, [B, U // 2, 2]))
        evens, odds, columns = apart(even, B, U // 2), apart(odd, B, U // 2), ()
        for j in tl.static_range(U // 2):
            columns = columns + (evens[j], odds[j])
        return columns


@triton.jit
def together(columns, B: tl.constexpr, U: tl.constexpr):
    """What `apart` takes apart."""
    if U == 1:
        return tl.reshape(columns[0], [B, 1])
    else:
        evens, odds = (), ()
        for j in tl.static_range(U // 2):
            evens, odds = evens + (columns[2 * j],), odds + (columns[2 * j + 1],)
        return tl.reshape(tl.join(together(evens, B, U // 2), together(odds, B, U // 2)), [B, U])


@triton.jit
def copy_kernel(x, y, T, G, D, BT: tl.constexpr, BD: tl.constexpr):
    """y <- x, both Tokens. Loads go along x's contiguous axis, stores along y's."""
    tiles_t, tiles_d = tl.cdiv(T, BT), tl.cdiv(D, BD)
    i_t, i_d = tl.program_id(0) // tiles_d % tiles_t, tl.program_id(0) % tiles_d
    i_b, i_g = tl.program_id(0) // tiles_d // tiles_t // G, tl.program_id(0) // tiles_d // tiles_t % G
    o_t, o_d = i_t * BT + tl.arange(0, BT), i_d * BD + tl.arange(0, BD)
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    p_x, p_y = x.p + steps(i_b, x.row) + steps(i_g, x.group), y.p + steps(i_b, y.row) + steps(i_g, y.group)
    u = tl.load(p_x + steps(o_t, x.token)[:, None] + steps(o_d, x.channel)[None, :], m, 0.0)
    p_y += steps(o_t, y.token)[:, None] + steps(o_d, y.channel)[None, :]
    tl.store(p_y, u.to(p_y.dtype.element_ty), m)


def copy(x: Tensor, y: Tensor) -> Tensor:
    """y [B, T, D] or [B, T, G, D], which becomes x, whatever the layouts and dtypes; at memory's speed."""
    (B, T), G, D = x.shape[:2], x.shape[2] if x.dim() == 4 else 1, x.shape[-1]
    BT, BD = min(64, power_of_2(T)), min(64, power_of_2(D))
    copy_kernel[(B * G * cdiv(T, BT) * cdiv(D, BD),)](tokens(x), tokens(y), T, G, D, BT, BD)
    return y


def line(x: Tensor) -> Tensor:
    """x [B, T, ...] as [B T, ...]: tokens equally far apart, the other axes inside them, the last contiguous.

    A view where x lies so, as parts of a projection do, else a copy.
    """
    B, T, *inner = x.shape
    row, token, *steps = x.stride()
    within = all(n == 1 or abs(step) <= token for n, step in zip(inner, steps))
    if within and (steps[-1] == 1 or inner[-1] == 1) and (B == 1 or T == 1 or row == T * token):
        return x.as_strided((B * T, *inner), (row if T == 1 else token, *steps))
    return copy(x, x.new_empty(x.shape)).flatten(0, 1)


def like(x: Tensor, rows: Tensor) -> Tensor:
    """What is in rows [B T, ...], dense, in the layout that `empty_as` gives x's likes."""
    dense = rows.view(x.shape)
    return copy(dense, empty_as(x)) if channels_first(x) else dense
