"""How the examples of a step are shared out, and their order: the same steps whatever the processes.

step s learns from      examples order[s G : (s + 1) G]         G = processes x batch_size x accumulation
its n-th batches are    the next `batch_size` of these for each process in turn
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import count, islice

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments


@dataclass(frozen=True)
class Division:
    """How a step's examples are shared out: `batch_size` at a time, on each process, so many times a step."""

    processes: int
    batch_size: int
    gradient_accumulation: int

    @classmethod
    def of(cls, settings: dict) -> "Division":
        return cls(*(settings[field.name] for field in fields(cls)))

    @property
    def examples(self) -> int:
        """A step's."""
        return self.processes * self.batch_size * self.gradient_accumulation

    def among(self, processes: int) -> "Division | None":
        """The same step on another number of processes, in batches no larger than these; None if it does not
        divide."""
        each, rest = divmod(self.examples, processes)
        if rest or not each:
            return None
        size = max(size for size in range(1, self.batch_size + 1) if each % size == 0)
        return Division(processes, size, each // size)

    def enter(self, args: TrainingArguments, settings: dict) -> None:
        settings |= asdict(self)
        args.per_device_train_batch_size = self.batch_size
        args.gradient_accumulation_steps = self.gradient_accumulation


class Order(Sampler):
    """The numbers of `total` examples of `size`, each once before any comes again, shuffled under `seed`."""

    def __init__(self, size: int, total: int, seed: int):
        self.size, self.total, self.seed = size, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return islice(self._endless(), self.total)

    def _endless(self) -> Iterator[int]:
        for epoch in count():
            shuffled = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch))
            for piece in shuffled.split(1 << 16):  # a list of all takes 4 times the memory
                yield from piece.tolist()
