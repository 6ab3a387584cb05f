"""The configuration of the mixture of experts that a model can become.

What the target's class computes otherwise, or not at all, is refused by the field's name.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from growth.errors import refuse
from growth.families.moe import MOES
from growth.families.table import Family, Model

FAMILY: dict[str, Family] = {family.model_type: family for family in MOES}
BECOMES = {
    "llama": ("mixtral", "qwen2_moe"),
    "mistral": ("mixtral", "qwen2_moe"),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe",),
    **{name: (name,) for name in FAMILY},
}
# Why the types that papers upcycle have no equal start.
WITHOUT = {
    "t5": "switch_transformers, the one such type in transformers, gives a token to one expert, times a "
    "probability below 1, and drops it where expert_capacity is full: no router starts it equal",
    "vit": "transformers has no V-MoE",
    "deit": "transformers has no V-MoE",
}
SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)
Convert = Callable[[int, int, int, int], Model]


def sparse(model: Model, format: str | None) -> Convert:
    """Of experts, how many of them count, shards of each, and every which layer: the target's model.

    Raises Refusal, here or there, where the family has no such target, or the target's class does not compute
    what the source does.
    """
    kind = model.family.model_type
    if kind not in BECOMES:
        remedy = WITHOUT.get(kind, "transformers has no mixture of experts in its frame that is read here")
        raise refuse("upcycle", f"a checkpoint of one of: {', '.join(BECOMES)}", kind, remedy)
    target = format or BECOMES[kind][0]
    if target not in BECOMES[kind]:
        expected, remedy = f"{' or '.join(BECOMES[kind])}, which {kind} becomes", "leave it out"
        raise refuse("format", expected, target, remedy)
    return partial(_more, model) if kind in FAMILY else partial(_upcycled, model, target)


def _more(model: Model, experts: int, top_k: int, granularity: int, every: int) -> Model:
    """The same with more experts."""
    config = copy.deepcopy(model.config)
    config.num_experts, config.num_experts_per_tok = experts, top_k
    return model.family.model(config, model.parts)


def _upcycled(model: Model, target: str, experts: int, top_k: int, granularity: int, every: int) -> Model:
    old = model.config
    if old.intermediate_size % granularity:
        expected = f"a divisor of the {old.intermediate_size} neurons of a block"
        raise refuse("granularity", expected, granularity, "choose a power of two that divides them")
    if every > old.num_hidden_layers:
        raise refuse("every", f"at most the {old.num_hidden_layers} layers", every, "choose fewer")
    given = {name: getattr(old, name) for name in SAME} | {
        "rope_parameters": copy.deepcopy(old.rope_parameters)
    }
    if getattr(old, "head_dim", None):
        given["head_dim"] = old.head_dim
    given["num_experts_per_tok"] = top_k * granularity
    neurons = old.intermediate_size // granularity
    make = {"mixtral": _mixtral, "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe}[target]
    config = make(old, given, experts * granularity, neurons, every)
    return FAMILY[target].model(config)


def _mixtral(
    old: PreTrainedConfig, given: dict[str, Any], experts: int, neurons: int, every: int
) -> PreTrainedConfig:
    _refuse_biases(old, "mixtral", ("attention_bias", "mlp_bias"))
    if every != 1:
        raise refuse("every", "1, for mixtral has experts in every layer", every, "choose format qwen2_moe")
    window = getattr(old, "sliding_window", None)
    return MixtralConfig(**given, num_local_experts=experts, intermediate_size=neurons, sliding_window=window)


def _qwen2_moe(
    old: PreTrainedConfig, given: dict[str, Any], experts: int, neurons: int, every: int
) -> PreTrainedConfig:
    _refuse_biases(old, "qwen2_moe", ("attention_bias", "mlp_bias"))  # its output has no bias
    window, L = _window(old), old.num_hidden_layers
    kinds = getattr(old, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * L
    return Qwen2MoeConfig(
        **given,
        **_routed(old, experts, neurons, every),
        shared_expert_intermediate_size=1,
        qkv_bias=old.model_type == "qwen2",
        layer_types=list(kinds),
        use_sliding_window=bool(window),
        sliding_window=window,
    )


def _qwen3_moe(
    old: PreTrainedConfig, given: dict[str, Any], experts: int, neurons: int, every: int
) -> PreTrainedConfig:
    if len(set(old.layer_types)) > 1:
        got, remedy = ", ".join(old.layer_types), "set it to full_attention where windows were never reached"
        raise refuse("layer_types", "layers alike, for qwen3_moe has one window for all", got, remedy)
    window = old.sliding_window if "sliding_attention" in old.layer_types else None
    return Qwen3MoeConfig(
        **given,
        **_routed(old, experts, neurons, every),
        attention_bias=old.attention_bias,
        use_sliding_window=bool(window),
        sliding_window=window,
    )


def _routed(old: PreTrainedConfig, experts: int, neurons: int, every: int) -> dict[str, Any]:
    return {
        "num_experts": experts,
        "moe_intermediate_size": neurons,
        "intermediate_size": old.intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": every,
        "mlp_only_layers": [],
    }


def _window(old: PreTrainedConfig) -> int | None:
    return getattr(old, "sliding_window", None) or None


def _refuse_biases(old: PreTrainedConfig, target: str, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(old, name, False):
            raise refuse(name, f"false, for {target} has no such biases", True, "no format of these has")
