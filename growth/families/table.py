"""What a family is: an architecture, and two columns of names that are read both ways."""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from growth.architecture import Architecture, Weight
from growth.errors import refuse
from growth.families.stored import Entry, Stored

Parts = frozenset[str]


@dataclass(frozen=True)
class Fields:
    """What a configuration calls its sizes. layers: one for each stack. kv_heads, head_dim: "" where heads
    are all alike, and where their size follows from the width."""

    hidden: str = "hidden_size"
    layers: tuple[str, ...] = ("num_hidden_layers",)
    heads: str = "num_attention_heads"
    kv_heads: str = ""
    head_dim: str = ""
    ffn: str = "intermediate_size"


def all_positions(config: PreTrainedConfig) -> int | None:
    """What the configuration says. Rotary positions compute on, but what attention makes of them was never
    trained."""
    return getattr(config, "max_position_embeddings", None)


def nothing(config: PreTrainedConfig) -> None:
    """Every setting is computed."""


@dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    architecture  of a configuration and the parts that a checkpoint has
    names         weights' modules, several where they are fused, or one weight -> how they lie on disk; "#"
                  stands on both sides for a number beside the layer's, an expert's
    fields        the sizes' names in the configuration
    parts         what a checkpoint may have or not -> the tensors by which it is known, those with "!" by
                  their absence
    auto          the auto class of a checkpoint with these parts
    positions     the tokens that a model is made for at most, None where there is no such number
    probe         the kind of input that a model takes: tokens | masked | pairs | images, see growth.probes
    accepts       refuses what the architecture does not compute
    lists         fields with an entry for each layer, which follow the order of layers
    layer_numbers fields that list some layers by their numbers, which follow it too
    spelled       fields that say layer by layer what others say by a rule that the order would break
    resized       further fields that follow from the sizes: (old configuration, new one) -> their values
    tied          tensors that a tied model's file need not hold -> the one that they would repeat
    memory        patterns of names in memory, which some versions write too -> the table's names
    fused         patterns of the table's names -> the parameter in memory that such tensors are parts of
    older         patterns of what older files write -> what stands there now
    ignored       patterns of what the model does not use
    surplus       of some parts, or classes that config.json names, patterns of what they do not use
    bare          the prefix that a model without a head leaves out of its names
    plain         config.json as transformers writes it -> the same in words that others read too
    by_unit       of a configuration, lists that all layers share: field -> the wire whose units it numbers,
                  and the list spelled out
    numbered      the setting, if any, under which a layer's number enters what it computes
    """

    model_type: str
    architecture: Callable[[PreTrainedConfig, Parts], Architecture]
    names: Mapping[str | tuple[str, ...], Stored]
    fields: Fields = Fields()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    auto: Callable[[Parts], type] = lambda parts: AutoModelForCausalLM
    positions: Callable[[PreTrainedConfig], int | None] = all_positions
    probe: str = "tokens"
    accepts: Callable[[PreTrainedConfig], None] = nothing
    lists: tuple[str, ...] = ()
    layer_numbers: tuple[str, ...] = ()
    spelled: Callable[[PreTrainedConfig], Mapping[str, Any]] = lambda config: {}
    resized: Callable[[PreTrainedConfig, PreTrainedConfig], Mapping[str, Any]] = lambda old, new: {}
    tied: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    older: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    surplus: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bare: str = ""
    plain: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields
    by_unit: Callable[[PreTrainedConfig], Mapping[str, tuple[str, list]]] = lambda config: {}
    numbered: str = ""

    def named(self, name: str) -> str | None:
        """The table's name of a tensor on disk, None where the model does not use it."""
        for pattern, now in (self.older | self.memory).items():
            name = re.sub(pattern, now, name)
        return None if _fits(name, self.ignored) else name

    def parts_of(self, config: PreTrainedConfig, names: Iterable[str]) -> Parts:
        """What a checkpoint with these tensors has."""
        found = {self.named(name) for name in names}
        unused = self.unused(config, self._parts(found))
        return self._parts({name for name in found if not _fits(name, unused)})

    def unused(self, config: PreTrainedConfig, parts: Parts) -> tuple[str, ...]:
        """Patterns of what a model of this class, with these parts, does not use."""
        has = {*parts, *(getattr(config, "architectures", None) or ())}
        return tuple(name for known, names in self.surplus.items() if known in has for name in names)

    def _parts(self, found: Container[str | None]) -> Parts:
        return frozenset(
            part
            for part, tensors in self.parts.items()
            if all((name[1:] not in found) if name[0] == "!" else (name in found) for name in tensors)
        )

    def model(self, config: PreTrainedConfig, parts: Parts = frozenset()) -> "Model":
        """Raises Refusal where the table does not compute what the configuration says."""
        self.accepts(config)
        return Model(self, config, parts)


class Model:
    """A configuration seen through its family: the architecture, and every tensor on disk."""

    def __init__(self, family: Family, config: PreTrainedConfig, parts: Parts):
        self.family, self.config, self.parts = family, config, parts
        self.architecture = family.architecture(config, parts)
        # A model that is its own base has no prefix to tell it by.
        self.bare = family.bare if not parts - {"pooler"} else ""
        own = self._entries(self.architecture.outside)
        self.tied = {name: twin for name, twin in family.tied.items() if name not in own}

    @property
    def auto(self) -> type:
        """The auto class that loads such a checkpoint."""
        return self.family.auto(self.parts)

    @property
    def written_as(self) -> str:
        """The class whose tensors the table has, as config.json names it."""
        named = getattr(self.config, "architectures", None) or []
        names = [x.__name__ for x in classes(self.auto, self.config)]
        return next((name for name in named if name in names), names[0])

    @property
    def in_float32(self) -> tuple[str, ...]:
        """The modules and tensors that it keeps in float32, whatever the dtype of the others."""
        kept = (x._keep_in_fp32_modules_strict for x in classes(self.auto, self.config))
        return tuple(name for names in kept for name in names or ())

    def named(self, name: str) -> str | None:
        """The table's name of a tensor on disk, None where the model does not use it."""
        named = self.family.named(name)
        if _fits(named, self.family.unused(self.config, self.parts)):
            return None
        return named and named.removeprefix(self.bare)

    def modules(self, parameters: Iterable[str]) -> dict[str, str]:
        """Name in the table -> the module in memory that holds it, where parameters have these names."""
        named = ((self.named(name), name) for name in parameters)
        return {own: name.rpartition(".")[0] for own, name in named if own is not None}

    def table(self) -> dict[str, tuple[Entry, int | None]]:
        """Every tensor: name on disk -> its entry and its layer."""
        model = self.architecture
        rows = {name: (entry, None) for name, entry in self._entries(model.outside).items()}
        for stack in model.stacks.values():
            blocks = {kind: self._entries(weights) for kind, weights in stack.weights.items()}
            for layer, kind in enumerate(stack.kinds):
                rows |= {name.format(layer): (entry, layer) for name, entry in blocks[kind].items()}
        return rows

    def _entries(self, weights: Iterable[Weight]) -> dict[str, Entry]:
        """Name on disk, with "{}" for the layer -> the weights that lie there, in their order."""
        lies: dict[str, tuple[Stored, dict[int, Weight]]] = {}
        for weight in weights:
            name, stored, position = self._where(weight.name)
            lies.setdefault(name, (stored, {}))[1][position] = weight
        return {name: self._entry(stored, held) for name, (stored, held) in lies.items()}

    def _entry(self, stored: Stored, held: dict[int, Weight]) -> Entry:
        weights, wires = tuple(held[i] for i in sorted(held)), self.architecture.wires
        layout = stored.layout
        if weights[0].name.endswith(".bias"):
            layout = stored.bias
        lengths = {axis: _length(self.config, name) for axis, name in stored.lengths}
        if "part" in layout:
            lengths |= {"h": wires[weights[0].wires[0]].units, "part": len(weights)}
        sizes = tuple(wires[weight.wires[0]].size for weight in weights)
        offset = 1.0 if stored.less_one and getattr(self.config, stored.less_one) else stored.offset
        return Entry(weights, sizes, layout, tuple(lengths.items()), offset)

    def _where(self, weight: str) -> tuple[str, Stored, int]:
        """The tensor on disk, how it lies there, and the weight's place among those in it."""
        numbered = re.search(r"\.(\d+)\.", weight)
        weight = re.sub(r"\.\d+\.", ".#.", weight)
        module, _, kind = weight.rpartition(".")
        for key, stored in self.family.names.items():
            keys = key if isinstance(key, tuple) else (key,)
            name = stored.name.removeprefix(self.bare)
            name = name.replace("#", numbered[1]) if numbered else name
            if weight in keys:
                return name, stored, keys.index(weight)
            if module in keys:
                return f"{name}.{kind}", stored, keys.index(module)
        raise AssertionError(f"{self.family.model_type}: no tensor holds {weight}")

    def match(self, names: Iterable[str], where: str) -> dict[str, str]:
        """Name in the table -> name on disk, or a refusal that lists what is unknown and what is missing."""
        table = self.table()
        found = {named: name for name in names if (named := self.named(name)) is not None}
        found = {named: name for named, name in found.items() if named not in self.tied}
        unknown, missing = sorted(set(found) - set(table)), sorted(set(table) - set(found))
        if unknown or missing:
            raise refuse(
                where,
                f"the {len(table)} tensors of a {self.family.model_type} checkpoint",
                f"unknown: {listed(unknown)}, missing: {listed(missing)}",
                self.remedy(unknown),
            )
        return found

    def remedy(self, unknown: Iterable[str]) -> str:
        """What to do where these tensors are unknown, or others missing."""
        parts = {part for name in unknown for part in name.split(".")}
        if parts & set(PACKED):
            return "these weights are quantized: restore them to floats first"
        if parts & set(ADAPTED):
            return "merge the adapter into its base model first, with peft's merge_and_unload, and save that"
        named, taken = getattr(self.config, "architectures", None) or [], classes(self.auto, self.config)
        heads = {x.__name__ for auto in CLASSIFIERS for x in classes(auto, self.config)}
        if unknown and (heads - {x.__name__ for x in taken}) & {*named}:
            return f"name a {taken[0].__name__}: this is a {named[0]}, whose head is not taken"
        return "check that config.json belongs to these weights"


CLASSIFIERS = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)

# What the tensors of quantized weights, and of adapters, are called behind their module's name.
PACKED = ("qweight", "qzeros", "scales", "absmax", "quant_map", "weight_packed", "weight_scale", "SCB")
ADAPTED = ("lora_A", "lora_B", "lora_embedding_A", "base_layer")


def classes(auto: type, config: PreTrainedConfig) -> tuple[type, ...]:
    """The model classes that an auto class has for a configuration; none where it has none."""
    found = auto._model_mapping.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


def _fits(name: str | None, patterns: Iterable[str]) -> bool:
    return name is not None and any(re.fullmatch(pattern, name) for pattern in patterns)


def _length(config: PreTrainedConfig, name: str) -> int:
    size = getattr(config, name)
    return size if isinstance(size, int) else size[0]


def in_modules(tensor: str, modules: Iterable[str]) -> bool:
    """Is a tensor one of these, or in one of these modules?"""
    return any(f".{module}." in f".{tensor}." for module in modules)


def listed(names: list[str], most: int = 4) -> str:
    """none, or the first few names and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
