"""Causal softmax attention, as GPT-NeoX computes it, through transformers' attention functions."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lcikernels.layers.rotary import rotate


class AttentionWeights(nn.Identity):
    """Passed by the weights [B, H, T, past + T] of one layer, where transformers can record them."""


class Attention(nn.Module):
    """o_proj(softmax(q k^T / sqrt(head_dim) + mask) v), with rotary positions on the first dims of q and k.

    x [B, T, hidden_size]; rotary from `rotary_angles`; mask from transformers' `create_causal_mask`;
    cache, where given, grows by T keys and values.
    """

    is_causal = True  # transformers' SDPA function reads it where there is no mask

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        size, bias = config.hidden_size, config.attention_bias
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(size, inner, bias=bias)
        self.k_proj = nn.Linear(size, inner, bias=bias)
        self.v_proj = nn.Linear(size, inner, bias=bias)
        self.o_proj = nn.Linear(inner, size, bias=bias)
        self.weights = AttentionWeights()

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, *rotary), rotate(k, *rotary), v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        o, weights = attend(self, q, k, v, mask, scaling=self.head_dim**-0.5, dropout=0.0)
        if weights is not None:
            self.weights(weights)
        return self.o_proj(o.flatten(2))


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """For "eager": q, k, v [B, H, T, K]; mask additive, or bool, True at what is seen.

    Returns o [B, T, H, K] and the weights.
    """
    scores = q @ k.mT * scaling
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights
