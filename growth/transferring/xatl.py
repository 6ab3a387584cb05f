"""XATL: attention is replaced by a mixer of linear cost, all else is kept.  Choi, 2024 (arXiv 2404.02684).

    copy        copied besides the embeddings, the head and the norms
    "norms"     nothing: mixers and feed-forward blocks start fresh
    "mlp"       the feed-forward blocks
    "output"    + the output projection of each mixer (the default; the paper's best)
    "all"       + queries, keys and values

A layer that stays attention is always copied whole. Mamba has no output projection of the source's shape, so
the source's is dropped there, and the plan says so. A model whose layers all stay attention computes the
source's logits.
"""

import math
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.distributed import is_torchelastic_launched
from transformers import PreTrainedConfig, PreTrainedModel

from growth.checkpoint import Checkpoint
from growth.engine import made, named_seed
from growth.errors import refuse, refuse_odd_seed
from growth.families.lci import LCI
from growth.families.stored import Entry
from growth.families.table import in_modules
from growth.folders import refuse_existing, refuse_too_large
from growth.plan import Plan, Row, Source
from growth.record import new_record
from growth.report import Report
from growth.writing import write_checkpoint
from lcikernels.models import LCIConfig, LCIForCausalLM

SOURCES = ("gpt_neox",)  # what an LCI model has every part of but the mixers
LETTERS = {"attention": "A", "retention": "R", "mamba": "M"}
COPIED = {"norms": (), "mlp": ("mlp",), "output": ("mlp", "o"), "all": ("mlp", "o", "q", "k", "v")}
SHARED_SETTINGS = """vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act
    max_position_embeddings layer_norm_eps rope_parameters attention_bias use_parallel_residual
    tie_word_embeddings initializer_range bos_token_id eos_token_id pad_token_id""".split()


def transfer(
    src: str | Path,
    dst: str | Path,
    *,
    mixers: str = "retention",
    pattern: str | None = None,
    keep_attention: Sequence[int] = (),
    copy: str = "output",
    seed: int = 0,
    dry_run: bool = False,
) -> Report:
    """Transfer the checkpoint `src`, a folder or the Hub's, to an LCI model of its size in folder `dst`.

    mixers          retention | mamba | attention, in every layer
    keep_attention  the layers, from 0, that stay attention
    pattern         instead of both: a letter per layer, A attention, R retention, M Mamba
    copy            norms | mlp | output | all (see above)

    Returns a Report; growth.json in `dst` records the plan. Raises Refusal, with nothing written, where the
    source cannot be read, a mixer, layer or letter does not exist, or `dst` does.
    """
    if is_torchelastic_launched():
        raise refuse("transfer", "one process", "torchrun", "start it without; training takes several")
    refuse_odd_seed(seed)
    if mixers not in LETTERS:
        raise refuse("mixers", f"one of {', '.join(LETTERS)}", mixers, "choose one of these")
    if copy not in COPIED:
        raise refuse("copy", f"one of {', '.join(COPIED)}", copy, "choose one of these")
    if not dry_run:
        refuse_existing(dst)
    began = time.perf_counter()
    checkpoint = Checkpoint(src)
    if checkpoint.config.model_type not in SOURCES:
        raise refuse(
            str(src),
            f"a checkpoint to transfer: {', '.join(SOURCES)}",
            checkpoint.config.model_type,
            "no table leads from its norms and embeddings to an LCI model's yet",
        )
    source = Source(checkpoint)
    stored = source.dtype([source.where("embed.weight", None)])
    config = lci_config(
        checkpoint.config, _pattern(checkpoint.config, mixers, pattern, keep_attention), stored
    )
    with init_empty_weights(include_buffers=False):
        empty = LCIForCausalLM(config)
    empty.tie_weights()
    plan = plan_transfer(source, config, empty, copy, seed)
    lossless = set(config.pattern) == {"A"}
    notes, parameters = _left_behind(checkpoint.config), (source.parameters, plan.parameters)
    if not dry_run:
        refuse_too_large(dst, plan.bytes)
        how = {"parameters": parameters, "pattern": config.pattern, "copy": copy, "seed": seed}
        record = new_record("transfer", "xatl", checkpoint, lossless, plan, notes=notes, **how)
        write_checkpoint(dst, config, made(plan, source), plan.rows, checkpoint, record)
    return Report(
        Path(src),
        None if dry_run else Path(dst),
        f"xatl {config.pattern}",
        lossless,
        time.perf_counter() - began,
        0,
        parameters,
        plan,
        notes,
    )


def _left_behind(config: PreTrainedConfig) -> tuple[str, ...]:
    """Settings of the source that take part in training and have no counterpart in an LCI model."""
    return tuple(
        f"{name} {share} of the source is left behind: an LCI model has no dropout"
        for name in ("attention_dropout", "hidden_dropout")
        if (share := getattr(config, name))
    )


def _pattern(
    config: PreTrainedConfig, mixers: str, pattern: str | None, keep_attention: Sequence[int]
) -> str:
    L = config.num_hidden_layers
    if pattern is None:
        beyond = [layer for layer in keep_attention if not 0 <= layer < L]
        if beyond:
            raise refuse("keep-attention", f"layers from 0 to {L - 1}", beyond[0], "count the layers from 0")
        return "".join("A" if layer in keep_attention else LETTERS[mixers] for layer in range(L))
    if keep_attention:
        raise refuse("pattern", "either a pattern or layers that keep attention", "both", "leave one out")
    if len(pattern) != L or set(pattern) - set(LETTERS.values()):
        raise refuse(
            "pattern",
            f"{L} letters out of {', '.join(LETTERS.values())}",
            repr(pattern),
            "give one letter per layer",
        )
    return pattern


def lci_config(config: PreTrainedConfig, pattern: str, dtype: str) -> LCIConfig:
    """The LCI configuration that computes everything but the mixers exactly as a GPT-NeoX does."""
    try:
        return LCIConfig(
            pattern=pattern,
            dtype=dtype,
            architectures=["LCIForCausalLM"],
            **{name: getattr(config, name) for name in SHARED_SETTINGS},
        )
    except ValueError as error:
        raise refuse(
            config.model_type, "settings that an LCI model has too", error, "see config.json"
        ) from error


def plan_transfer(source: Source, config: LCIConfig, empty: PreTrainedModel, copy: str, seed: int) -> Plan:
    """Where every tensor of the LCI model comes from, and what of the source has no place in it."""
    shapes = {name: tuple(x.shape) for name, x in empty.named_parameters()}
    exact = empty._keep_in_fp32_modules_strict or ()  # rates, which 16 bits would put off
    rows, fresh = [], Fresh(empty, seed)
    for name, (entry, layer) in LCI.model(config).table().items():
        shape, weight = shapes.pop(name), entry.weights[0].name
        letter = None if layer is None else config.pattern[layer]
        if (weight, layer) in source and _copied(weight, letter, copy):
            rows.append(
                Row(
                    name,
                    shape,
                    source.dtype([source.where(weight, layer)]),
                    "copied",
                    (source.where(weight, layer),),
                    freeze=_settled(weight, letter, copy),
                    recipe=Moved(entry, layer),
                    block=math.prod(shape),
                )
            )
        else:
            stored = str(config.dtype).removeprefix("torch.")
            if in_modules(name, exact):
                stored = "float32"
            recipe = partial(fresh, name)
            rows.append(
                Row(name, shape, stored, "initialised", (), "fresh", recipe=recipe, block=math.prod(shape))
            )
    assert not shapes, f"the model has tensors that the table lacks: {sorted(shapes)}"
    taken = {name for row in rows for name in row.sources}
    dropped = {
        source.where(weight, layer): _why(weight, config.pattern[layer])
        for weight, layer in source.place
        if source.where(weight, layer) not in taken
    }
    return Plan(tuple(rows), dropped)


def _copied(weight: str, letter: str | None, copy: str) -> bool:
    """weight: its name, "layers.{}.mixer.q.weight"."""
    if letter is None or "norm" in weight:
        return True
    part = weight.split(".")[-2] if ".mixer." in weight else "mlp"
    return part in COPIED[copy] or (letter == "A" and part != "mlp")


def _settled(weight: str, letter: str | None, copy: str) -> bool:
    """Does XATL hold this copied tensor still at first? A norm before a fresh mixer or MLP learns at once."""
    if letter is None or "norm" not in weight:
        return True
    return (
        "mlp" in COPIED[copy] if "mlp" in weight else letter == "A" or (letter == "R" and "o" in COPIED[copy])
    )


def _why(weight: str, letter: str) -> str:
    if letter == "M" and ".mixer." in weight:
        return "Mamba has no tensor of this role and shape"
    return "starts fresh in this copy mode"


@dataclass(frozen=True)
class Moved:
    """Weights of the source, in the layout of another family's tensor."""

    entry: Entry
    layer: int | None

    def __call__(self, source: Source) -> Iterator[Tensor]:
        yield self.entry.to_disk(source.raw(weight.name, self.layer) for weight in self.entry.weights)


class Fresh:
    """Tensors of a model without weights, as the model itself initialises them, a submodule at a time."""

    def __init__(self, empty: PreTrainedModel, seed: int):
        self.empty, self.seed = empty, seed
        self._made: dict[str, Tensor] = {}

    def __call__(self, name: str, source: Source) -> Iterator[Tensor]:
        if name not in self._made:
            self._made = dict(initialised(self.empty, ".".join(name.split(".")[:4]), self.seed))
        yield self._made[name]


def initialised(empty: PreTrainedModel, path: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one submodule of a model without weights, as the model itself initialises them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(named_seed(seed, path))
        module = deepcopy(empty.get_submodule(path)).to_empty(device="cpu")
        module.apply(empty._init_weights)
    for name, x in module.named_parameters():
        yield f"{path}.{name}", x.detach()
