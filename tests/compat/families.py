"""Tiny models of every transformers family that `patch()` reaches, every parameter random."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    NemotronHConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Zamba2Config,
    ZambaConfig,
)

COMMON = dict(vocab_size=61, hidden_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ATTENTION = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=8)

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mamba": lambda: MambaConfig(**COMMON, num_hidden_layers=2, state_size=4),
    "falcon_mamba": lambda: FalconMambaConfig(**COMMON, num_hidden_layers=2, state_size=4),
    "jamba": lambda: JambaConfig(
        **COMMON, **ATTENTION, num_hidden_layers=3, intermediate_size=24, attn_layer_period=3,
        attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, hidden_act="gelu",
    ),
    "zamba": lambda: ZambaConfig(
        **COMMON, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24, num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], mamba_d_state=4, max_position_embeddings=64,
    ),
    "mamba2": lambda: Mamba2Config(
        **COMMON, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=2, state_size=8, chunk_size=8,
        time_step_limit=(0.01, 0.5),
    ),
    "bamba": lambda: BambaConfig(
        **COMMON, **ATTENTION, **MAMBA2, num_hidden_layers=3, intermediate_size=24, attn_layer_indices=[1]
    ),
    "zamba2": lambda: Zamba2Config(
        **COMMON, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24, num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"], mamba_d_state=8, mamba_ngroups=2, n_mamba_heads=4,
        chunk_size=8, max_position_embeddings=64, adapter_rank=4,
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **COMMON, **ATTENTION, head_dim=8, layers_block_type=["mamba", "attention", "mlp", "mamba"],
        intermediate_size=24, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, chunk_size=8,
    ),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **COMMON, **ATTENTION, **MAMBA2, num_hidden_layers=3, intermediate_size=24,
        shared_intermediate_size=24,
        num_local_experts=2, num_experts_per_tok=1, layer_types=["mamba", "attention", "mamba"],
    ),
    "falcon_h1": lambda: FalconH1Config(
        **COMMON, **ATTENTION, **MAMBA2, num_hidden_layers=2, intermediate_size=24, mamba_d_ssm=32,
        mamba_rms_norm=True,
    ),
    "lfm2": lambda: Lfm2Config(
        **COMMON, **ATTENTION, intermediate_size=24, num_hidden_layers=3, block_multiple_of=8,
        layer_types=["conv", "full_attention", "conv"], conv_bias=True,
    ),
}  # fmt: skip

# Those that keep packed sequences apart.
PACKED = ["mamba2", "bamba", "zamba2", "nemotron_h", "granitemoehybrid", "falcon_h1", "lfm2"]


def build(family: str) -> PreTrainedModel:
    """A model in evaluation, the same at every call."""
    torch.manual_seed(len(family))
    model = Auto.from_config(CONFIGS[family](), experts_implementation="eager").eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.dim() > 1 and "A_log" not in name:
            p.normal_(std=(p[0].numel() if p.dim() > 2 else p.shape[-1]) ** -0.5)
        elif "bias" in name:
            p.uniform_(-1, 1)
        else:
            p.uniform_(0.5, 1.5)
