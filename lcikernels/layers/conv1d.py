"""The short convolution in front of a Mamba's recurrence."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lcikernels.layers.state import decodes
from lcikernels.ops import causal_conv1d, causal_conv1d_step


class CausalConv1d(nn.Module):
    """silu(causal_conv1d(x)), depthwise: weight [D, W], bias [D].

    x [B, T, D]; keep [B, T], where given, is False at tokens that are left out as if they were not there, and
    whose result means nothing; cache, where given, holds the last W-1 inputs, which are replaced.
    """

    def __init__(self, D: int, W: int, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.weight = nn.Parameter(torch.empty(D, W))
        self.bias = nn.Parameter(torch.empty(D))

    def forward(self, x: Tensor, keep: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        weight, bias = self.weight, self.bias
        state = None if cache is None else cache.get_conv_state(self.layer_idx)
        if decodes(x, keep, state):
            return causal_conv1d_step(x[:, 0], weight, bias, state=state, activation="silu")[:, None]
        x, state = masked_conv1d(x, weight, bias, keep, state)
        if cache is not None:
            cache.update_conv_state(state, self.layer_idx)
        return x


def masked_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """silu(causal_conv1d) over the kept tokens alone, as if the others were not there.

    x [B, T, D]; keep bool [B, T], None for all; initial_state [B, D, W-1] or None.
    Returns [B, T, D], meaningless where keep is False, and the state [B, D, W-1].
    """
    if keep is None:
        return causal_conv1d(
            x, weight, bias, activation="silu", initial_state=initial_state, return_final_state=True
        )
    B, _, D = x.shape
    W = weight.shape[1]
    past = x.new_zeros(B, W - 1, D) if initial_state is None else initial_state.mT.to(x.dtype)
    x = torch.cat((past, x), dim=1)
    kept = torch.cat((keep.new_ones(B, W - 1), keep), dim=1)
    # Skipped tokens first, then the past, then the kept tokens: each of those has its own W-1 predecessors.
    order = kept.int().argsort(dim=1, stable=True)[..., None].expand(-1, -1, D)
    y, state = causal_conv1d(x.gather(1, order), weight, bias, activation="silu", return_final_state=True)
    return torch.empty_like(y).scatter(1, order, y)[:, W - 1 :], state
