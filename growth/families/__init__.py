"""Families of checkpoints: a table each."""

from difflib import get_close_matches

from transformers import PreTrainedConfig

from growth.errors import refuse
from growth.families.gpt2 import GPT2
from growth.families.gpt_neox import GPT_NEOX
from growth.families.llama import LLAMAS
from growth.families.table import Family

FAMILIES = {family.model_type: family for family in (GPT_NEOX, GPT2, *LLAMAS)}


def family_of(config: PreTrainedConfig, where: str) -> Family:
    """The family of a checkpoint, or a refusal that names the nearest."""
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    near = get_close_matches(config.model_type, FAMILIES, 1, 0.5)
    remedy = f"the nearest is {near[0]}" if near else "no table knows its tensors yet"
    raise refuse(where, f"a checkpoint of one of: {', '.join(FAMILIES)}", config.model_type, remedy)
