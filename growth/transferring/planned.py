"""Where every weight of a transferred model comes from, and the plan of the tensors that hold them.

Weights go by the names of growth.families.lci, such as "layers.{}.mixer.q.weight", whatever the source and
whatever the result is written as: `Weights` says of each where it comes from, `plan_transfer` lays them out
as the target's table has them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from growth.expand import BLOCK, Copy, named_seed
from growth.families.lci import LCI
from growth.families.stored import Entry
from growth.families.table import Model, in_modules
from growth.plan import Origin, Plan, Recipe, Row, Source, dropped
from growth.transferring.sources import MIXERS, pattern_of
from lcikernels.models import LCIConfig, LCIForCausalLM

COPIED = {"norms": (), "mlp": ("mlp",), "output": ("mlp", "o"), "all": ("mlp", "o", "q", "k", "v")}


class Made(NamedTuple):
    """What becomes of a weight, the weights of the source's layer that it is made of, what is said of it."""

    origin: Origin
    sources: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Start:
    """How the mixer of one layer starts, where it is not copied weight by weight.

    made: the weights that `make` makes. make: the layer -> these weights by name, not rounded yet.
    """

    made: Mapping[str, Made]
    make: Callable[[int], Mapping[str, Tensor]]


class Weights:
    """Every weight of the model `config` that `source` becomes: where it comes from, and its values.

    copy: as `transfer` has it. starts: of some layers, how their mixers start; what they do not make is
    copied or fresh, as in the other layers.
    """

    def __init__(
        self,
        source: Source,
        config: LCIConfig,
        copy: str,
        seed: int,
        starts: Mapping[int, Start] | None = None,
    ):
        self.source, self.config, self.copy, self.starts = source, config, copy, dict(starts or {})
        self.model = LCI.model(config)
        self.kept = [old == new for old, new in zip(pattern_of(source.config), config.pattern, strict=True)]
        self._fresh = Fresh(self.model, seed)
        self._started: tuple[int | None, Mapping[str, Tensor]] = None, {}

    @property
    def lossless(self) -> bool:
        """Does every layer stay what it is in the source, with all of its weights?"""
        return all(self.kept) and all(self.copied(*key) for key in self._fresh.place)

    def copied(self, weight: str, layer: int | None) -> bool:
        """Is it the source's, as it is there?"""
        return self._copies(weight, layer) and not self._starts(weight, layer)

    def __contains__(self, key: tuple[str, int | None]) -> bool:
        """Has the model such a weight?"""
        return key in self._fresh.place

    def sources(self, weight: str, layer: int | None) -> tuple[str, ...]:
        """The tensors of the source on disk that it is made of; none where it starts fresh."""
        if self.copied(weight, layer):
            return (self.source.where(weight, layer),)
        of = self.made(weight, layer).sources
        return tuple(dict.fromkeys(self.source.where(name, layer) for name in of))

    def made(self, weight: str, layer: int | None) -> Made:
        """What becomes of a weight that is not copied."""
        return self.starts[layer].made[weight] if self._starts(weight, layer) else Made("initialised")

    def note(self, weight: str, layer: int | None) -> str:
        return "" if self.copied(weight, layer) else self.made(weight, layer).note

    def origin(self, weight: str, layer: int | None) -> Origin:
        return "copied" if self.copied(weight, layer) else self.made(weight, layer).origin

    def tensor(self, weight: str, layer: int | None) -> Tensor:
        """Its values, not rounded yet."""
        if not self._starts(weight, layer):
            return (self.source.raw if self._copies(weight, layer) else self._fresh)(weight, layer)
        if self._started[0] != layer:
            self._started = layer, self.starts[layer].make(layer)
        return self._started[1][weight]

    def forget(self) -> None:
        """Let go of what was read or drawn for several weights at once."""
        self.source.forget()
        self._fresh.forget()

    def mixer(self, layer: int) -> list[str]:
        """The names of the weights of a layer's mixer."""
        return [weight.name for weight in self.model.architecture.at("", layer) if of_mixer(weight.name)]

    def settled(self, weight: str, layer: int | None) -> bool:
        """Does XATL hold this weight still at first? A norm before a fresh mixer or MLP learns at once."""
        if not self.copied(weight, layer):
            return False
        if layer is None or "norm" not in weight or self.kept[layer]:
            return True
        with_mlp, with_output = (part in COPIED[self.copy] for part in ("mlp", "o"))
        return with_mlp if ".mlp" in weight else self.config.pattern[layer] == "R" and with_output

    def why_not(self, weight: str, layer: int | None) -> str:
        """Why a weight of the source has no place in the model."""
        if not any(found.name == weight for found in self._at(self.model, layer)):
            return f"{MIXERS[self.config.pattern[layer]]} has no tensor of this role and shape"
        if self._starts(weight, layer):
            return "the mixer starts otherwise"
        if self._wanted(weight, layer) and not self._fits(weight, layer):
            return "the target's heads are others"
        return "starts fresh in this copy mode"

    def _starts(self, weight: str, layer: int | None) -> bool:
        return layer in self.starts and weight in self.starts[layer].made

    def _copies(self, weight: str, layer: int | None) -> bool:
        """Where no start makes it, is it the source's?"""
        return (weight, layer) in self.source and self._wanted(weight, layer) and self._fits(weight, layer)

    def _wanted(self, weight: str, layer: int | None) -> bool:
        """Does the copy mode copy it?"""
        if layer is None or "norm" in weight:
            return True
        part = weight.split(".")[-2] if of_mixer(weight) else "mlp"
        return part in COPIED[self.copy] or (self.kept[layer] and part != "mlp")

    def _fits(self, weight: str, layer: int | None) -> bool:
        """Is it there in the model, of the same shape and, where it tells heads apart, for the same heads?"""
        wires = [
            [model.architecture.wires[wire] for wire in found.wires]
            for model in (self.source.model, self.model)
            for found in self._at(model, layer)
            if found.name == weight
        ]
        if len(wires) < 2 or [x.size for x in wires[0]] != [x.size for x in wires[1]]:
            return False
        told_apart = weight.split(".")[-2] in ("q", "k")
        return not told_apart or [x.units for x in wires[0]] == [x.units for x in wires[1]]

    @staticmethod
    def _at(model: Model, layer: int | None):
        return model.architecture.outside if layer is None else model.architecture.at("", layer)


def of_mixer(weight: str) -> bool:
    """Is it a weight inside a layer's mixer, of any kind?"""
    return weight.startswith(("layers.{}.mixer.", "layers.{}.mamba.", "layers.{}.mamba2."))


def plan_transfer(source: Source, target: Model, weights: Weights) -> Plan:
    """Where every tensor of the target comes from, and what of the source has no place in it.

    target: what is written, of any family whose weights have the names that `weights` knows.
    """
    rows = [_row(source, target, weights, name, *at) for name, at in target.table().items()]
    taken = {name for row in rows for name in row.sources}
    left = dropped(source, rows)
    for weight, layer in source.place:
        if (name := source.where(weight, layer)) not in taken:
            left[name] = weights.why_not(weight, layer)
    return Plan(tuple(rows), left)


def _row(source: Source, target: Model, weights: Weights, name: str, entry: Entry, layer: int | None) -> Row:
    names, shape = [weight.name for weight in entry.weights], entry.shape(target.architecture)
    sources = tuple(dict.fromkeys(x for weight in names for x in weights.sources(weight, layer)))
    copied = all(weights.copied(weight, layer) for weight in names)
    dtype = str(weights.config.dtype).removeprefix("torch.")
    if copied:
        dtype = source.dtype(sources)
    # Rates, which 16 bits would put off, whatever the target's class makes of them.
    elif any(in_modules(weight, weights.model.in_float32) for weight in names):
        dtype = "float32"
    whole = copied and _as_it_lies(source, entry, layer)
    draws = len(shape) > 1 and not sources
    recipe: Recipe = Copy(sources[0]) if whole else Moved(entry, layer, weights)
    notes = dict.fromkeys(weights.note(weight, layer) for weight in names)
    made = [origin for weight in names if (origin := weights.origin(weight, layer)) != "initialised"]
    if not any((weight, layer) in weights for weight in names):
        assert all(weight.endswith(".bias") for weight in names), names
        recipe, notes = Zero(shape), {"zero, for the format has it and the model does not": None}
    return Row(
        name,
        shape,
        dtype,
        "copied" if copied else next((origin for origin in made if origin != "copied"), "initialised"),
        sources,
        "; ".join(filter(None, notes)) or ("" if sources else "fresh"),
        freeze=all(weights.settled(weight, layer) for weight in names),
        recipe=recipe,
        block=min(math.prod(shape), BLOCK) if whole else math.prod(shape),
        drawn=math.prod(shape) if draws else 0,
    )


def _as_it_lies(source: Source, entry: Entry, layer: int | None) -> bool:
    """Are the bytes on disk the same, so that they are copied in blocks?"""
    held = source.table[source.place[entry.weights[0].name, layer][0]][0]
    plain = [len(x.weights) == 1 and x.by_rows for x in (entry, held)]
    return all(plain) and entry.offset == held.offset


@dataclass(frozen=True)
class Moved:
    """Weights in the layout of the target's tensor."""

    entry: Entry
    layer: int | None
    weights: Weights = field(repr=False)

    def __call__(self, source: Source) -> Iterator[Tensor]:
        yield self.entry.to_disk(self.weights.tensor(x.name, self.layer) for x in self.entry.weights)


@dataclass(frozen=True)
class Zero:
    """A bias that adds nothing."""

    shape: tuple[int, ...]

    def __call__(self, source: Source) -> Iterator[Tensor]:
        yield torch.zeros(self.shape)


class Fresh:
    """Weights of an LCI model as the model itself initialises them, a submodule at a time."""

    def __init__(self, model: Model, seed: int):
        self.model, self.seed = model, seed
        with init_empty_weights(include_buffers=False):
            self.empty = LCIForCausalLM(model.config)
        self.place = {
            (weight.name, layer): (name, entry, part)
            for name, (entry, layer) in model.table().items()
            for part, weight in enumerate(entry.weights)
        }
        self._made: dict[str, Tensor] = {}

    def __call__(self, weight: str, layer: int | None) -> Tensor:
        name, entry, part = self.place[weight, layer]
        if name not in self._made:
            self._made = dict(initialised(self.empty, ".".join(name.split(".")[:4]), self.seed))
        return entry.from_disk(self._made[name])[part]

    def forget(self) -> None:
        self._made = {}


def initialised(empty: PreTrainedModel, path: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one submodule of a model without weights, as the model itself initialises them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(named_seed(seed, path))
        module = deepcopy(empty.get_submodule(path)).to_empty(device="cpu")
        module.apply(empty._init_weights)
    for name, x in module.named_parameters():
        yield f"{path}.{name}", x.detach()
