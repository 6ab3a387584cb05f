"""flash-linear-attention's RetNet, whose type `import fla` makes known; nothing of it is imported here."""

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from growth.families.retnet import RETNET
from growth.transferring.formats.format import FRAME, Format, Limit, only, shared
from lcikernels.layers.retention import log_decays, retnet_log_decay
from lcikernels.models import LCIConfig


@strict
class RetNetConfig(PreTrainedConfig):
    """The fields of fla's by which it computes what an LCI model does. transformers is not told of it."""

    model_type = "retnet"

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    expand_k: float
    expand_v: float
    norm_eps: float
    max_position_embeddings: int
    initializer_range: float
    use_cache: bool
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    attn_mode: str = "chunk"
    hidden_act: str = "swish"
    use_output_gate: bool = True
    elementwise_affine: bool = False
    feature_map: str | None = None
    attn: dict | None = None
    attnres_block_size: int | None = None


def config(model: LCIConfig) -> RetNetConfig:
    """Without a cache, which fla 0.6.0 loses under transformers 5.24: it generates from the last token."""
    H, Hk, size = model.heads_of("R")
    share = H * size / model.hidden_size
    return RetNetConfig(
        **shared(model) | {"use_cache": False},
        architectures=["RetNetForCausalLM"],
        num_heads=H,
        num_kv_heads=Hk,
        expand_k=share,
        expand_v=share,
        norm_eps=model.norm_eps,
    )


def retnets_decays(config: LCIConfig) -> bool:
    H = config.retention_num_heads
    return torch.allclose(log_decays(H, config.retention_log_decay), retnet_log_decay(H), rtol=1e-6, atol=0)


def plain_rope(config: LCIConfig) -> bool:
    found = {"rope_type": "default", "rope_theta": None, "partial_rotary_factor": 1.0} | config.rope_of("R")
    return [*found.values()][:3] == ["default", 10000.0, 1.0]


PATTERN = "layers of R alone, for fla makes none of attention without flash-attn"
LIMITS = (
    *FRAME,
    Limit("pattern", lambda config: {*config.pattern} == {"R"}, PATTERN),
    Limit("attention_bias", lambda config: not config.biases[0], "false"),
    Limit("attention_out_bias", lambda config: not config.biases[1], "false"),
    only("position_embedding_type", "rope"),
    Limit("rope_parameters", plain_rope, "rope_theta 10000 and rope_type default, of whole heads"),
    Limit("no_rope_layers", lambda config: not config.no_rope_layers, "none"),
    only("embedding_scale", 1.0),
    only("residual_scale", 1.0),
    only("logits_scale", 1.0),
    Limit("retention_head_dim", lambda config: config.heads_of("R")[2] <= 256, "at most 256"),
    only("retention_learned_decay", False),
    Limit("retention_log_decay", retnets_decays, "RetNet's, log(1 - 2^(-5-h)) for head h"),
)
FLA = Format("fla", RETNET, LIMITS, config)
