"""The causal convolution: contract, dispatcher entry, autograd formula, backends."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import backends, extension
from .. import checks
from ..library import define, differentiate, refuse_gradients

OP = "causal_conv1d"

backends.table(
    OP,
    {
        "cpp": backends.Backend("lcikernels.ops.causal_conv1d.cpp", extension.on_cpu),
        "triton": backends.Backend("lcikernels.ops.causal_conv1d.kernel", backends.on_gpu),
        "torch": backends.Backend("lcikernels.ops.causal_conv1d.shifted", backends.anywhere),
    },
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A short convolution over time, one filter per channel, that sees no future.

        y[t] = activation(bias + sum_{w<W} weight[:, w] * x[t - (W-1) + w])

    x [B, T, D] float32, float64, bfloat16 or float16; weight [D, W], bias [D] of any floating dtype;
    activation None or "silu". initial_state [B, D, W-1] float32 or 16 bits, or float64 where x is: the tokens
    before the first, the latest last; zeros unless given. cu_seqlens int32 or int64 [N+1], B = 1: sequence n
    is tokens cu_seqlens[n] to cu_seqlens[n+1]; states are [N, D, W-1].

    x may lie in memory as [B, D, T]; y and the gradient of x lie as x.

    Returns y [B, T, D] in x's dtype, with return_final_state also the last W-1 tokens [B or N, D, W-1] in
    float32 (float64 where x is). Gradients reach every floating argument, from y and from the final state.
    Raises ValueError where a shape, dtype or device does not fit, RuntimeError where `backend` cannot run.
    """
    sizes: dict[str, int] = {}
    checks.shape(OP, "x", x, "B T D", sizes)
    S, cu_seqlens = checks.packing(OP, cu_seqlens, x)
    checks.activations(OP, x=x)
    check(OP, x, weight, bias, activation, sizes)
    checks.flags(OP, return_final_state=return_final_state)
    if initial_state is not None:
        axes = "B D W-1" if S is None else "N D W-1"
        checks.shape(OP, "initial_state", initial_state, axes, {**sizes, "N": S})
        checks.states(OP, x, initial_state=initial_state)
        initial_state = initial_state.to(checks.inner(x))
    name = backends.choose(OP, backend, x)
    y, state = torch.ops.lcikernels.causal_conv1d(
        x, weight, bias, activation, initial_state, cu_seqlens, name
    )
    return (y, state) if return_final_state else y


def check(
    op, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, sizes: dict[str, int]
) -> None:
    """Refuse what does not fit x [..., D]; enters W and W-1 in `sizes`."""
    checks.shape(op, "weight", weight, "D W", sizes)
    if bias is not None:
        checks.shape(op, "bias", bias, "D", sizes)
    checks.parameters(op, x, weight=weight, bias=bias)
    checks.one_of(op, "activation", activation, (None, "silu"))
    sizes["W-1"] = sizes["W"] - 1


def _state_fake(x, weight, cu_seqlens):
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(N, x.shape[2], weight.shape[1] - 1, dtype=checks.inner(x))


def _forward_fake(x, weight, bias, activation, initial_state, cu_seqlens, backend):
    return checks.empty_as(x), _state_fake(x, weight, cu_seqlens)


def _backward_fake(grad_y, grad_state, x, weight, bias, activation, initial_state, cu_seqlens, backend):
    dbias = x.new_empty(0, dtype=checks.inner(x)) if bias is None else bias.new_empty(bias.shape)
    return checks.empty_as(x), weight.new_empty(weight.shape), dbias, _state_fake(x, weight, cu_seqlens)


define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? initial_state,"
    " Tensor? cu_seqlens, str backend) -> (Tensor, Tensor)",
    backends.hand_over(OP, "forward"),
    _forward_fake,
)
define(
    "causal_conv1d_backward(Tensor grad_y, Tensor? grad_state, Tensor x, Tensor weight, Tensor? bias,"
    " str? activation, Tensor? initial_state, Tensor? cu_seqlens, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backends.hand_over(OP, "backward"),
    _backward_fake,
)


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.activation, initial_state, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)


def _autograd(ctx, grad_y, grad_state):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    dx, dweight, dbias, dstate = torch.ops.lcikernels.causal_conv1d_backward(
        grad_y, grad_state, x, weight, bias, ctx.activation, initial_state, cu_seqlens, ctx.backend
    )
    dbias = None if bias is None else dbias
    return dx, dweight, dbias, None, None if initial_state is None else dstate, None, None


differentiate(OP, _autograd, _setup)
refuse_gradients("causal_conv1d_backward")


# W multiply-adds a token and channel; the backward pass has two products, for x and for weight.
@register_flop_formula(torch.ops.lcikernels.causal_conv1d)
def _flops(x, weight, *args, **kwargs) -> int:
    B, T, D = x
    return 2 * B * T * D * weight[1]


@register_flop_formula(torch.ops.lcikernels.causal_conv1d_backward)
def _backward_flops(grad_y, grad_state, x, weight, *args, **kwargs) -> int:
    return 2 * _flops(x, weight)
