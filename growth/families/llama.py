"""Llama and those of its frame: RMSNorm, rotary positions, grouped queries, a gated feed-forward block.

Mistral, Qwen2 and 3, Gemma 1 to 3, Phi-3, OLMo-2, Granite and SmolLM3 differ in where norms stand, in norms
of queries and keys, in biases, and in what is fused on disk.
"""

from collections.abc import Callable, Mapping

from transformers import PreTrainedConfig

from growth.architecture import Architecture
from growth.errors import refuse
from growth.families.frames import Frame, decoder
from growth.families.stored import Stored, block
from growth.families.table import Family, Fields, Parts, nothing

BLOCK = {
    "mixer_norm": "input_layernorm",
    "mixer.q": "self_attn.q_proj",
    "mixer.k": "self_attn.k_proj",
    "mixer.v": "self_attn.v_proj",
    "mixer.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
HEAD_NORMS = {"mixer.q_norm": "self_attn.q_norm", "mixer.k_norm": "self_attn.k_norm"}
INSIDE = {"mixer_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
AROUND = INSIDE | {"mlp_norm": "pre_feedforward_layernorm"}
FUSED = {
    ("mixer.q", "mixer.k", "mixer.v"): Stored("self_attn.qkv_proj"),
    ("mlp.gate", "mlp.up"): Stored("mlp.gate_up_proj"),
}
LESS_ONE = ("mixer_norm", "mixer_out_norm", "mlp_norm", "mlp_out_norm", "mixer.q_norm", "mixer.k_norm")


def llama(
    model_type: str,
    modules: Mapping[str | tuple[str, ...], str | Stored] = BLOCK,
    *,
    head_dim: str = "head_dim",
    biases: Callable[[PreTrainedConfig], tuple[bool, bool, bool]] = lambda config: (False, False, False),
    less_one: bool = False,
    accepts: Callable[[PreTrainedConfig], None] = nothing,
    lists: tuple[str, ...] = (),
    norms: str = "before",
    qk_norm: str = "",
) -> Family:
    """A family of this frame. norms, qk_norm: as Frame has them. less_one: gains are stored as g - 1, and the
    embedding is multiplied by the root of the width."""

    def architecture(config: PreTrainedConfig, parts: Parts) -> Architecture:
        D = config.hidden_size
        layer = Frame(
            D,
            config.num_attention_heads,
            config.intermediate_size,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or D // config.num_attention_heads,
            biases=biases(config),
            norms=norms,
            qk_norm=qk_norm,
        )
        return decoder(
            layer,
            vocab=config.vocab_size,
            layers=config.num_hidden_layers,
            tied=config.tie_word_embeddings,
            eps=config.rms_norm_eps,
            init_std=config.initializer_range,
            embed_scale=D**0.5 if less_one else 1.0,
        )

    offset = 1.0 if less_one else 0.0
    stored = {
        key: Stored(disk, offset=offset if key in LESS_ONE else 0.0) if isinstance(disk, str) else disk
        for key, disk in modules.items()
    }
    names = {
        "embed": Stored("model.embed_tokens"),
        "norm": Stored("model.norm", offset=offset),
        "head": Stored("lm_head"),
        **block("model.layers.{}.", stored),
    }
    return Family(
        model_type,
        architecture,
        names,
        Fields(kv_heads="num_key_value_heads", head_dim=head_dim),
        accepts=accepts,
        lists=lists,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    )


def attention_biases(config: PreTrainedConfig) -> tuple[bool, bool, bool]:
    attention = bool(config.attention_bias)
    return attention, attention, bool(getattr(config, "mlp_bias", False))


def both_ways(config: PreTrainedConfig) -> None:
    if config.use_bidirectional_attention:
        raise refuse(
            "use_bidirectional_attention", "a language model", True, "encoders of this kind have no table"
        )


LLAMA = llama("llama", biases=attention_biases)
MISTRAL = llama("mistral")
LAYER_TYPES = ("layer_types",)
QWEN2 = llama("qwen2", biases=lambda config: (True, False, False), lists=LAYER_TYPES)
QWEN3 = llama("qwen3", BLOCK | HEAD_NORMS, biases=attention_biases, qk_norm="unit", lists=LAYER_TYPES)
GEMMA = llama("gemma", biases=attention_biases, less_one=True, accepts=both_ways)
GEMMA2 = llama(
    "gemma2",
    BLOCK | AROUND,
    biases=attention_biases,
    less_one=True,
    accepts=both_ways,
    norms="around",
    lists=LAYER_TYPES,
)
GEMMA3 = llama(
    "gemma3_text",
    BLOCK | AROUND | HEAD_NORMS,
    biases=attention_biases,
    less_one=True,
    accepts=both_ways,
    norms="around",
    qk_norm="unit",
    lists=LAYER_TYPES,
)
PHI3 = llama(
    "phi3",
    {
        name: x
        for name, x in BLOCK.items()
        if not name.startswith(("mixer.q", "mixer.k", "mixer.v", "mlp.gate", "mlp.up"))
    }
    | FUSED,
)
OLMO2 = llama(
    "olmo2",
    {name: disk for name, disk in BLOCK.items() if not name.endswith("_norm")} | INSIDE | HEAD_NORMS,
    biases=attention_biases,
    norms="inside",
    qk_norm="wire",
)
GRANITE = llama("granite", biases=attention_biases)
SMOLLM3 = llama("smollm3", biases=attention_biases, lists=(*LAYER_TYPES, "no_rope_layers"))
LLAMAS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2, GRANITE, SMOLLM3)
