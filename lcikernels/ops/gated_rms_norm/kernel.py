"""The gated RMS norm in Triton: a program takes BR rows of one group at once, BD of its D columns at a time.

    i_  index of a tile     o_  offsets     m_  mask     p_  pointers     G  groups, of D channels each here
    GATE  "after" the norm, "first", or "none"

A row is read twice, the second time from the cache; of a LayerNorm three times. Where BD holds all columns, a
program adds up its part of the gradients of weight and bias; else `weight_kernel` does, from what the rows
left.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..checks import contiguous, rows
from ..curves import sigmoid, sigmoid_slope, silu, silu_slope
from ..launch import cdiv, device, options, power_of_2

MOST = 4096  # elements at once: 16 a thread in 8 warps
STRIPES = 4  # programs for each multiprocessor, backward


class Given(NamedTuple):
    """x, gate [R, G D], elements from one of their rows to the next; weight, bias [G D]."""

    x: Tensor
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    x_row: int
    gate_row: int


class Grads(NamedTuple):
    """Of weight and bias [stripes, G D]: of a program's rows; or moments [2, R, G]: 1 / rms and the mean of
    each row, for `weight_kernel`."""

    x: Tensor
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    moments: Tensor | None


class Rows(NamedTuple):
    """Where a program's rows of its group are in x, in the gate and in what is dense; which there are."""

    x: int
    gate: int
    y: int
    m: int


class Formula(NamedTuple):
    """What a kernel is compiled for: the formula, and a tile of BR rows and BD columns."""

    GATE: str
    ACTIVATION: str
    KIND: str
    BR: int
    BD: int


@triton.jit
def rows_of(given, i_r, i_g, R, D, G, BR: tl.constexpr):
    o_r = tl.cast(i_r, tl.int64) * BR + tl.arange(0, BR)[:, None]
    o_x, o_gate = o_r * given.x_row + i_g * D, o_r * given.gate_row + i_g * D
    return o_r, Rows(o_x, o_gate, (o_r * G + i_g) * D, o_r < R)


@triton.jit
def read(p, o, m):
    """In float32."""
    return tl.load(p + o, m, 0.0).to(tl.float32)


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    return silu(gate) if ACTIVATION == "silu" else sigmoid(gate)


@triton.jit
def slope(gate, ACTIVATION: tl.constexpr):
    return silu_slope(gate) if ACTIVATION == "silu" else sigmoid_slope(gate)


@triton.jit
def normed(given, rows, o_d, m, formula: tl.constexpr):
    """u of norm(u)."""
    u = read(given.x, rows.x + o_d, m)
    if formula.GATE == "first":
        u *= activated(read(given.gate, rows.gate + o_d, m), formula.ACTIVATION)
    return u


@triton.jit
def centred(u, mean, m, KIND: tl.constexpr):
    """u less a LayerNorm's mean where there are channels, and 0 elsewhere."""
    return tl.where(m, u - mean, 0.0) if KIND == "layer" else u


@triton.jit
def mean_of(given, rows, D, formula: tl.constexpr):
    """What a LayerNorm takes from u [BR, 1]; else 0."""
    if formula.KIND != "layer":
        return 0.0
    else:
        total = tl.zeros([formula.BR, formula.BD], tl.float32)
        for d in range(0, D, formula.BD):
            o_d = d + tl.arange(0, formula.BD)[None, :]
            total += normed(given, rows, o_d, rows.m & (o_d < D), formula)
        return tl.sum(total, 1)[:, None] / D


@triton.jit
def affine(n, given, o, m):
    """n times the weight, plus the bias."""
    if given.weight is not None:
        n *= read(given.weight, o, m)
    if given.bias is not None:
        n += read(given.bias, o, m)
    return n


@triton.jit
def forward_kernel(given, p_y, R, D, G, eps, formula: tl.constexpr):
    i_g = tl.program_id(0) % G
    _, rows = rows_of(given, tl.program_id(0) // G, i_g, R, D, G, formula.BR)
    mean = mean_of(given, rows, D, formula)
    squares = tl.zeros([formula.BR, formula.BD], tl.float32)
    for d in range(0, D, formula.BD):
        o_d = d + tl.arange(0, formula.BD)[None, :]
        m = rows.m & (o_d < D)
        u = centred(normed(given, rows, o_d, m, formula), mean, m, formula.KIND)
        squares += u * u
    scale = tl.rsqrt(tl.sum(squares, 1) / D + eps)[:, None]
    for d in range(0, D, formula.BD):
        o_d = d + tl.arange(0, formula.BD)[None, :]
        m = rows.m & (o_d < D)
        n = centred(normed(given, rows, o_d, m, formula), mean, m, formula.KIND) * scale
        y = affine(n, given, i_g * D + o_d, o_d < D)
        if formula.GATE == "after":
            y *= activated(read(given.gate, rows.gate + o_d, m), formula.ACTIVATION)
        tl.store(p_y + rows.y + o_d, y.to(p_y.dtype.element_ty), m)


@triton.jit
def row_sums(given, p_dy, rows, i_g, D, eps, mean, formula: tl.constexpr):
    """1 / rms, the mean of dn n over it, of a LayerNorm that of dn, and what du is multiplied by."""
    squares = tl.zeros([formula.BR, formula.BD], tl.float32)
    product, total = squares, squares
    for d in range(0, D, formula.BD):
        o_d = d + tl.arange(0, formula.BD)[None, :]
        m = rows.m & (o_d < D)
        u = centred(normed(given, rows, o_d, m, formula), mean, m, formula.KIND)
        dn = read(p_dy, rows.y + o_d, m)
        if formula.GATE == "after":
            dn *= activated(read(given.gate, rows.gate + o_d, m), formula.ACTIVATION)
        if given.weight is not None:
            dn *= read(given.weight, i_g * D + o_d, o_d < D)
        squares += u * u
        product += dn * u
        if formula.KIND == "layer":
            total += dn
    # Of rows that are none, too: 0 times an infinite scale would be NaN in the weight's gradient.
    scale = tl.where(rows.m, tl.rsqrt(tl.sum(squares, 1) / D + eps)[:, None], 0.0)
    level = tl.sum(total, 1)[:, None] / D if formula.KIND == "layer" else 0.0
    # One channel, or two about their mean: n² = 1 - eps scale², and a difference would leave its roundings.
    if formula.BD == (2 if formula.KIND == "layer" else 1):
        return scale, 0.0, level, eps * scale * scale * scale
    else:
        return scale, tl.sum(product, 1)[:, None] * scale / D, level, scale


@triton.jit
def row_gradients(given, grads, p_dy, rows, i_g, D, moments, dweight, dbias, formula: tl.constexpr):
    """dx and dgate; what the rows add to dweight and dbias."""
    mean, scale, along, level, rate = moments
    for d in range(0, D, formula.BD):
        o_d = d + tl.arange(0, formula.BD)[None, :]
        o_g, m_d = i_g * D + o_d, o_d < D
        m = rows.m & m_d
        x, dn = read(given.x, rows.x + o_d, m), read(p_dy, rows.y + o_d, m)
        u = x
        if formula.GATE != "none":
            gate = read(given.gate, rows.gate + o_d, m)
        if formula.GATE == "first":
            u *= activated(gate, formula.ACTIVATION)
        n = centred(u, mean, m, formula.KIND) * scale
        if formula.GATE == "after":
            dgate = dn * affine(n, given, o_g, m_d) * slope(gate, formula.ACTIVATION)
            tl.store(grads.gate + rows.y + o_d, dgate.to(grads.gate.dtype.element_ty), m)
            dn *= activated(gate, formula.ACTIVATION)
        if grads.weight is not None:
            dweight += dn * n
        if grads.bias is not None:
            dbias += dn
        if given.weight is not None:
            dn *= read(given.weight, o_g, m_d)
        du = (dn - level - n * along) * rate
        if formula.GATE == "first":
            dgate = du * x * slope(gate, formula.ACTIVATION)
            tl.store(grads.gate + rows.y + o_d, dgate.to(grads.gate.dtype.element_ty), m)
            du *= activated(gate, formula.ACTIVATION)
        tl.store(grads.x + rows.y + o_d, du.to(grads.x.dtype.element_ty), m)
    return dweight, dbias


@triton.jit
def backward_kernel(given, p_dy, grads, R, D, G, eps, formula: tl.constexpr):
    i_g, i_s, stripes = tl.program_id(0) % G, tl.program_id(0) // G, tl.num_programs(0) // G
    dweight = tl.zeros([formula.BR, formula.BD], tl.float32)
    dbias = tl.zeros([formula.BR, formula.BD], tl.float32)
    for i_r in range(i_s, tl.cdiv(R, formula.BR), stripes):
        o_r, rows = rows_of(given, i_r, i_g, R, D, G, formula.BR)
        mean = mean_of(given, rows, D, formula)
        scale, along, level, rate = row_sums(given, p_dy, rows, i_g, D, eps, mean, formula)
        if grads.moments is not None:
            tl.store(grads.moments + o_r * G + i_g, scale, rows.m)
            if formula.KIND == "layer":
                tl.store(grads.moments + (R + o_r) * G + i_g, mean, rows.m)
        moments = mean, scale, along, level, rate
        dweight, dbias = row_gradients(given, grads, p_dy, rows, i_g, D, moments, dweight, dbias, formula)
    o_d = tl.arange(0, formula.BD)
    o_part = (i_s * G + i_g) * D + o_d
    if grads.weight is not None:
        tl.store(grads.weight + o_part, tl.sum(dweight, 0), o_d < D)
    if grads.bias is not None:
        tl.store(grads.bias + o_part, tl.sum(dbias, 0), o_d < D)


@triton.jit
def weight_kernel(given, p_dy, grads, R, D, G, formula: tl.constexpr):
    """The part of some rows in the gradients of weight and bias, BD columns of a group's."""
    tiles = tl.cdiv(D, formula.BD)
    i_g, i_s = tl.program_id(0) // tiles % G, tl.program_id(0) // tiles // G
    stripes = tl.num_programs(0) // tiles // G
    o_d = tl.program_id(0) % tiles * formula.BD + tl.arange(0, formula.BD)[None, :]
    dweight = tl.zeros([formula.BR, formula.BD], tl.float32)
    dbias = tl.zeros([formula.BR, formula.BD], tl.float32)
    for i_r in range(i_s, tl.cdiv(R, formula.BR), stripes):
        o_r, rows = rows_of(given, i_r, i_g, R, D, G, formula.BR)
        m = rows.m & (o_d < D)
        dn = read(p_dy, rows.y + o_d, m)
        if formula.GATE == "after":
            dn *= activated(read(given.gate, rows.gate + o_d, m), formula.ACTIVATION)
        if grads.weight is not None:
            n = normed(given, rows, o_d, m, formula)
            if formula.KIND == "layer":
                n -= read(grads.moments, (R + o_r) * G + i_g, rows.m)
            dweight += dn * (n * read(grads.moments, o_r * G + i_g, rows.m))
        if grads.bias is not None:
            dbias += dn
    o_part = (i_s * G + i_g) * D + o_d
    if grads.weight is not None:
        tl.store(grads.weight + o_part, tl.sum(dweight, 0)[None, :], o_d < D)
    if grads.bias is not None:
        tl.store(grads.bias + o_part, tl.sum(dbias, 0)[None, :], o_d < D)


def forward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: int,
    norm_before_gate: bool,
    activation: str,
    kind: str,
) -> Tensor:
    """y like x."""
    given, sizes, (BR, BD) = prepare(x, gate, weight, bias, groups)
    y, formula = x.new_empty(x.shape), Formula(place(gate, norm_before_gate), activation, kind, BR, BD)
    forward_kernel[(cdiv(sizes[0], BR) * groups,)](given, y, *sizes, eps, formula, **options(8))
    return y


def backward(
    grad_y: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    groups: int,
    norm_before_gate: bool,
    activation: str,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate, weight and bias; empty ones where the argument is missing."""
    given, sizes, (BR, BD) = prepare(x, gate, weight, bias, groups)
    R, D, _ = sizes
    if bias is not None or kind == "layer" or D % 16:  # or 255 registers do not hold it
        BR = max(BR // 2, 1)
    dy, dx = grad_y.contiguous(), x.new_empty(x.shape)
    dgate = x.new_empty(0) if gate is None else gate.new_empty(x.shape)
    stripes = min(cdiv(R, BR), cdiv(STRIPES * device(x)[0], groups))
    parts = [
        None if u is None else x.new_empty(stripes, x.shape[-1], dtype=torch.float32) for u in (weight, bias)
    ]
    later = D > BD and parts != [None, None]
    moments = x.new_empty(2, R, groups, dtype=torch.float32) if later else None
    formula = Formula(place(gate, norm_before_gate), activation, kind, BR, BD)
    grads = Grads(dx, None if gate is None else dgate, *((None, None) if later else parts), moments)
    backward_kernel[(stripes * groups,)](given, dy, grads, *sizes, eps, formula, **options(8))
    if later:
        grid = (stripes * groups * cdiv(D, BD),)
        weight_kernel[grid](given, dy, Grads(dx, None, *parts, moments), *sizes, formula, **options(8))
    of = (x.new_empty(0) if u is None else part.sum(0).to(u.dtype) for u, part in zip((weight, bias), parts))
    return dx, dgate, *of


def place(gate: Tensor | None, norm_before_gate: bool) -> str:
    return "none" if gate is None else "after" if norm_before_gate else "first"


def prepare(x: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int):
    """The inputs as the kernels take them; R, D, G; BR and BD."""
    x, gate = rows(x), None if gate is None else rows(gate)
    D = x.shape[1] // groups
    BD = min(MOST, power_of_2(D))
    strides = x.stride(0), 0 if gate is None else gate.stride(0)
    given = Given(x, gate, contiguous(weight), contiguous(bias), *strides)
    return given, (x.shape[0], D, groups), (MOST // BD, BD)
