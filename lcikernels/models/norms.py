"""The norms of an LCIConfig: of the stream, and of the heads of q and k."""

from torch import nn
from transformers import PreTrainedConfig

from lcikernels.layers.norm import RMSNorm


def stream_norm(config: PreTrainedConfig) -> nn.Module:
    """Of [.., hidden_size]."""
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps, zero_centered=config.zero_centered_norms)


def head_norm(config: PreTrainedConfig, heads: int, size: int) -> nn.Module:
    """Of [.., heads, size], as qk_norm says."""
    if config.qk_norm is None:
        return nn.Identity()
    D = size if config.qk_norm == "head" else heads * size
    return RMSNorm(D, config.norm_eps, zero_centered=config.zero_centered_norms)
