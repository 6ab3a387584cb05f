"""The gated RMS norm in Triton: a program takes BR rows at once, BD of their columns at a time.

    i_  index of a tile     o_  offsets     m_  mask     p_  pointers

A row is read twice, the second time from the cache. Where BD holds all columns, a program adds up its part of
the weight's gradient; else `weight_kernel` does, from what the rows left.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..checks import contiguous, rows
from ..curves import silu, silu_slope
from ..launch import cdiv, device, options, power_of_2

MOST = 4096  # columns at once: 16 elements of a row a thread in 8 warps
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
def forward_kernel(
    p_x, p_gate, p_weight, p_y, x_row, gate_row, R, D, eps, BR: tl.constexpr, BD: tl.constexpr
):
    o_r, m_r = rows_of(tl.program_id(0), R, BR)
    squares = tl.zeros([BR, BD], tl.float32)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)[None, :]
        x = read(p_x, o_r * x_row + o_d, m_r & (o_d < D))
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, 1) / D + eps)[:, None]
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)[None, :]
        m = m_r & (o_d < D)
        y = read(p_x, o_r * x_row + o_d, m) * scale
        if p_weight is not None:
            y *= read(p_weight, o_d, o_d < D)
        if p_gate is not None:
            y *= silu(read(p_gate, o_r * gate_row + o_d, m))
        tl.store(p_y + o_r * D + o_d, y.to(p_y.dtype.element_ty), m)


@triton.jit
def backward_kernel(
    p_dy, p_x, p_gate, p_weight, p_dx, p_dgate, p_dweight, p_scale, x_row, gate_row, R, D, eps,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """p_dweight [programs, D]: of the program's rows, or p_scale [R]: 1 / rms, for `weight_kernel`."""
    dweight = tl.zeros([BR, BD], tl.float32)
    for i_r in range(tl.program_id(0), tl.cdiv(R, BR), tl.num_programs(0)):
        o_r, m_r = rows_of(i_r, R, BR)
        squares, product = tl.zeros([BR, BD], tl.float32), tl.zeros([BR, BD], tl.float32)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD)[None, :]
            m = m_r & (o_d < D)
            x, dn = read(p_x, o_r * x_row + o_d, m), read(p_dy, o_r * D + o_d, m)
            if p_gate is not None:
                dn *= silu(read(p_gate, o_r * gate_row + o_d, m))
            if p_weight is not None:
                dn *= read(p_weight, o_d, o_d < D)
            squares += x * x
            product += dn * x
        scale = tl.rsqrt(tl.sum(squares, 1) / D + eps)[:, None]
        along = tl.sum(product, 1)[:, None] * scale / D  # the mean of dn n
        if p_scale is not None:
            tl.store(p_scale + o_r, scale, m_r)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD)[None, :]
            m = m_r & (o_d < D)
            n, dn = read(p_x, o_r * x_row + o_d, m) * scale, read(p_dy, o_r * D + o_d, m)
            weighted = n
            if p_weight is not None:
                weighted *= read(p_weight, o_d, o_d < D)
            if p_gate is not None:
                gate = read(p_gate, o_r * gate_row + o_d, m)
                dgate = dn * weighted * silu_slope(gate)
                tl.store(p_dgate + o_r * D + o_d, dgate.to(p_dgate.dtype.element_ty), m)
                dn *= silu(gate)
            if p_dweight is not None:
                dweight += dn * n
            if p_weight is not None:
                dn *= read(p_weight, o_d, o_d < D)
            tl.store(p_dx + o_r * D + o_d, ((dn - n * along) * scale).to(p_dx.dtype.element_ty), m)
    if p_dweight is not None:
        o_d = tl.arange(0, BD)
        tl.store(p_dweight + tl.program_id(0) * D + o_d, tl.sum(dweight, 0), o_d < D)


@triton.jit
def weight_kernel(
    p_dy, p_x, p_gate, p_scale, p_dweight, x_row, gate_row, R, D, BR: tl.constexpr, BD: tl.constexpr
):
    """The part of some rows in the weight's gradient, BD columns of it."""
    tiles = tl.cdiv(D, BD)
    i_s, stripes = tl.program_id(0) // tiles, tl.num_programs(0) // tiles
    o_d = tl.program_id(0) % tiles * BD + tl.arange(0, BD)[None, :]
    dweight = tl.zeros([BR, BD], tl.float32)
    for i_r in range(i_s, tl.cdiv(R, BR), stripes):
        o_r, m_r = rows_of(i_r, R, BR)
        m = m_r & (o_d < D)
        n = read(p_x, o_r * x_row + o_d, m) * read(p_scale, o_r, m_r)
        dn = read(p_dy, o_r * D + o_d, m)
        if p_gate is not None:
            dn *= silu(read(p_gate, o_r * gate_row + o_d, m))
        dweight += dn * n
    tl.store(p_dweight + i_s * D + o_d, tl.sum(dweight, 0)[None, :], o_d < D)


def forward(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """y like x."""
    inputs, strides, BR, BD = prepare(x, gate, weight)
    y, R = x.new_empty(x.shape), x.numel() // x.shape[-1]
    forward_kernel[(cdiv(R, BR),)](*inputs, y, *strides, R, x.shape[-1], eps, BR, BD, **options(8))
    return y


def backward(
    grad_y: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight; empty ones where the argument is missing."""
    (x_rows, gate_rows, p_weight), strides, BR, BD = prepare(x, gate, weight)
    dy, R, D = grad_y.contiguous(), x.numel() // x.shape[-1], x.shape[-1]
    dx, dgate = x.new_empty(x.shape), x.new_empty(0) if gate is None else gate.new_empty(x.shape)
    programs = min(cdiv(R, BR), STRIPES * device(x)[0])
    parts = None if weight is None else x.new_empty(programs, D, dtype=torch.float32)
    scale = None if weight is None or D <= BD else x.new_empty(R, dtype=torch.float32)
    backward_kernel[(programs,)](
        dy, x_rows, gate_rows, p_weight, dx, None if gate is None else dgate,
        parts if scale is None else None, scale, *strides, R, D, eps, BR, BD, **options(8),
    )  # fmt: skip
    if scale is not None:
        weight_kernel[(programs * cdiv(D, BD),)](
            dy, x_rows, gate_rows, scale, parts, *strides, R, D, BR, BD, **options(8)
        )
    return dx, dgate, x.new_empty(0) if weight is None else parts.sum(0).to(weight.dtype)


def prepare(x: Tensor, gate: Tensor | None, weight: Tensor | None):
    """x, gate and weight as the kernels take them, the strides of their rows, BR and BD."""
    x, gate = rows(x), None if gate is None else rows(gate)
    BD = min(MOST, power_of_2(x.shape[1]))
    strides = x.stride(0), 0 if gate is None else gate.stride(0)
    return (x, gate, contiguous(weight)), strides, MOST // BD, BD
