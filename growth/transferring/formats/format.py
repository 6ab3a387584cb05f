"""What a format is: a family, what it holds of an LCI model's settings, and these in the family's words."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from transformers import PreTrainedConfig

from growth.families.table import Family
from lcikernels.models import LCIConfig
from lcikernels.models.fields import CACHES


@dataclass(frozen=True)
class Limit:
    """What a format holds of one field of LCIConfig.

    holds     does it hold that of this configuration? A field that computes nothing there is held
    expected  what it holds, in words
    """

    field: str
    holds: Callable[[LCIConfig], bool]
    expected: str


@dataclass(frozen=True)
class Format:
    """What a transferred model is written as.

    family  the table of its tensors, by the names that LCI's has
    limits  of the fields that it does not hold whole
    config  an LCIConfig within the limits -> that of the model written, which computes the same
    notes   what to know of a model of this configuration, a line each
    """

    name: str
    family: Family
    limits: tuple[Limit, ...]
    config: Callable[[LCIConfig], PreTrainedConfig]
    notes: Callable[[LCIConfig], tuple[str, ...]] = lambda config: ()

    def beyond(self, config: LCIConfig) -> tuple[Limit, ...]:
        """The limits that this configuration exceeds."""
        return tuple(limit for limit in self.limits if not limit.holds(config))


def has(config: LCIConfig, letters: Collection[str]) -> bool:
    """Is there a layer of one of these mixers?"""
    return bool({*letters} & {*config.pattern})


def only(field: str, value: object, letters: Collection[str] = tuple(CACHES)) -> Limit:
    """A limit to one value, in models with layers of these mixers."""
    return Limit(
        field, lambda config: getattr(config, field) == value or not has(config, letters), str(value)
    )


# Llama's frame, whatever the mixers are.
FRAME = (
    only("norm", "rms"),
    only("norm_placement", "before"),
    only("zero_centered_norms", False),
    only("use_parallel_residual", False),
    only("gated_mlp", True),
    only("mlp_bias", False),
    Limit("hidden_act", lambda config: config.hidden_act in ("silu", "swish"), "silu"),
    only("qk_norm", None, "AWR"),
    only("final_softcap", None),
)
# The settings that are called alike everywhere.
SHARED = """vocab_size hidden_size num_hidden_layers intermediate_size max_position_embeddings
    initializer_range tie_word_embeddings use_cache bos_token_id eos_token_id pad_token_id dtype""".split()


def shared(config: LCIConfig) -> dict:
    """The values of SHARED."""
    return {name: getattr(config, name) for name in SHARED}
