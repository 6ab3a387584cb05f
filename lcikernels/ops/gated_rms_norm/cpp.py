"""The gated RMS norm in C++ (csrc/cpu/gated_rms_norm.cpp): one read of each row from memory."""

import torch
from torch import Tensor

from ..checks import inner, rows


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
    inputs = prepare(x, gate, weight, bias, kind)
    options = groups, not norm_before_gate, activation == "silu", kind == "layer"
    return torch.ops.lcikernels_cpp.gated_rms_norm_forward(*inputs, eps, *options).view(x.shape)


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
    inputs = prepare(x, gate, weight, bias, kind)
    options = groups, not norm_before_gate, activation == "silu", kind == "layer"
    dx, dgate, *gradients = torch.ops.lcikernels_cpp.gated_rms_norm_backward(
        rows(grad_y).contiguous(), *inputs, eps, *options
    )
    dgate = dgate if gate is None else dgate.view(gate.shape)
    of = (
        x.new_empty(0) if u is None else gradient.to(u.dtype)
        for u, gradient in zip((weight, bias), gradients)
    )
    return dx.view(x.shape), dgate, *of


def prepare(x, gate, weight, bias, kind) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What the library takes: rows, and weight and bias in the dtype of the arithmetic.

    It has a bias with a weight alone, and a LayerNorm with both.
    """
    bias = x.new_zeros(x.shape[-1]) if bias is None and kind == "layer" else bias
    weight = x.new_ones(x.shape[-1]) if weight is None and bias is not None else weight
    weight, bias = (u if u is None else u.to(inner(x)).contiguous() for u in (weight, bias))
    return rows(x), gate if gate is None else rows(gate), weight, bias
