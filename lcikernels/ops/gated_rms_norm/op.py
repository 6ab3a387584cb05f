"""The gated RMS norm: contract, dispatcher entry, autograd formula, backends."""

import torch
from torch import Tensor

from ... import backends, extension
from .. import checks
from ..library import define, differentiate, refuse_gradients

OP = "gated_rms_norm"

backends.table(
    OP,
    {
        "cpp": backends.Backend("lcikernels.ops.gated_rms_norm.cpp", extension.on_cpu),
        "triton": backends.Backend("lcikernels.ops.gated_rms_norm.kernel", backends.on_gpu),
        "torch": backends.Backend("lcikernels.ops.gated_rms_norm.plain", backends.anywhere),
    },
)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """RMS norm over the last axis, times a gate.

        y = x / sqrt(mean(x²) + eps) * weight * silu(gate)

    x [..., D] and gate of the same shape share one dtype: float32, float64, bfloat16 or float16; weight [D]
    of any floating dtype; a missing gate or weight is left out of the product. Returns y like x. Gradients
    reach x, gate, weight. Raises ValueError where a shape, dtype or device does not fit, RuntimeError where
    `backend` cannot run.
    """
    sizes = {}
    axes = " ".join([*(f"axis{i}" for i in range(checks.axes(OP, "x", x) - 1)), "D"])
    checks.shape(OP, "x", x, axes, sizes)
    if gate is not None:
        checks.shape(OP, "gate", gate, axes, sizes)
    if weight is not None:
        checks.shape(OP, "weight", weight, "D", sizes)
    checks.activations(OP, x=x, gate=gate)
    checks.parameters(OP, x, weight=weight)
    return torch.ops.lcikernels.gated_rms_norm(x, gate, weight, eps, backends.choose(OP, backend, x))


def _forward_fake(x, gate, weight, eps, backend):
    return x.new_empty(x.shape)


def _backward_fake(grad_y, x, gate, weight, eps, backend):
    return tuple(x.new_empty(0) if u is None else u.new_empty(u.shape) for u in (x, gate, weight))


define(
    "gated_rms_norm(Tensor x, Tensor? gate, Tensor? weight, float eps, str backend) -> Tensor",
    backends.hand_over(OP, "forward"),
    _forward_fake,
)
define(
    "gated_rms_norm_backward(Tensor grad_y, Tensor x, Tensor? gate, Tensor? weight, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    backends.hand_over(OP, "backward"),
    _backward_fake,
)


def _setup(ctx, inputs, output):
    x, gate, weight, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, gate, weight)


def _autograd(ctx, grad_y):
    x, gate, weight = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    dx, dgate, dweight = torch.ops.lcikernels.gated_rms_norm_backward(
        grad_y, x, gate, weight, ctx.eps, ctx.backend
    )
    return dx, None if gate is None else dgate, None if weight is None else dweight, None, None


differentiate(OP, _autograd, _setup)
refuse_gradients("gated_rms_norm_backward")
