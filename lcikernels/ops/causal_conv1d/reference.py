"""The causal depthwise convolution as a sum over the W latest tokens."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `lcikernels.ops.causal_conv1d`; computed in the dtype of the inputs."""
    if cu_seqlens is not None:
        parts = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            state = None if initial_state is None else initial_state[n : n + 1]
            options = dict(activation=activation, initial_state=state, return_final_state=True)
            parts.append(causal_conv1d(x[:, start:end], weight, bias, **options))
        y, states = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
        return (y, states) if return_final_state else y

    (B, _, D), W = x.shape, weight.shape[1]
    window = x.new_zeros(B, D, W - 1) if initial_state is None else initial_state
    out = []
    for x_t in x.unbind(1):
        window = torch.cat([window, x_t[..., None]], -1)  # [B, D, W], the latest token last
        out.append((window * weight).sum(-1) + (0 if bias is None else bias))
        window = window[..., 1:]
    y = torch.stack(out, 1) if out else x
    y = silu(y) if activation == "silu" else y
    return (y, window) if return_final_state else y
