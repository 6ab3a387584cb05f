"""Checkpoint families: a two-column table each."""

from transformers import PreTrainedConfig

from growth.adapters.bert import BERT
from growth.adapters.gpt2 import GPT2
from growth.adapters.gpt_neox import GPT_NEOX
from growth.adapters.lci import LCI
from growth.adapters.table import Adapter
from growth.errors import refuse

ADAPTERS = {adapter.model_type: adapter for adapter in (GPT_NEOX, GPT2, BERT, LCI)}


def source_adapter(config: PreTrainedConfig, where: str) -> Adapter:
    """The adapter of a checkpoint that can be grown."""
    adapter = adapter_of(config, where)
    if adapter.describe is None:
        families = ", ".join(name for name, family in ADAPTERS.items() if family.describe)
        raise refuse(
            where,
            f"a checkpoint to start from: {families}",
            config.model_type,
            "grow the model that it was transferred from, then transfer the result",
        )
    return adapter


def adapter_of(config: PreTrainedConfig, where: str) -> Adapter:
    if config.model_type not in ADAPTERS:
        raise refuse(
            where,
            f"a checkpoint of one of: {', '.join(ADAPTERS)}",
            config.model_type,
            "no adapter knows its tensors yet",
        )
    return ADAPTERS[config.model_type]
