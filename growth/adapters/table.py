"""What an adapter is: two columns, names on disk and the weights they hold, read both ways.

A tensor on disk may hold several weights (a fused projection) or one with its axes in another order; its
layout is an einops pattern from the disk to the weights, whose reverse writes it back.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from growth.errors import refuse
from growth.spaces import Architecture, Space, Weight


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: its weights, and the layout from the disk to them ("" where there is one weight, as
    it is).

    A layout that holds several weights puts them on a first axis `part`; `h` is the number of heads.
    """

    weights: tuple[Weight, ...]
    layout: str = ""

    def from_disk(self, x: Tensor, heads: int) -> tuple[Tensor, ...]:
        if not self.layout:
            return (x,)
        x = rearrange(x, self.layout, **self._lengths(heads))
        return tuple(x) if "part" in self.layout else (x,)

    def to_disk(self, parts: Iterable[Tensor], heads: int) -> Tensor:
        parts = tuple(parts)
        if not self.layout:
            return parts[0]
        disk, weights = self.layout.split("->")
        x = torch.stack(parts) if "part" in self.layout else parts[0]
        return rearrange(x, f"{weights}->{disk}", **self._lengths(heads))

    def disk_shape(self, spaces: Mapping[str, Space], heads: int) -> tuple[int, ...]:
        """The shape on disk where the spaces have these sizes."""
        parts = [
            torch.empty([spaces[space].size for space in weight.spaces], device="meta")
            for weight in self.weights
        ]
        return tuple(self.to_disk(parts, heads).shape)

    def _lengths(self, heads: int) -> dict[str, int]:
        return {"h": heads, "part": len(self.weights)} if "part" in self.layout else {}


def one(name: str, *spaces: str, layout: str = "") -> Entry:
    return Entry((Weight(name, spaces),), layout)


PARTS = (("q", "query"), ("k", "key"), ("v", "value"))
QKV = tuple(Weight(f"layers.{{}}.mixer.{part}.weight", (f"{space}.{{}}", "normed")) for part, space in PARTS)
QKV_BIAS = tuple(Weight(f"layers.{{}}.mixer.{part}.bias", (f"{space}.{{}}",)) for part, space in PARTS)


@dataclass(frozen=True)
class Adapter:
    """A family of checkpoints; `model` and `block(config, layer)` map names on disk to entries.

    describe: the architecture that operators see, None where the family is only a target of transfer;
    renamed: names in memory, which some versions write too -> the table's; older: patterns of what older
    files write -> what stands there now; ignored: patterns of what the language model does not use;
    head: of what `model` names, what a tied model's file need not hold -> the tensor that it would repeat;
    auto: the auto class that loads one; ffn, eps: what the configuration calls the neurons of a block and the
    eps of the norms; numbered: its setting, if any, under which a layer's number enters what it computes.
    """

    model_type: str
    model: Callable[[PreTrainedConfig], Mapping[str, Entry]]
    block: Callable[[PreTrainedConfig, int], Mapping[str, Entry]]
    describe: Callable[[PreTrainedConfig, "Adapter"], Architecture] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    older: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    head: Mapping[str, str] = field(default_factory=dict)
    auto: type = AutoModelForCausalLM
    ffn: str = "intermediate_size"
    eps: str = "layer_norm_eps"
    numbered: str = ""

    def outside(self, config: PreTrainedConfig) -> dict[str, Entry]:
        """The tensors outside the layers; a tied head is none."""
        tied = self.head if config.tie_word_embeddings else ()
        return {name: entry for name, entry in self.model(config).items() if name not in tied}

    def table(self, config: PreTrainedConfig) -> dict[str, tuple[Entry, int | None]]:
        """Every tensor of a model: name on disk -> its entry and its layer."""
        rows: dict[str, tuple[Entry, int | None]] = {
            name: (entry, None) for name, entry in self.outside(config).items()
        }
        for layer in range(config.num_hidden_layers):
            rows |= {name.format(layer): (entry, layer) for name, entry in self.block(config, layer).items()}
        return rows

    def written_as(self, config: PreTrainedConfig) -> str:
        """The class whose tensors the table has, as config.json names it."""
        return self.auto._model_mapping[type(config)].__name__

    def weights(self, config: PreTrainedConfig) -> tuple[Weight, ...]:
        """Every weight once, the layered ones by their name with "{}"."""
        entries = [*self.outside(config).values(), *self.block(config, 0).values()]
        return tuple(weight for entry in entries for weight in entry.weights)

    def architecture(
        self, config: PreTrainedConfig, spaces: Mapping[str, Space], post_norm: bool = False
    ) -> Architecture:
        """What `describe` gives, from what the configuration does not call alike everywhere."""
        return Architecture(
            self.weights(config),
            spaces,
            config.num_hidden_layers,
            getattr(config, self.eps),
            config.initializer_range,
            bool(config.tie_word_embeddings),
            post_norm,
        )

    def named(self, name: str) -> str | None:
        """The table's name of a tensor on disk, None where the model does not use it."""
        for pattern, now in self.older.items():
            name = re.sub(pattern, now, name)
        if any(re.fullmatch(pattern, name) for pattern in self.ignored):
            return None
        return self.renamed.get(name, name)

    def match(self, names: Iterable[str], config: PreTrainedConfig, where: str) -> dict[str, str]:
        """Name in the table -> name on disk, or a refusal that lists what is unknown and what is missing."""
        table = self.table(config)
        found = {named: name for name in names if (named := self.named(name)) is not None}
        if config.tie_word_embeddings:
            found = {named: name for named, name in found.items() if named not in self.head}
        unknown, missing = sorted(set(found) - set(table)), sorted(set(table) - set(found))
        if unknown or missing:
            raise refuse(
                where,
                f"the {len(table)} tensors of a {self.model_type} checkpoint",
                f"unknown: {listed(unknown)}, missing: {listed(missing)}",
                "check that config.json belongs to these weights",
            )
        return found


def listed(names: list[str], most: int = 4) -> str:
    """none, or the first few names and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
