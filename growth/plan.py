"""Every source and target tensor accounted for, before anything is computed."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Literal

import torch

from growth.adapters.table import Adapter, Entry
from growth.errors import refuse

if TYPE_CHECKING:
    from growth.checkpoint import Checkpoint

Origin = Literal["copied", "expanded", "initialised"]


class Source:
    """A checkpoint seen through its adapter: weights by their own names, whatever the layout on disk."""

    def __init__(self, checkpoint: "Checkpoint", adapter: Adapter):
        self.checkpoint, self.adapter, self.config = checkpoint, adapter, checkpoint.config
        table = adapter.table(self.config)
        self.on_disk = adapter.match(checkpoint.names, self.config, str(checkpoint.path))
        self.place = {
            (weight.name, layer): (name, entry, part)
            for name, (entry, layer) in table.items()
            for part, weight in enumerate(entry.weights)
        }
        checkpoint.refuse_other_dtypes(self.on_disk.values())
        if adapter.describe is not None:
            self._refuse_other_shapes(table)
        self._refuse_other_twins()

    def _refuse_other_shapes(self, table: dict[str, tuple[Entry, int | None]]) -> None:
        spaces = self.adapter.describe(self.config, self.adapter).spaces
        for name, (entry, _) in table.items():
            expected, got = (
                entry.disk_shape(spaces, self.config.num_attention_heads),
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
        tied = self.adapter.head if self.config.tie_word_embeddings else {}
        for name in self.checkpoint.names:
            named = self.adapter.named(name)
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

    def dtype(self, tensors: Iterable[str]) -> str:
        """The dtype that holds the values of all these tensors on disk: that of each where they are alike."""
        kinds = {self.checkpoint.dtype(name) for name in tensors}
        return str(reduce(torch.promote_types, kinds)).removeprefix("torch.")

    @property
    def parameters(self) -> int:
        return sum(math.prod(self.checkpoint.shape(name)) for name in self.on_disk.values())

    def __contains__(self, key: tuple[str, int | None]) -> bool:
        return key in self.place


@dataclass(frozen=True)
class Row:
    """One target tensor on disk and where it comes from; `freeze` asks training to hold it still at first."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    origin: Origin
    sources: tuple[str, ...] = ()
    note: str = ""
    freeze: bool = False


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
        return sum(math.prod(row.shape) * getattr(torch, row.dtype).itemsize for row in self.rows)

    def json(self) -> dict:
        return {"tensors": [asdict(row) for row in self.rows], "dropped": self.dropped}

    def origins(self) -> Counter[Origin]:
        return Counter(row.origin for row in self.rows)
