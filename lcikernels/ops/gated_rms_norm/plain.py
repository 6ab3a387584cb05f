"""The gated RMS norm in plain torch; the backward pass recomputes the norm."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..checks import inner

# An activation, and the gradient of what it is given from that of what it gives.
ACTIVATIONS = {"silu": silu, "sigmoid": torch.sigmoid}
BACKWARD = {
    "silu": torch.ops.aten.silu_backward,
    "sigmoid": lambda grad, gate: torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(gate)),
}


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
    gate = None if gate is None else ACTIVATIONS[activation](gate.to(inner(x)))
    y, _ = normalise(x if gate is None or norm_before_gate else x * gate, x, eps, groups, kind)
    y = y if weight is None else y.mul_(weight)
    y = y if bias is None else y.add_(bias)
    y = y.mul_(gate) if gate is not None and norm_before_gate else y
    return y.to(x.dtype)


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
    dgate, dweight, dbias = (x.new_empty(0) for _ in range(3))  # an op's outputs must not share memory
    after, before = (gate is not None and first == norm_before_gate for first in (True, False))
    g = None if gate is None else gate.to(inner(x))
    value = None if gate is None else ACTIVATIONS[activation](g)
    n, scale = normalise(x * value if before else x, x, eps, groups, kind)
    dn = grad_y.to(n.dtype, copy=True, memory_format=torch.contiguous_format)
    if after:
        ungated = n if weight is None else n * weight
        ungated = ungated if bias is None else ungated + bias
        dgate = BACKWARD[activation](ungated.mul(dn), g).to(gate.dtype)
        dn.mul_(value)
    if bias is not None:
        dbias = dn.reshape(-1, dn.shape[-1]).sum(0).to(bias.dtype)
    if weight is not None:
        dweight = (dn * n).reshape(-1, n.shape[-1]).sum(0).to(weight.dtype)
        dn.mul_(weight)
    n, du = (u.unflatten(-1, (groups, -1)) for u in (n, dn))
    along = (du * n).mean(-1, keepdim=True)
    du = du if kind == "rms" else du.sub_(du.mean(-1, keepdim=True))
    if n.shape[-1] == (1 if kind == "rms" else 2):  # n² = 1 - eps scale²: a difference has only roundings
        du.mul_(eps * scale * scale)
    else:
        du.sub_(n * along)
    dx = du.mul_(scale).flatten(-2)
    if before:
        dgate = BACKWARD[activation](dx * x, g).to(gate.dtype)
        dx.mul_(value)
    return dx.to(x.dtype), dgate, dweight, dbias


def normalise(u: Tensor, like: Tensor, eps: float, groups: int, kind: str) -> tuple[Tensor, Tensor]:
    """The norm of u in the arithmetic of `like`, contiguous, and 1 / rms [..., groups, 1]."""
    u = u.to(inner(like)).contiguous().unflatten(-1, (groups, -1))
    u = u if kind == "rms" else u - u.mean(-1, keepdim=True)
    scale = u.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (u * scale).flatten(-2), scale
