"""Every source and target tensor accounted for, before anything is computed; the plan is what is executed."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from growth.apply import exact
from growth.architecture import Weight
from growth.errors import refuse
from growth.families import family_of
from growth.families.table import Model, in_modules

if TYPE_CHECKING:
    from growth.checkpoint import Checkpoint

# regrouped: the source's rows in another order, some repeated. fitted: solved for on data. aligned: learned.
Origin = Literal["copied", "expanded", "regrouped", "fitted", "aligned", "initialised"]


class Source:
    """A checkpoint seen through its family: weights by their own names, whatever the layout on disk."""

    def __init__(self, checkpoint: "Checkpoint"):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.family = family_of(checkpoint.config, str(checkpoint.path))
        self.model = self.family.model(
            checkpoint.config, self.family.parts_of(checkpoint.config, checkpoint.names)
        )
        self.table = self.model.table()
        self.on_disk = self.model.match(checkpoint.names, str(checkpoint.path))
        self.place = {
            (weight.name, layer): (name, entry, part)
            for name, (entry, layer) in self.table.items()
            for part, weight in enumerate(entry.weights)
        }
        self._fused: dict[str, tuple[Tensor, ...]] = {}
        checkpoint.refuse_other_dtypes(self.on_disk.values())
        self._refuse_other_shapes()
        self._refuse_other_twins()

    def _refuse_other_shapes(self) -> None:
        for name, (entry, _) in self.table.items():
            expected, got = (
                entry.shape(self.model.architecture),
                self.checkpoint.shape(self.on_disk[name]),
            )
            if got != expected:
                raise refuse(
                    f"{self.checkpoint.path}: {self.on_disk[name]}",
                    f"shape {expected}, as config.json has it",
                    got,
                    "check that config.json belongs to these weights",
                )

    def _refuse_other_twins(self) -> None:
        """Two names for one weight hold the same values: an older name, or a head that is tied."""
        tied = self.model.tied
        for name in self.checkpoint.names:
            named = self.model.named(name)
            twin = self.on_disk.get(tied.get(named, named))
            if twin in (None, name) or torch.equal(self.checkpoint.read(name), self.checkpoint.read(twin)):
                continue
            if named in tied:
                why, remedy = ", which config.json ties it to", "set tie_word_embeddings to false there"
            else:
                why, remedy = ", another name of the same weight", "save the checkpoint again"
            raise refuse(f"{self.checkpoint.path}: {name}", f"the values of {twin}{why}", "others", remedy)

    def where(self, weight: str, layer: int | None) -> str:
        """The tensor on disk that holds this weight."""
        return self.on_disk[self.place[weight, layer][0]]

    def tensors(self, weights: tuple[Weight, ...]) -> list[str]:
        """The tensors on disk that hold these weights, one of each layer."""
        return [self.on_disk[name] for name, (entry, _) in self.table.items() if entry.weights == weights]

    def dtype(self, tensors: Iterable[str]) -> str:
        """The dtype that holds the values of all these tensors on disk: that of each where they are alike."""
        kinds = {self.checkpoint.dtype(name) for name in tensors}
        return str(reduce(torch.promote_types, kinds)).removeprefix("torch.")

    def zeros(self, weight: str, layer: int | None) -> Tensor:
        """As many as `read` gives numbers, of the same dtype; nothing is read for them."""
        name, entry, part = self.place[weight, layer]
        dtype = torch.promote_types(self.checkpoint.dtype(self.on_disk[name]), torch.float32)
        return torch.zeros(self.model.architecture.shape(entry.weights[part]), dtype=dtype)

    def raw(self, weight: str, layer: int | None) -> Tensor:
        """A weight in its own axis order, in the dtype it is stored in."""
        name, entry, part = self.place[weight, layer]
        if name not in self._fused:
            if len(entry.weights) > 1:
                make_room(self._fused)
            parts = entry.from_disk(self.checkpoint.read(self.on_disk[name]))
            if len(parts) == 1:
                return parts[0]
            self._fused[name] = parts
        return self._fused[name][part]

    def forget(self) -> None:
        """Let go of what was read for several weights at once."""
        self._fused.clear()

    def read(self, weight: str, layer: int | None) -> Tensor:
        """The same in float32 at least."""
        return exact(self.raw(weight, layer))

    @property
    def parameters(self) -> int:
        return sum(math.prod(self.checkpoint.shape(name)) for name in self.on_disk.values())

    def __contains__(self, key: tuple[str, int | None]) -> bool:
        return key in self.place


def make_room(fused: dict[str, Any]) -> None:
    """The parts of two fused tensors are kept: those of a projection follow each other, with those of its
    bias between them or not."""
    if len(fused) == 2:
        del fused[next(iter(fused))]


class Recipe(Protocol):
    """What makes a row."""

    def __call__(self, source: Source) -> Iterator[Tensor]:
        """The tensor in its layout on disk, not rounded yet, in blocks of rows."""


@dataclass(frozen=True)
class Row:
    """One target tensor on disk, where it comes from, and the recipe that makes it.

    freeze asks training to hold it still at first. block: the entries that are made at a time. held: bytes of
    the source that are read for it at a time. drawn: random numbers that making it takes;
    of a transfer so many at most.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    origin: Origin
    sources: tuple[str, ...] = ()
    note: str = ""
    freeze: bool = False
    recipe: Recipe | None = field(default=None, compare=False, repr=False)
    block: int = field(default=0, compare=False)
    held: int = field(default=0, compare=False)
    drawn: int = field(default=0, compare=False)

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def json(self) -> dict:
        return {x.name: getattr(self, x.name) for x in fields(self) if x.compare}


@dataclass(frozen=True)
class Plan:
    """rows: every tensor of the target. dropped: every tensor of the source that no row uses, and why."""

    rows: tuple[Row, ...]
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def bytes(self) -> int:
        """What all the tensors take on disk."""
        return sum(row.bytes for row in self.rows)

    @property
    def memory(self) -> int:
        """An estimate of the most that making them holds at a time, in bytes; what learns is not counted.

        That is a block in float32, what it is made of, its noise, what of that is seen, and its source.
        """
        return max(4 * 4 * row.block + (row.held or row.bytes) for row in self.rows)

    def json(self) -> dict:
        return {"tensors": [row.json() for row in self.rows], "dropped": self.dropped}

    def origins(self) -> Counter[Origin]:
        return Counter(row.origin for row in self.rows)


def in_dtype(plan: Plan, target: Model, dtype: str | None) -> Plan:
    """A plan that writes in this dtype, but for what a model keeps in float32; None for the source's own."""
    if dtype is None:
        return plan
    kept = target.in_float32 if getattr(torch, dtype).itemsize < 4 else ()
    rows = (replace(row, dtype="float32" if in_modules(row.name, kept) else dtype) for row in plan.rows)
    return replace(plan, rows=tuple(rows))


def dropped(source: Source, rows: Iterable[Row]) -> dict[str, str]:
    """The tensors of the source that no row uses, and why."""
    used, of_the_model = {name for row in rows for name in row.sources}, set(source.on_disk.values())
    model = source.model

    def why(name: str) -> str:
        if name in of_the_model:
            return "no layer of the target takes it"
        if (twin := model.tied.get(model.named(name))) is not None:
            return f"it repeats {source.on_disk[twin]}"
        return f"a {model.written_as} has none"

    return {name: why(name) for name in source.checkpoint.names if name not in used}
