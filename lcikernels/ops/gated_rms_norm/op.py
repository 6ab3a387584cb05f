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
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = True,
    activation: str = "silu",
    kind: str = "rms",
    backend: str | None = None,
) -> Tensor:
    """RMS norm over the last axis, times a gate.

        y = (norm(x) * weight + bias) * activation(gate)     norm_before_gate
        y = norm(x * activation(gate)) * weight + bias       not norm_before_gate, as in Mamba-2

        norm(u) = u / sqrt(mean(u²) + eps)                   kind "rms"
        norm(u) = v / sqrt(mean(v²) + eps), v = u - mean(u)  kind "layer"

    activation is "silu" or "sigmoid"; each of `groups` parts of the channels, D / groups in a row, has means
    of its own. x [..., D] and gate of the same shape share one dtype: float32, float64, bfloat16 or float16;
    weight, bias [D] of any floating dtype; what is missing is left out of the formula. Returns y like x.
    Gradients reach x, gate, weight, bias. Raises ValueError where a shape, dtype, device or option does not
    fit, RuntimeError where `backend` cannot run.
    """
    sizes = {}
    axes = " ".join([*(f"axis{i}" for i in range(checks.axes(OP, "x", x) - 1)), "D"])
    checks.shape(OP, "x", x, axes, sizes)
    if gate is not None:
        checks.shape(OP, "gate", gate, axes, sizes)
    if weight is not None:
        checks.shape(OP, "weight", weight, "D", sizes)
    if bias is not None:
        checks.shape(OP, "bias", bias, "D", sizes)
    checks.activations(OP, x=x, gate=gate)
    checks.parameters(OP, x, weight=weight, bias=bias)
    if not isinstance(groups, int) or groups < 1 or sizes["D"] % groups:
        checks.refuse(OP, "groups", f"a divisor of D={sizes['D']}", repr(groups))
    checks.flags(OP, norm_before_gate=norm_before_gate)
    checks.one_of(OP, "activation", activation, ("silu", "sigmoid"))
    checks.one_of(OP, "kind", kind, ("rms", "layer"))
    eps = checks.number(OP, "eps", eps, 0.0)
    name = backends.choose(OP, backend, x)
    return torch.ops.lcikernels.gated_rms_norm(
        x, gate, weight, bias, eps, groups, norm_before_gate, activation, kind, name
    )


ARGUMENTS = "Tensor x, Tensor? gate, Tensor? weight, Tensor? bias"
OPTIONS = "float eps, int groups, bool norm_before_gate, str activation, str kind, str backend"


def _forward_fake(x, *others):
    return x.new_empty(x.shape)


def _backward_fake(grad_y, x, gate, weight, bias, *options):
    return tuple(x.new_empty(0) if u is None else u.new_empty(u.shape) for u in (x, gate, weight, bias))


define(f"gated_rms_norm({ARGUMENTS}, {OPTIONS}) -> Tensor", backends.hand_over(OP, "forward"), _forward_fake)
define(
    f"gated_rms_norm_backward(Tensor grad_y, {ARGUMENTS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    backends.hand_over(OP, "backward"),
    _backward_fake,
)


def _setup(ctx, inputs, output):
    tensors, ctx.options = inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad_y):
    tensors = ctx.saved_tensors
    grad_y = torch.zeros_like(tensors[0]) if grad_y is None else grad_y
    grads = torch.ops.lcikernels.gated_rms_norm_backward(grad_y, *tensors, *ctx.options)
    return *(None if u is None else grad for u, grad in zip(tensors, grads)), *[None] * len(ctx.options)


differentiate(OP, _autograd, _setup)
refuse_gradients("gated_rms_norm_backward")
