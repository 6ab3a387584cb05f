"""The gated RMS norm in plain torch; the backward pass recomputes the norm."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..checks import inner


def forward(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """y like x."""
    y, _ = normalise(x, eps)
    y = y if weight is None else y.mul_(weight)
    y = y if gate is None else y.mul_(silu(gate.to(y.dtype)))
    return y.to(x.dtype)


def backward(
    grad_y: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight; empty ones where the argument is missing."""
    n, scale = normalise(x, eps)
    dy = grad_y.to(n.dtype, copy=True, memory_format=torch.contiguous_format)
    dgate, dweight = x.new_empty(0), x.new_empty(0)  # two, for an op's outputs must not share memory
    if gate is not None:
        g = gate.to(n.dtype)
        weighted = n if weight is None else n * weight
        dgate = torch.ops.aten.silu_backward(weighted.mul(dy), g).to(gate.dtype)
        dy.mul_(silu(g))
    if weight is not None:
        dweight = (dy * n).reshape(-1, n.shape[-1]).sum(0).to(weight.dtype)
        dy.mul_(weight)
    dx = dy.sub_(n * (dy * n).mean(-1, keepdim=True)).mul_(scale)
    return dx.to(x.dtype), dgate, dweight


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), contiguous, and 1 / rms(x)."""
    x = x.to(inner(x)).contiguous()
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return x * scale, scale
