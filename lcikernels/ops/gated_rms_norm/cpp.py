"""The gated RMS norm in C++ (csrc/cpu/gated_rms_norm.cpp): one read of each row from memory."""

import torch
from torch import Tensor

from ..checks import inner, rows


def forward(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """y like x."""
    y = torch.ops.lcikernels_cpp.gated_rms_norm_forward(*prepare(x, gate, weight), eps)
    return y.view(x.shape)


def backward(
    grad_y: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight; empty ones where the argument is missing."""
    dx, dgate, dweight = torch.ops.lcikernels_cpp.gated_rms_norm_backward(
        rows(grad_y).contiguous(), *prepare(x, gate, weight), eps
    )
    dgate = dgate if gate is None else dgate.view(gate.shape)
    return dx.view(x.shape), dgate, dweight if weight is None else dweight.to(weight.dtype)


def prepare(x, gate, weight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the library takes: rows, and weight in the dtype of the arithmetic."""
    weight = weight if weight is None else weight.to(inner(x)).contiguous()
    return rows(x), gate if gate is None else rows(gate), weight
