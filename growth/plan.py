"""Every source and target tensor accounted for, before anything is computed."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch

from growth.adapters.table import Adapter, Entry
from growth.errors import refuse
from growth.files import Checkpoint

Origin = Literal["copied", "expanded", "initialised"]


class Source:
    """A checkpoint seen through its adapter: weights by their own names, whatever the layout on disk."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter):
        self.checkpoint, self.adapter, self.config = checkpoint, adapter, checkpoint.config
        table = adapter.table(self.config)
        self.on_disk = adapter.match(checkpoint.names, self.config, str(checkpoint.path))
        self.place = {
            (weight.name, layer): (name, entry, part)
            for name, (entry, layer) in table.items()
            for part, weight in enumerate(entry.weights)
        }
        if adapter.describe is not None:
            self._refuse_other_shapes(table)
        if self.config.tie_word_embeddings:
            self._refuse_another_head()

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

    def _refuse_another_head(self) -> None:
        """A head that is stored beside the embedding and differs from it is one that transformers unties."""
        for name in self.checkpoint.names:
            twin = self.on_disk.get(self.adapter.head.get(self.adapter.named(name)))
            if twin and not torch.equal(self.checkpoint.read(name), self.checkpoint.read(twin)):
                raise refuse(
                    f"{self.checkpoint.path}: {name}",
                    f"the values of {twin}, which config.json ties it to",
                    "others",
                    "set tie_word_embeddings to false there",
                )

    def where(self, weight: str, layer: int | None) -> str:
        """The tensor on disk that holds this weight."""
        return self.on_disk[self.place[weight, layer][0]]

    def dtype(self, weight: str, layer: int | None) -> torch.dtype:
        return self.checkpoint.dtype(self.where(weight, layer))

    def __contains__(self, key: tuple[str, int | None]) -> bool:
        return key in self.place


@dataclass(frozen=True)
class Row:
    """One target tensor on disk and where it comes from; `freeze` asks training to hold it still at first."""

    name: str
    shape: tuple[int, ...]
    origin: Origin
    sources: tuple[str, ...] = ()
    note: str = ""
    freeze: bool = False


@dataclass(frozen=True)
class Plan:
    """rows: every tensor of the target. dropped: every tensor of the source that no row uses, and why."""

    rows: tuple[Row, ...]
    dropped: dict[str, str] = field(default_factory=dict)

    def json(self) -> dict:
        return {"tensors": [asdict(row) for row in self.rows], "dropped": self.dropped}

    def origins(self) -> Counter[Origin]:
        return Counter(row.origin for row in self.rows)
