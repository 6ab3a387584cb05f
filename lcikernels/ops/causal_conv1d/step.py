"""One token of the causal convolution: contract, dispatcher entry, backends."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ... import backends, extension
from .. import checks
from ..library import define, in_place, refuse_vmap
from .op import check

OP = "causal_conv1d_step"

backends.table(
    OP,
    {
        "cpp": backends.Backend("lcikernels.ops.causal_conv1d.cpp", extension.on_cpu),
        "triton": backends.Backend("lcikernels.ops.causal_conv1d.kernel", backends.on_gpu),
        "torch": backends.Backend("lcikernels.ops.causal_conv1d.step", backends.anywhere),
    },
)


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of `causal_conv1d`; `state`, the W-1 tokens before it, is updated in place.

        y = activation(bias + weight · [state, x]);   state <- the last W-1 of [state, x]

    x [B, D], weight [D, W], bias [D], state [B, D, W-1] float32; dtypes and activation as in `causal_conv1d`.
    Returns y [B, D] in x's dtype. For decoding, under torch.no_grad(): it has no gradient.
    Raises ValueError where a shape, dtype or device does not fit, RuntimeError where `backend` cannot run.
    """
    sizes: dict[str, int] = {}
    checks.shape(OP, "x", x, "B D", sizes)
    checks.activations(OP, x=x)
    check(OP, x, weight, bias, activation, sizes)
    checks.shape(OP, "state", state, "B D W-1", sizes)
    checks.full_precision(OP, x, state=state)
    checks.written(OP, state=state)
    checks.no_derivative(OP, x=x, weight=weight, bias=bias, state=state)
    name = backends.choose(OP, backend, x)
    return torch.ops.lcikernels.causal_conv1d_step(x, weight, bias, activation, state, name)


def step(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor) -> Tensor:
    """The step in plain torch."""
    window = torch.cat([state, x.to(state.dtype)[..., None]], -1)  # [B, D, W]
    state.copy_(window[..., 1:])
    y = window.mul_(weight).sum(-1)
    y = y if bias is None else y.add_(bias)
    return silu(y) if activation == "silu" else y


def _step(x, weight, bias, activation, state, backend):
    step = backends.load(OP, backend).step
    return in_place(state, lambda state: step(x, weight, bias, activation, state)).to(x.dtype)


def _step_fake(x, weight, bias, activation, state, backend):
    return x.new_empty(x.shape)


define(
    "causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor(a!) state,"
    " str backend) -> Tensor",
    _step,
    _step_fake,
)
refuse_vmap(OP)
