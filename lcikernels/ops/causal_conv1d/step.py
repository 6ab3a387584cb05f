"""One token of the causal convolution: contract, dispatcher entry, backends."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ... import backends, extension
from .. import checks, states
from ..library import define, refuse_vmap
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
    state_indices: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of `causal_conv1d`; `state`, the S >= W-1 tokens before it, is updated in place.

        y = activation(bias + weight · the last W of [state, x]);   state <- the last S of [state, x]

    x [B, D], weight [D, W], bias [D]; dtypes and activation as in `causal_conv1d`. state [B, D, S], of any
    strides, float32 or 16 bits, or float64 where x is. With state_indices int32 or int64 [B], state is
    [., D, S] and row b has state[state_indices[b]]; two rows never the same; where it is negative y is 0 and
    no state is touched. With positions int32 or int64 [B] it is circular: token n of a row is in slot n mod
    S, and x is token positions[b]. Returns y [B, D] in x's dtype. For decoding, under torch.no_grad(): it has
    no gradient. Raises ValueError where a shape, dtype or device does not fit, or on a CPU an index (on a GPU
    y is NaN), RuntimeError where `backend` cannot run.
    """
    sizes: dict[str, int] = {}
    checks.shape(OP, "x", x, "B D", sizes)
    checks.activations(OP, x=x)
    check(OP, x, weight, bias, activation, sizes)
    slots = sizes["slots"] = state.shape[2] if checks.axes(OP, "state", state) == 3 else 0
    least = sizes["W-1"] if positions is None else max(sizes["W-1"], 1)
    if slots < least:
        got = f"shape {tuple(state.shape)}"
        checks.refuse(OP, "state", f"[B, D, slots] with slots at least {least}", got)
    states.check(OP, x, state, "B D slots", sizes, state_indices)
    if positions is not None:
        checks.integers(OP, "positions", positions, x, sizes)
    checks.no_derivative(OP, x=x, weight=weight, bias=bias, state=state)
    name = backends.choose(OP, backend, x)
    return torch.ops.lcikernels.causal_conv1d_step(
        x, weight, bias, activation, state, state_indices, positions, name
    )


takes = states.none_as_they_are


def step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor,
    state_indices: None,
    positions: Tensor | None,
) -> Tensor:
    """The step in plain torch."""
    W, now = weight.shape[1], x.to(state.dtype)[..., None]
    if positions is None:
        window = torch.cat([state, now], -1)  # [B, D, slots + 1]
        state.copy_(window[..., 1:])
        window = window[..., -W:]
    else:
        numbers = positions[:, None] + torch.arange(1 - W, 1, device=x.device)  # of the tokens in the window
        slots = (numbers % state.shape[2])[:, None].expand(-1, x.shape[1], W)
        window = torch.cat([state.gather(2, slots[..., :-1]), now], -1)
        state.scatter_(2, slots[..., -1:], now)
    y = window.mul_(weight).sum(-1)
    y = y if bias is None else y.add_(bias)
    return silu(y) if activation == "silu" else y


def _step(x, weight, bias, activation, state, state_indices, positions, backend):
    module = backends.load(OP, backend)

    def step(state, state_indices):
        return module.step(x, weight, bias, activation, state, state_indices, positions)

    return states.in_place(OP, state, state_indices, checks.inner(x), module.takes, step).to(x.dtype)


def _step_fake(x, weight, bias, activation, state, state_indices, positions, backend):
    return x.new_empty(x.shape)


define(
    "causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor(a!) state,"
    " Tensor? state_indices, Tensor? positions, str backend) -> Tensor",
    _step,
    _step_fake,
)
refuse_vmap(OP)
