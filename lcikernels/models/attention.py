"""Causal softmax attention, through transformers' attention functions."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lcikernels.layers.rotary import rotate
from lcikernels.models.norms import head_norm


class AttentionWeights(nn.Identity):
    """Passed by the weights [B, H, T, past + T] of one layer, where transformers can record them."""


class Attention(nn.Module):
    """o_proj(softmax(cap(scale q k^T) + mask) v), with q and k normed, if the config says so, and rotated.

    x [B, T, hidden_size]; rotary from `Rotary`, None where nothing rotates; mask from `attention_masks`;
    cache, where given, grows by T keys and values. cap(s) is c tanh(s / c) with an attention_softcap c.
    """

    is_causal = True  # transformers' SDPA function reads it where there is no mask

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        size, (bias, out_bias), (H, Hk, K) = config.hidden_size, config.biases, config.heads_of("A")
        self.num_key_value_groups = H // Hk  # transformers' functions repeat k and v as often
        self.scale = K**-0.5 if config.attention_scale is None else config.attention_scale
        if config.scale_attention_by_layer:
            self.scale /= layer_idx + 1
        self.q_proj = nn.Linear(size, H * K, bias=bias)
        self.k_proj = nn.Linear(size, Hk * K, bias=bias)
        self.v_proj = nn.Linear(size, Hk * K, bias=bias)
        self.o_proj = nn.Linear(H * K, size, bias=out_bias)
        self.q_norm, self.k_norm = head_norm(config, H, K), head_norm(config, Hk, K)
        self.weights = AttentionWeights()

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if self.config.attention_softcap is not None:
            attend = eager_attention  # transformers' sdpa has no cap
        o, weights = attend(self, q, k, v, mask, scaling=self.scale, dropout=0.0)
        if weights is not None:
            self.weights(weights)
        return self.o_proj(o.flatten(2))


def eager_attention(
    module: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """For "eager", and for scores that are capped: q [B, H, T, K], k, v [B, Hk, S, K].

    mask additive, or bool, True at what is seen; None is what it is to transformers' sdpa: a lone token sees
    all, of several each sees as many as it is the how manieth. Returns o [B, T, H, K] and the weights.
    """
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    scores = q @ k.mT * scaling
    if (cap := module.config.attention_softcap) is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights
