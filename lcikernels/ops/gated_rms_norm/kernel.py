"""The gated RMS norm in Triton: a program takes BR rows of one group at once, BD of its D columns at a time.

    i_  index of a tile     o_  offsets     m_  mask     p_  pointers     G  groups, of D channels each here
    GATE  "after" the norm, "first", or "none"

A row is read twice, the second time from the cache; of a LayerNorm three times. Where BD holds all columns, a
program adds up its part of the gradients of weight and bias; else `weight_kernel` does, from what the rows
left.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..checks import contiguous, rows
from ..curves import sigmoid, sigmoid_slope, silu, silu_slope
from ..launch import cdiv, device, options, power_of_2

MOST = 4096  # elements at once: 16 a thread in 8 warps
STRIPES = 4  # programs for each multiprocessor, backward


@triton.jit
def rows_of(i_r, R, BR: tl.constexpr):
    o_r = tl.cast(i_r, tl.int64) * BR + tl.arange(0, BR)[:, None]
    return o_r, o_r < R


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
def normed(p_x, p_gate, o_x, o_gate, m, GATE: tl.constexpr, ACTIVATION: tl.constexpr):
    """u of norm(u)."""
    u = read(p_x, o_x, m)
    if GATE == "first":
        u *= activated(read(p_gate, o_gate, m), ACTIVATION)
    return u


@triton.jit
def centred(u, mean, m, KIND: tl.constexpr):
    """u less a LayerNorm's mean where there are channels, and 0 elsewhere."""
    return tl.where(m, u - mean, 0.0) if KIND == "layer" else u


@triton.jit
def mean_of(
    p_x, p_gate, o_x, o_gate, m_r, D,
    GATE: tl.constexpr, ACTIVATION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What a LayerNorm takes from u [BR, 1]."""
    total = tl.zeros([BR, BD], tl.float32)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)[None, :]
        total += normed(p_x, p_gate, o_x + o_d, o_gate + o_d, m_r & (o_d < D), GATE, ACTIVATION)
    return tl.sum(total, 1)[:, None] / D


@triton.jit
def forward_kernel(
    p_x, p_gate, p_weight, p_bias, p_y, x_row, gate_row, R, D, G, eps,
    GATE: tl.constexpr, ACTIVATION: tl.constexpr, KIND: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_g = tl.program_id(0) % G * D
    o_r, m_r = rows_of(tl.program_id(0) // G, R, BR)
    o_x, o_gate, o_y = o_r * x_row + o_g, o_r * gate_row + o_g, o_r * (G * D) + o_g
    mean = 0.0
    if KIND == "layer":
        mean = mean_of(p_x, p_gate, o_x, o_gate, m_r, D, GATE, ACTIVATION, BR, BD)
    squares = tl.zeros([BR, BD], tl.float32)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)[None, :]
        m = m_r & (o_d < D)
        u = centred(normed(p_x, p_gate, o_x + o_d, o_gate + o_d, m, GATE, ACTIVATION), mean, m, KIND)
        squares += u * u
    scale = tl.rsqrt(tl.sum(squares, 1) / D + eps)[:, None]
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)[None, :]
        m = m_r & (o_d < D)
        u = normed(p_x, p_gate, o_x + o_d, o_gate + o_d, m, GATE, ACTIVATION)
        y = centred(u, mean, m, KIND) * scale
        if p_weight is not None:
            y *= read(p_weight, o_g + o_d, o_d < D)
        if p_bias is not None:
            y += read(p_bias, o_g + o_d, o_d < D)
        if GATE == "after":
            y *= activated(read(p_gate, o_gate + o_d, m), ACTIVATION)
        tl.store(p_y + o_y + o_d, y.to(p_y.dtype.element_ty), m)


@triton.jit
def backward_kernel(
    p_dy, p_x, p_gate, p_weight, p_bias, p_dx, p_dgate, p_dweight, p_dbias, p_moments,
    x_row, gate_row, R, D, G, eps,
    GATE: tl.constexpr, ACTIVATION: tl.constexpr, KIND: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """p_dweight, p_dbias [stripes, G D]: of the program's rows; or p_moments [2, R, G]: 1 / rms and the mean
    of each, for `weight_kernel`."""
    o_g, i_s, stripes = tl.program_id(0) % G * D, tl.program_id(0) // G, tl.num_programs(0) // G
    dweight, dbias = tl.zeros([BR, BD], tl.float32), tl.zeros([BR, BD], tl.float32)
    for i_r in range(i_s, tl.cdiv(R, BR), stripes):
        o_r, m_r = rows_of(i_r, R, BR)
        o_x, o_gate, o_y = o_r * x_row + o_g, o_r * gate_row + o_g, o_r * (G * D) + o_g
        mean, level = 0.0, 0.0
        if KIND == "layer":
            mean = mean_of(p_x, p_gate, o_x, o_gate, m_r, D, GATE, ACTIVATION, BR, BD)
        squares, product = tl.zeros([BR, BD], tl.float32), tl.zeros([BR, BD], tl.float32)
        total = tl.zeros([BR, BD], tl.float32)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD)[None, :]
            m = m_r & (o_d < D)
            u = centred(normed(p_x, p_gate, o_x + o_d, o_gate + o_d, m, GATE, ACTIVATION), mean, m, KIND)
            dn = read(p_dy, o_y + o_d, m)
            if GATE == "after":
                dn *= activated(read(p_gate, o_gate + o_d, m), ACTIVATION)
            if p_weight is not None:
                dn *= read(p_weight, o_g + o_d, o_d < D)
            squares += u * u
            product += dn * u
            if KIND == "layer":
                total += dn
        # Of rows that are none, too: 0 times an infinite scale would be NaN in the weight's gradient.
        scale = tl.where(m_r, tl.rsqrt(tl.sum(squares, 1) / D + eps)[:, None], 0.0)
        along = tl.sum(product, 1)[:, None] * scale / D  # the mean of dn n
        if KIND == "layer":
            level = tl.sum(total, 1)[:, None] / D
        if p_moments is not None:
            tl.store(p_moments + o_r * G + tl.program_id(0) % G, scale, m_r)
            if KIND == "layer":
                tl.store(p_moments + (R + o_r) * G + tl.program_id(0) % G, mean, m_r)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD)[None, :]
            m = m_r & (o_d < D)
            x, dn = read(p_x, o_x + o_d, m), read(p_dy, o_y + o_d, m)
            u = x
            if GATE != "none":
                gate = read(p_gate, o_gate + o_d, m)
            if GATE == "first":
                u *= activated(gate, ACTIVATION)
            n = centred(u, mean, m, KIND) * scale
            if GATE == "after":
                ungated = n
                if p_weight is not None:
                    ungated *= read(p_weight, o_g + o_d, o_d < D)
                if p_bias is not None:
                    ungated += read(p_bias, o_g + o_d, o_d < D)
                dgate = dn * ungated * slope(gate, ACTIVATION)
                tl.store(p_dgate + o_y + o_d, dgate.to(p_dgate.dtype.element_ty), m)
                dn *= activated(gate, ACTIVATION)
            if p_dweight is not None:
                dweight += dn * n
            if p_dbias is not None:
                dbias += dn
            if p_weight is not None:
                dn *= read(p_weight, o_g + o_d, o_d < D)
            du = (dn - level - n * along) * scale
            if GATE == "first":
                dgate = du * x * slope(gate, ACTIVATION)
                tl.store(p_dgate + o_y + o_d, dgate.to(p_dgate.dtype.element_ty), m)
                du *= activated(gate, ACTIVATION)
            tl.store(p_dx + o_y + o_d, du.to(p_dx.dtype.element_ty), m)
    o_d = tl.arange(0, BD)
    o_part = i_s * (G * D) + o_g + o_d
    if p_dweight is not None:
        tl.store(p_dweight + o_part, tl.sum(dweight, 0), o_d < D)
    if p_dbias is not None:
        tl.store(p_dbias + o_part, tl.sum(dbias, 0), o_d < D)


@triton.jit
def weight_kernel(
    p_dy, p_x, p_gate, p_moments, p_dweight, p_dbias, x_row, gate_row, R, D, G,
    GATE: tl.constexpr, ACTIVATION: tl.constexpr, KIND: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The part of some rows in the gradients of weight and bias, BD columns of a group's."""
    tiles = tl.cdiv(D, BD)
    i_g, i_s = tl.program_id(0) // tiles % G, tl.program_id(0) // tiles // G
    stripes = tl.num_programs(0) // tiles // G
    o_d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)[None, :]
    o = i_g * D + o_d
    dweight, dbias = tl.zeros([BR, BD], tl.float32), tl.zeros([BR, BD], tl.float32)
    for i_r in range(i_s, tl.cdiv(R, BR), stripes):
        o_r, m_r = rows_of(i_r, R, BR)
        m = m_r & (o_d < D)
        dn = read(p_dy, o_r * (G * D) + o, m)
        if GATE == "after":
            dn *= activated(read(p_gate, o_r * gate_row + o, m), ACTIVATION)
        if p_dweight is not None:
            n = normed(p_x, p_gate, o_r * x_row + o, o_r * gate_row + o, m, GATE, ACTIVATION)
            if KIND == "layer":
                n -= read(p_moments, (R + o_r) * G + i_g, m_r)
            dweight += dn * (n * read(p_moments, o_r * G + i_g, m_r))
        if p_dbias is not None:
            dbias += dn
    o_part = i_s * (G * D) + o
    if p_dweight is not None:
        tl.store(p_dweight + o_part, tl.sum(dweight, 0)[None, :], o_d < D)
    if p_dbias is not None:
        tl.store(p_dbias + o_part, tl.sum(dbias, 0)[None, :], o_d < D)


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
    inputs, sizes, (BR, BD) = prepare(x, gate, weight, bias, groups)
    y, R = x.new_empty(x.shape), sizes[2]
    chosen = place(gate, norm_before_gate), activation, kind, BR, BD
    forward_kernel[(cdiv(R, BR) * groups,)](*inputs, y, *sizes, eps, *chosen, **options(8))
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
    inputs, sizes, (BR, BD) = prepare(x, gate, weight, bias, groups)
    R, D = sizes[2:4]
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
    chosen = place(gate, norm_before_gate), activation, kind, BR, BD
    backward_kernel[(stripes * groups,)](
        dy, *inputs, dx, None if gate is None else dgate, *((None, None) if later else parts), moments,
        *sizes, eps, *chosen, **options(8),
    )  # fmt: skip
    if later:
        grid = (stripes * groups * cdiv(D, BD),)
        weight_kernel[grid](dy, *inputs[:2], moments, *parts, *sizes, *chosen, **options(8))
    of = (x.new_empty(0) if u is None else part.sum(0).to(u.dtype) for u, part in zip((weight, bias), parts))
    return dx, dgate, *of


def place(gate: Tensor | None, norm_before_gate: bool) -> str:
    return "none" if gate is None else "after" if norm_before_gate else "first"


def prepare(x: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int):
    """x, gate, weight and bias as the kernels take them; the strides of rows, R, D, G; BR and BD."""
    x, gate = rows(x), None if gate is None else rows(gate)
    D = x.shape[1] // groups
    BD = min(MOST, power_of_2(D))
    sizes = x.stride(0), 0 if gate is None else gate.stride(0), x.shape[0], D, groups
    return (x, gate, contiguous(weight), contiguous(bias)), sizes, (MOST // BD, BD)
