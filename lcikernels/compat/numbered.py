"""Sequences that share a row, told by a number for each token: how causal-conv1d and mamba-ssm pack them.

The convolution reads the numbers inside its dispatcher entry: how many sequences there are is in no shape.
"""

import torch
from torch import Tensor

from lcikernels import backends
from lcikernels.compat.indices import begins
from lcikernels.ops import checks
from lcikernels.ops.library import define, differentiate, refuse_gradients

OP = "causal_conv1d_numbered"


def convolve_numbered(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, seq_idx: Tensor
) -> Tensor:
    """`causal_conv1d` of the sequences in x [B, L, D] that seq_idx [B, L] numbers; 0 where it is negative."""
    name = backends.choose("causal_conv1d", None, x)
    return torch.ops.lcikernels.causal_conv1d_numbered(x, weight, bias, activation, seq_idx, name)


def packed(seq_idx: Tensor) -> Tensor:
    """cu_seqlens, int32, of all rows as one."""
    starts = begins(seq_idx).flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_full((1,), seq_idx.numel())]).int()


def one_row(u: Tensor) -> Tensor:
    return u.reshape(1, -1, u.shape[2])


def rows_of(u: Tensor, x: Tensor, seq_idx: Tensor) -> Tensor:
    """u [1, B L, D] as x lies, 0 where there is no sequence."""
    rows = u.view_as(x) if x.shape[0] == 1 else checks.empty_as(x).copy_(u.view(x.shape))
    return rows.masked_fill_((seq_idx < 0)[..., None], 0)


def _forward(x, weight, bias, activation, seq_idx, backend):
    row, cu_seqlens = one_row(x), packed(seq_idx)
    y, _ = backends.load("causal_conv1d", backend).forward(row, weight, bias, activation, None, cu_seqlens)
    return rows_of(y, x, seq_idx)


def _backward(grad_y, x, weight, bias, activation, seq_idx, backend):
    grad_y = one_row(grad_y.masked_fill((seq_idx < 0)[..., None], 0))
    dx, dweight, dbias, _ = backends.load("causal_conv1d", backend).backward(
        grad_y, None, one_row(x), weight, bias, activation, None, packed(seq_idx)
    )
    return rows_of(dx, x, seq_idx), dweight, weight.new_empty(0) if bias is None else dbias


def _forward_fake(x, weight, bias, activation, seq_idx, backend):
    return checks.empty_as(x)


def _backward_fake(grad_y, x, weight, bias, activation, seq_idx, backend):
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return checks.empty_as(x), weight.new_empty(weight.shape), dbias


define(
    "causal_conv1d_numbered(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor seq_idx,"
    " str backend) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    "causal_conv1d_numbered_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, str? activation,"
    " Tensor seq_idx, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.activation, seq_idx, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, seq_idx)


def _autograd(ctx, grad_y):
    x, weight, bias, seq_idx = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    dx, dweight, dbias = torch.ops.lcikernels.causal_conv1d_numbered_backward(
        grad_y, x, weight, bias, ctx.activation, seq_idx, ctx.backend
    )
    return dx, dweight, None if bias is None else dbias, None, None, None


differentiate(OP, _autograd, _setup)
refuse_gradients("causal_conv1d_numbered_backward")
