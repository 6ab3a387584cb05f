"""Families of checkpoints: a table each."""

from collections.abc import Iterable

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from growth.errors import refuse
from growth.families.encoders import ENCODERS
from growth.families.gpt2 import GPT2
from growth.families.gpt_neox import GPT_NEOX
from growth.families.granite_hybrid import GRANITE_HYBRID
from growth.families.lci import LCI
from growth.families.llama import LLAMAS
from growth.families.moe import MOES
from growth.families.retnet import RETNET
from growth.families.t5 import T5
from growth.families.table import Family, Model, classes
from growth.families.vision import DEIT, VIT

FAMILIES = {
    family.model_type: family
    for family in (GPT_NEOX, GPT2, *LLAMAS, *MOES, GRANITE_HYBRID, RETNET, *ENCODERS, T5, VIT, DEIT, LCI)
}


def family_of(config: PreTrainedConfig, where: str) -> Family:
    """The family of a checkpoint, or a refusal that names all."""
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    remedy = "growth train and growth check take causal language models as they are, other verbs once "
    remedy += "CONTRIBUTING.md's table is written"
    raise refuse(where, f"a checkpoint of one of: {', '.join(FAMILIES)}", config.model_type, remedy)


def model_of(config: PreTrainedConfig, names: Iterable[str]) -> Model | None:
    """A checkpoint with these tensors, seen through its family; None where no family knows it."""
    family = FAMILIES.get(config.model_type)
    return family and family.model(config, family.parts_of(config, names))


AUTOS = (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForImageClassification,
    AutoModelForTextEncoding,
    AutoModel,
)


def auto_of(config: PreTrainedConfig) -> type:
    """The auto class of the class that config.json names; that of causal models where it names none."""
    named = (getattr(config, "architectures", None) or [""])[0]
    for auto in AUTOS:
        if named in [x.__name__ for x in classes(auto, config)]:
            return auto
    return AutoModelForCausalLM
