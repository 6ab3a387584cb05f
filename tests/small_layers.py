"""A small layer of each kind, with weights that all matter."""

from collections.abc import Callable

import torch
from torch import nn

from lcikernels.layers import LightningAttention, Mamba, Mamba2, Retention

SIZE = 24
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Mamba": lambda **place: Mamba(SIZE, 5, time_step_rank=3, bias=True, **place),
    "Mamba-2": lambda **place: Mamba2(SIZE, 5, head_dim=8, num_groups=2, conv_bias=False, **place),
    "retention": lambda **place: Retention(
        SIZE, 4, num_kv_heads=2, rotary_dims=4, norm_weight=True, bias=True, **place
    ),
    "retention that learns": lambda **place: Retention(
        SIZE, 4, expand_k=4 / 3, expand_v=4 / 3, learned_decay=True, qk_norm="head", out_bias=True, **place
    ),
    "retention without positions": lambda **place: Retention(
        SIZE, 6, num_kv_heads=3, rotary_dims=0, qk_norm="all", zero_centered_norms=True, **place
    ),
    "lightning attention": lambda **place: LightningAttention(
        SIZE, 3, 5, layer_idx=1, num_layers=4, norm_eps=1e-5, **place
    ),
}


def layer_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """No bias is 0 and no gain 1; matrices are wide enough for what they compute to show."""
    layer = LAYERS[name](dtype=dtype)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(torch.randn_like(weight) / 4)
    return layer
