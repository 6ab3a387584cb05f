"""What a source's configuration says, in the words of LCIConfig."""

from transformers import PreTrainedConfig

from growth.errors import refuse
from lcikernels.models import LCIConfig

SOURCES = ("gpt_neox",)  # what an LCI model has every part of but the mixers
SHARED_SETTINGS = """vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act
    max_position_embeddings layer_norm_eps rope_parameters attention_bias use_parallel_residual
    tie_word_embeddings initializer_range bos_token_id eos_token_id pad_token_id""".split()


def pattern_of(config: PreTrainedConfig) -> str:
    """A letter for each layer, as the source has them."""
    return "A" * config.num_hidden_layers


def lci_config(config: PreTrainedConfig, pattern: str, dtype: str, **fields) -> LCIConfig:
    """The LCI configuration that computes everything but the mixers exactly as the source does."""
    try:
        return LCIConfig(
            pattern=pattern,
            dtype=dtype,
            architectures=["LCIForCausalLM"],
            **{name: getattr(config, name) for name in SHARED_SETTINGS} | fields,
        )
    except ValueError as error:
        raise refuse(
            config.model_type, "settings that an LCI model has too", error, "see config.json"
        ) from error


def left_behind(config: PreTrainedConfig) -> tuple[str, ...]:
    """Settings of the source that take part in training and have no counterpart in an LCI model."""
    return tuple(
        f"{name} {share} of the source is left behind: an LCI model has no dropout"
        for name in ("attention_dropout", "hidden_dropout")
        if (share := getattr(config, name))
    )
