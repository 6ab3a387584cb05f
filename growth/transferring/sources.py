"""What a source's configuration says, in the words of LCIConfig: a table for each family of decoders."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedConfig

from growth.errors import Refusal, reason, refuse
from growth.families import FAMILIES
from lcikernels.models import LCIConfig

Says = Mapping[str, str | Callable[[PreTrainedConfig], Any]]
MIXERS = {"A": "attention", "W": "attention with a sliding window", "R": "retention"}
MIXERS |= {"M": "Mamba", "S": "Mamba-2"}


def always(value: Any) -> Callable[[PreTrainedConfig], Any]:
    """What the family never says, for it is the same in all of its models."""
    return lambda config: value


def number(name: str) -> Callable[[PreTrainedConfig], float]:
    return lambda config: float(getattr(config, name))


def full(config: PreTrainedConfig) -> str:
    """The letter of each layer where all attend to everything."""
    return "A" * config.num_hidden_layers


def one_window(config: PreTrainedConfig) -> str:
    """Where all layers have the window, if there is one."""
    return ("A" if config.sliding_window is None else "W") * config.num_hidden_layers


def some_windows(config: PreTrainedConfig) -> str:
    """Where layer_types tells; other fields (use_sliding_window, max_window_layers) have gone into it."""
    letters = {"full_attention": "A", "sliding_attention": "W"}
    for kind in config.layer_types:
        if kind not in letters:
            expected, remedy = " or ".join(letters), "an LCI model's attention has no others"
            raise refuse(f"{config.model_type}: layer_types", expected, kind, remedy)
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        expected = "a number of tokens, for layer_types names sliding_attention"
        raise refuse(f"{config.model_type}: sliding_window", expected, None, "mend config.json")
    return "".join(letters[kind] for kind in config.layer_types)


def mixed(config: PreTrainedConfig) -> str:
    """Where layers are attention or Mamba-2."""
    return "".join({"full_attention": "A", "linear_attention": "S"}[kind] for kind in config.layer_types)


@dataclass(frozen=True)
class Said:
    """How the configurations of one family say it.

    says      LCIConfig's fields -> the field of the same meaning, or what follows from the configuration
    pattern   the letters of the source's own layers
    refused   fields that an LCI model does not compute -> the values that ask for nothing
    dropouts  shares that training drops, which an LCI model never does
    unused    fields that change nothing of what a language model computes
    """

    says: Says
    pattern: Callable[[PreTrainedConfig], str] = full
    refused: Mapping[str, tuple] = field(default_factory=dict)
    dropouts: tuple[str, ...] = ("attention_dropout",)
    unused: tuple[str, ...] = ()


def rotary(config: PreTrainedConfig) -> dict:
    """As it is: of any type, one for all layers or one for each kind."""
    return deepcopy(config.rope_parameters)


def whole_heads(config: PreTrainedConfig) -> dict:
    """The same in families that turn all dims of a head, whatever the share that an entry asks for."""
    found = rotary(config)
    for entry in (found, *found.values()):
        if isinstance(entry, dict):
            entry.pop("partial_rotary_factor", None)
    return found


SAME = """vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act
    max_position_embeddings tie_word_embeddings initializer_range use_cache bos_token_id eos_token_id
    pad_token_id""".split()
EVERY: Says = {name: name for name in SAME}
NEOX = EVERY | {
    "norm_eps": "layer_norm_eps",
    "rope_parameters": rotary,
    "attention_bias": "attention_bias",
    "use_parallel_residual": "use_parallel_residual",
}
GPT2 = EVERY | {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": lambda config: config.n_inner or 4 * config.n_embd,
    "hidden_act": "activation_function",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "position_embedding_type": always("learned"),
    "use_parallel_residual": always(False),
    "attention_scale": lambda config: None if config.scale_attn_weights else 1.0,
    "scale_attention_by_layer": "scale_attn_by_inverse_layer_idx",
}
LLAMA = EVERY | {
    "norm": always("rms"),
    "norm_eps": "rms_norm_eps",
    "gated_mlp": always(True),
    "mlp_bias": always(False),
    "attention_bias": always(False),
    "use_parallel_residual": always(False),
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": lambda config: (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ),
    "rope_parameters": whole_heads,
}
WINDOW: Says = {"sliding_window": "sliding_window"}
BIAS: Says = {"attention_bias": "attention_bias"}
GEMMA = LLAMA | BIAS
GEMMA |= {"zero_centered_norms": always(True), "embedding_scale": lambda config: config.hidden_size**0.5}
GEMMA2 = GEMMA | WINDOW
GEMMA2 |= {
    "hidden_act": "hidden_activation",
    "norm_placement": always("around"),
    "attention_scale": lambda config: config.query_pre_attn_scalar**-0.5,
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}
GRANITE = LLAMA | BIAS | {"mlp_bias": "mlp_bias"}
GRANITE |= {
    "embedding_scale": number("embedding_multiplier"),
    "residual_scale": number("residual_multiplier"),
    "attention_scale": number("attention_multiplier"),
    "logits_scale": lambda config: 1.0 / config.logits_scaling,
}
GRANITE_HYBRID = GRANITE | {
    "mlp_bias": always(False),
    "intermediate_size": "shared_intermediate_size",
    "position_embedding_type": lambda config: config.position_embedding_type or "none",
    "expand": "mamba_expand",
    "mamba2_num_heads": "mamba_n_heads",
    "mamba2_state_size": "mamba_d_state",
    "mamba2_n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "time_step_limit": "time_step_limit",
}
SMOLLM3 = LLAMA | BIAS | WINDOW | {"mlp_bias": "mlp_bias"}
SMOLLM3 |= {
    "no_rope_layers": lambda config: [i for i, turns in enumerate(config.no_rope_layers) if not turns]
}
EVERYBODY_S = {x.name for x in fields(PreTrainedConfig)}
OWN: Says = {x.name: x.name for x in fields(LCIConfig) if x.name not in EVERYBODY_S}

BOTH_WAYS = {"use_bidirectional_attention": (None, False)}
TOLD_BY_LAYER_TYPES = ("use_sliding_window", "max_window_layers")
SOURCES = {
    "gpt_neox": Said(
        NEOX, dropouts=("attention_dropout", "hidden_dropout"), unused=("classifier_dropout", "is_decoder")
    ),
    "gpt2": Said(
        GPT2,
        refused={"add_cross_attention": (False,)},
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        unused=(
            *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
            *("summary_first_dropout", "reorder_and_upcast_attn"),
        ),
    ),
    "llama": Said(LLAMA | BIAS | {"mlp_bias": "mlp_bias"}, unused=("pretraining_tp",)),
    "mistral": Said(LLAMA | WINDOW, one_window),
    "qwen2": Said(
        LLAMA | WINDOW | {"attention_bias": always(True), "attention_out_bias": always(False)},
        some_windows,
        unused=TOLD_BY_LAYER_TYPES,
    ),
    "qwen3": Said(
        LLAMA | WINDOW | BIAS | {"qk_norm": always("head")}, some_windows, unused=TOLD_BY_LAYER_TYPES
    ),
    "gemma": Said(GEMMA, refused=BOTH_WAYS),
    "gemma2": Said(GEMMA2, some_windows, BOTH_WAYS),
    "gemma3_text": Said(GEMMA2 | {"qk_norm": always("head")}, some_windows, BOTH_WAYS),
    "phi3": Said(
        LLAMA | WINDOW | {"rope_parameters": rotary},
        one_window,
        dropouts=("resid_pdrop", "embd_pdrop", "attention_dropout"),
        unused=("original_max_position_embeddings",),  # which has gone into rope_parameters
    ),
    "olmo2": Said(LLAMA | BIAS | {"norm_placement": always("inside"), "qk_norm": always("all")}),
    "granite": Said(GRANITE),
    "granitemoehybrid": Said(
        GRANITE_HYBRID,
        mixed,
        # Of experts and of Mamba-2's biases the table of its tensors takes one value alone.
        unused=(
            *("intermediate_size", "num_local_experts", "num_experts_per_tok", "output_router_logits"),
            *("router_aux_loss_coef", "mamba_conv_bias", "mamba_proj_bias", "mamba_chunk_size"),
            "mamba_d_head",
        ),
    ),
    "smollm3": Said(SMOLLM3, some_windows, unused=("use_sliding_window", "no_rope_layer_interval")),
    "lci": Said(OWN, lambda config: config.pattern, dropouts=()),
}


def said_by(config: PreTrainedConfig, where: str) -> Said:
    """The table of a source's family, or a refusal that says why there is none, and what to pass instead."""
    if config.model_type in SOURCES:
        return SOURCES[config.model_type]
    family, got = FAMILIES.get(config.model_type), config.model_type
    if config.is_encoder_decoder:
        got += ", an encoder and a decoder"
    elif family and family.probe == "masked":
        got += ", an encoder, which reads both ways"
    elif family and family.probe == "images":
        got += ", which reads images"
    expected = f"a decoder out of {', '.join(SOURCES)}"
    raise refuse(where, expected, got, "pass a language model of these, such as a Pythia or a Llama")


def pattern_of(config: PreTrainedConfig) -> str:
    """The letter of each layer as the source has it. Raises Refusal where an LCI model has no such layer."""
    return said_by(config, config.model_type).pattern(config)


def said(config: PreTrainedConfig) -> dict[str, Any]:
    """What a source says of LCIConfig's fields. Raises Refusal, with the field's name, where it computes what
    an LCI model does not."""
    table = said_by(config, config.model_type)
    for name, values in table.refused.items():
        if (got := getattr(config, name)) not in values:
            remedy = "an LCI model does not compute it"
            raise refuse(f"{config.model_type}: {name}", " or ".join(map(str, values)), got, remedy)
    return {
        name: getattr(config, of) if isinstance(of, str) else of(config) for name, of in table.says.items()
    }


def lci_config(config: PreTrainedConfig, pattern: str, dtype: str, **fields: Any) -> LCIConfig:
    """The configuration that computes everything but the mixers, and attention too, exactly as the source.

    pattern: a letter for each layer. fields: of LCIConfig, which the source does not say or not so. Retention
    takes the source's heads, those of keys and values too, unless fields says otherwise.
    Raises Refusal, with the field's name, where the source computes what an LCI model does not, or a field
    does not fit.
    """
    found = said(config)
    if "R" in pattern and "R" not in pattern_of(config):
        found |= retention_heads(found)
    found |= {"pattern": pattern, "dtype": dtype, "architectures": ["LCIForCausalLM"], **fields}
    try:
        return LCIConfig(**found)
    except Exception as error:  # strict dataclasses wrap what their checks raise, or do not
        raise _unfit(config, error) from error


def _unfit(config: PreTrainedConfig, error: Exception) -> Refusal:
    what = reason(error.__cause__ or error)
    return refuse(config.model_type, "settings that an LCI model has too", what, "see config.json")


def retention_heads(found: Mapping[str, Any]) -> dict[str, int]:
    """The heads of retention that take attention's weights as they are."""
    H, D = found["num_attention_heads"], found["hidden_size"]
    return {
        "retention_num_heads": H,
        "retention_head_dim": found.get("head_dim") or D // H,
        "retention_num_kv_heads": found.get("num_key_value_heads") or H,
    }


def left_behind(config: PreTrainedConfig) -> tuple[str, ...]:
    """Settings of the source that take part in training and have no counterpart in an LCI model."""
    return tuple(
        f"{name} {share} of the source is left behind: an LCI model has no dropout"
        for name in said_by(config, config.model_type).dropouts
        if (share := getattr(config, name))
    )
