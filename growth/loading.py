"""A checkpoint in memory: its model, with every tensor of it, and its own tokenizer."""

import math
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from growth.checkpoint import Checkpoint
from growth.companions import refuse_odd_generation, tokenizer_files
from growth.configuration import quiet
from growth.errors import Refusal, reason, refuse
from growth.families import model_of
from growth.families.table import Model, classes
from growth.hub import resolve

SLACK = 2**26  # entries of buffers, such as masks of all positions


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The language model in `folder`, causal but for the families that are masked.

    Raises Refusal where a tensor is missing, unknown, or of another shape or no float's dtype.
    """
    checkpoint = Checkpoint(folder)
    seen = model_of(checkpoint.config, checkpoint.names)
    checkpoint.refuse_other_dtypes(
        name for name in checkpoint.names if not seen or seen.named(name) is not None
    )
    refuse_odd_generation(checkpoint.path)
    auto = seen.auto if seen else AutoModelForCausalLM
    if not classes(auto, checkpoint.config):
        expected = "a causal language model, or a model of one of growth's families"
        raise refuse(str(folder), expected, checkpoint.config.model_type, "name another checkpoint")
    _refuse_larger(checkpoint, seen)
    try:
        with quiet():
            model, info = auto.from_pretrained(
                checkpoint.path,
                config=checkpoint.config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below
                trust_remote_code=False,
                use_safetensors=True,
                **(_without(seen) if seen else {}),
            )
    except Exception as error:  # of odd settings, whatever the layer that meets them raises
        raise _no_model(folder, error) from error
    remedy = seen.remedy(info["unexpected_keys"]) if seen else "save it with save_pretrained"
    if seen:
        info["unexpected_keys"] = {name for name in info["unexpected_keys"] if seen.named(name)}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = f"{kind} {sorted(map(str, info[kind]))}"
            raise refuse(str(folder), "a tensor for every weight, and no others", names, remedy)
    if seen and seen.family.fused and not _grouped(seen, dtype):
        model.set_experts_implementation("eager")
    return model


def _refuse_larger(checkpoint: Checkpoint, seen: Model | None) -> None:
    """Raises Refusal where a model has more parameters than its file holds entries, by which it is bounded
    before it takes memory. Twice as many are let through, for what is missing has a refusal of its own."""
    entries = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    try:
        with torch.device("meta"), quiet():
            network = on_meta(seen) if seen else AutoModelForCausalLM.from_config(checkpoint.config)
    except Exception as error:
        raise _no_model(checkpoint.path, error) from error
    held = sum(x.numel() for x in (*network.parameters(), *network.buffers()))
    if held > 2 * entries + SLACK:
        expected, got = f"about the {entries:,} parameters of its tensors", f"{held:,} by config.json"
        raise refuse(str(checkpoint.path), expected, got, "check that it belongs to these weights")


def _no_model(folder: str | Path, error: Exception) -> Refusal:
    return refuse(str(folder), "a language model", reason(error), "name another checkpoint")


def _grouped(model: Model, dtype: torch.dtype) -> bool:
    """Can torch multiply all experts' matrices at once? It takes no float64, and rows of whole 16 bytes."""
    sizes = {model.config.hidden_size, getattr(model.config, model.family.fields.ffn)}
    return dtype.itemsize <= 4 and all(size * dtype.itemsize % 16 == 0 for size in sizes)


def on_meta(model: Model) -> PreTrainedModel:
    """A model as load_model makes it, without numbers: the names and shapes of its parameters."""
    with torch.device("meta"), quiet():
        network = model.auto.from_config(model.config, **_without(model))
        table, owner = model.table(), {}
        for name, x in [*network.named_parameters(remove_duplicate=False)]:
            named = model.named(name)
            # A head of its own that this class ties: T5 1.1's is untied where a file has it.
            if named in table and owner.setdefault(id(x), named) != named:
                module, _, own = name.rpartition(".")
                setattr(network.get_submodule(module), own, torch.nn.Parameter(torch.empty_like(x)))
    return network


def _without(model: Model) -> dict[str, bool]:
    """A sentence encoder's file need not have the pooler that its class would make anew."""
    poolerless = model.auto is AutoModel and "pooler" in model.family.parts.keys() - model.parts
    return {"add_pooling_layer": False} if poolerless else {}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's own: without its files transformers would make an empty one of the model's kind."""
    path = resolve(folder)
    if not tokenizer_files(path):
        raise refuse(
            str(folder), "a tokenizer beside the model", "none", "save it there with save_pretrained"
        )
    try:
        with quiet():
            found = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # damaged files raise whatever the parser that meets them does
        remedy = "save it again"
        raise refuse(str(folder), "a tokenizer that transformers can load", reason(error), remedy) from error
    templates = found.chat_template if isinstance(found.chat_template, dict) else {}
    if odd := [name for name in templates if Path(f"{name}.jinja").name != f"{name}.jinja"]:
        got, remedy = reason(ValueError(repr(odd[0]))), "give it another name"  # that of a file, once saved
        raise refuse(f"{folder}: chat_template", "names of files", got, remedy)
    return found
