"""The causal convolution in plain torch: W shifted copies of the tokens, each times its weight."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..checks import inner, laid_as
from ..packing import sequences


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the final state [B or N, D, W-1]."""
    T = x.shape[1]
    if cu_seqlens is not None:
        parts = [
            forward(x[:, cut], weight, bias, activation, state, None)
            for cut, state in sequences("causal_conv1d", cu_seqlens, T, initial_state)
        ]
        return laid_as(torch.cat([y for y, _ in parts], 1), x), torch.cat([state for _, state in parts])
    past = extended(x, weight, initial_state)
    y = convolve(past, weight, bias, T)
    y = silu(y) if activation == "silu" else y
    return laid_as(y, x), past[:, T:].mT.clone(memory_format=torch.contiguous_format)


def backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (empty where it is missing) and the initial state."""
    if cu_seqlens is None:
        dx, dweight, dbias, dstate = gradients(grad_y, grad_state, x, weight, bias, activation, initial_state)
    else:
        parts = []
        for n, (cut, state) in enumerate(sequences("causal_conv1d", cu_seqlens, x.shape[1], initial_state)):
            grad_n = None if grad_state is None else grad_state[n : n + 1]
            parts.append(gradients(grad_y[:, cut], grad_n, x[:, cut], weight, bias, activation, state))
        dx, dweight, dbias, dstate = zip(*parts)
        dx, dweight, dbias = torch.cat(dx, 1), torch.stack(dweight).sum(0), torch.stack(dbias).sum(0)
        dstate = torch.cat(dstate)
    dbias = dbias if bias is None else dbias.to(bias.dtype)
    return laid_as(dx, x), dweight.to(weight.dtype), dbias, dstate


def gradients(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of one sequence, not yet rounded to what they are gradients of."""
    T, W = x.shape[1], weight.shape[1]
    past = extended(x, weight, initial_state)
    dy = grad_y.to(past.dtype)
    if activation == "silu":
        dy = torch.ops.aten.silu_backward(dy, convolve(past, weight, bias, T))
    taps = weight.to(past.dtype).unbind(1)
    dpast = torch.zeros_like(past)
    for i, tap in enumerate(taps):
        dpast[:, i : i + T].addcmul_(dy, tap)
    if grad_state is not None:
        dpast[:, T:] += grad_state.mT
    dweight = torch.stack([(dy * past[:, i : i + T]).sum((0, 1)) for i in range(W)], 1)
    dbias = dy.new_empty(0) if bias is None else dy.sum((0, 1))
    return (
        dpast[:, W - 1 :],
        dweight,
        dbias,
        dpast[:, : W - 1].mT.clone(memory_format=torch.contiguous_format),
    )


def extended(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> Tensor:
    """The W-1 tokens before the first one, then the tokens: [B, W-1+T, D]."""
    B, T, D = x.shape
    W = weight.shape[1]
    past = x.new_empty(B, W - 1 + T, D, dtype=inner(x))
    past[:, : W - 1] = 0 if initial_state is None else initial_state.mT
    past[:, W - 1 :] = x
    return past


def convolve(past: Tensor, weight: Tensor, bias: Tensor | None, T: int) -> Tensor:
    """The convolution before its activation, [B, T, D]."""
    first, *others = weight.to(past.dtype).unbind(1)
    y = past[:, :T] * first
    for i, tap in enumerate(others, 1):
        y.addcmul_(past[:, i : i + T], tap)
    return y if bias is None else y.add_(bias)
