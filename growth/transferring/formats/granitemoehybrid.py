"""Granite 4's hybrids, a class of transformers' own: attention and Mamba-2 in Llama's frame.

vLLM and SGLang serve the type.
"""

import math

from transformers import GraniteMoeHybridConfig

from growth.families.granite_hybrid import GRANITE_HYBRID
from growth.transferring.formats.format import FRAME, Format, Limit, only, shared
from lcikernels.models import LCIConfig


def config(model: LCIConfig) -> GraniteMoeHybridConfig:
    D, expand, (H, Hk, size) = model.hidden_size, int(model.expand), model.heads_of("A")
    heads = model.mamba2_num_heads
    if "S" not in model.pattern:  # nothing is made of these, but they are looked at
        expand = 2
        heads = expand * D // math.gcd(64, expand * D)
    scale = model.attention_scale
    rotates = turning(model) > 0
    own_size = "A" in model.pattern and size * H != D
    return GraniteMoeHybridConfig(
        **shared(model),
        architectures=["GraniteMoeHybridForCausalLM"],
        hidden_act="silu",
        rms_norm_eps=model.norm_eps,
        layer_types=[{"A": "attention", "S": "mamba"}[letter] for letter in model.pattern],
        shared_intermediate_size=model.intermediate_size,
        num_local_experts=0,
        num_experts_per_tok=0,
        num_attention_heads=H,
        num_key_value_heads=Hk,
        attention_bias=any(model.biases),
        attention_multiplier=size**-0.5 if scale is None else scale,
        position_embedding_type="rope" if rotates else None,
        rope_parameters=dict(model.rope_of("A")) if rotates else None,
        embedding_multiplier=model.embedding_scale,
        residual_multiplier=model.residual_scale,
        logits_scaling=1 / model.logits_scale,
        mamba_expand=expand,
        mamba_n_heads=heads,
        mamba_d_head=expand * D // heads,
        mamba_d_state=model.mamba2_state_size,
        mamba_n_groups=model.mamba2_n_groups,
        mamba_d_conv=model.conv_kernel,
        **({"head_dim": size} if own_size else {}),
    )


def turning(config: LCIConfig) -> int:
    """The layers of attention that rotate."""
    return sum(letter == "A" and config.rotates(layer) for layer, letter in enumerate(config.pattern))


def notes(config: LCIConfig) -> tuple[str, ...]:
    H, D = config.num_attention_heads, config.hidden_size
    if "A" not in config.pattern or config.head_dim * H == D:
        return ()
    fits = f"hidden_size / num_attention_heads = {D / H:g}"
    return (f"heads of {config.head_dim}, not {fits}: transformers reads head_dim, vLLM and SGLang do not",)


PATTERN = "layers of A and S, one of A at least"
LIMITS = (
    *FRAME,
    # Of a cache without attention the class asks how long it is, which transformers refuses.
    Limit("pattern", lambda config: "A" in config.pattern and set(config.pattern) <= {"A", "S"}, PATTERN),
    only("attention_softcap", None, "A"),
    only("scale_attention_by_layer", False, "A"),
    Limit(
        "position_embedding_type", lambda config: config.position_embedding_type != "learned", "rope or none"
    ),
    Limit(
        "rope_parameters",
        lambda config: not turning(config) or config.rope_of("A").get("partial_rotary_factor", 1.0) == 1.0,
        "rotary positions of whole heads (partial_rotary_factor 1)",
    ),
    Limit(
        "no_rope_layers",
        lambda config: turning(config) in (0, config.pattern.count("A")),
        "all layers of attention, or none",
    ),
    Limit(
        "expand",
        lambda config: "S" not in config.pattern or config.expand == int(config.expand),
        "a whole number",
    ),
    # The class bounds the steps of whole sequences, but not those of single tokens.
    only("time_step_limit", (0.0, math.inf), "S"),
)
GRANITEMOEHYBRID = Format("granitemoehybrid", GRANITE_HYBRID, LIMITS, config, notes)
