"""Fitting mixers on paper: what growth.transferring.align does, on tensors that have no numbers.

Of layers that compute alike one is fitted, in two steps, after which no further one holds more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from growth.costs.paper import of_each_kind
from growth.costs.tape import Tape
from growth.loading import quiet
from growth.training.progress import RunProgress
from growth.transferring.align import Aligning
from growth.transferring.fitted import Fitting, restorable
from growth.transferring.layers import Layers
from growth.transferring.one_mixer import Cost, Steps
from growth.transferring.restoration import Restored
from growth.transferring.starting import Starting


@dataclass(frozen=True)
class Aligned:
    """flops: of all layers, and of scoring them where the data choose some. memory: the most bytes that they
    hold. disk: bytes of the fitted mixers, which lie beside the result until it is whole."""

    layers: int
    steps: int
    windows: int
    T: int
    flops: int
    memory: int
    disk: int

    def __str__(self) -> str:
        how = f"{self.steps} step{'s' * (self.steps > 1)} a layer" if self.steps else "no steps"
        return f"{self.flops:.3g} FLOP, {how}, {self.windows} windows of {self.T} tokens"


def alignment_of(fitting: Fitting, starting: Starting) -> Aligned:
    """What `fitting.run` takes."""
    how, T = fitting.how, fitting.windows.length
    windows = how.windows(len(fitting.windows))
    flops, memory = _run(fitting, starting, windows)
    return Aligned(len(starting.new), how.steps, windows, T, flops, memory, fitting.bytes(starting))


class HollowLayers(Layers):
    """Layers whose weights have shapes and no numbers, under a FakeTensorMode."""

    def tensor(self, name: str) -> Tensor:
        entry, _ = self.table[name]
        stored = torch.zeros(entry.shape(self.weights.model.architecture), dtype=self.config.dtype)
        return stored.to(self.device, self.dtype)


class FewSteps(Steps):
    def windows(self, N: int) -> Iterator[list[int]]:
        """Of the first two: the first one's operations count for all."""
        return islice(super().windows(N), 2)


class OnPaper(Aligning):
    def keep(self, layer: int, mixer: nn.Module) -> None:
        """Nowhere: it has no numbers."""

    def steps(self, size: int, rate: float) -> Steps:
        return FewSteps(**vars(super().steps(size, rate)))


class Scored(Restored):
    """Has the streams of all students from the first layer on, of which one passes a layer for all."""

    def __init__(self, ids: Tensor, starting: Starting, source: Layers):
        super().__init__(ids, restorable(starting))

        def stream() -> Tensor:
            return torch.zeros(*ids.shape, source.config.hidden_size, dtype=source.dtype)

        self.source, self.plain = stream(), stream()
        self.with_layer = {layer: stream() for layer in self.layers}
        self.passes = 0, 0

    def advance(
        self, layer: int, source: Layers, block: nn.Module, target: Layers, own: nn.Module | None
    ) -> None:
        """Notes the operations of a stream in the source's layer, and in the student's own."""
        costs = Cost(), Cost()
        for cost, end, at in zip(costs, (source, target), (block, own or block), strict=True):
            with cost.counted():
                end.run(layer, at, self.plain)
        self.passes = costs[0].flops, costs[1].flops

    def passed(self, passes: tuple[int, int], layer: int, new: bool) -> int:
        """Operations of all streams there, each of which takes one of `passes`: the source's, one whose
        attention is restored, and students with the layer's own mixer, which have the attention of a layer
        before it or none."""
        old, own = passes
        return 2 * old + (sum(i < layer for i in self.layers) + new) * own


def _run(fitting: Fitting, starting: Starting, windows: int) -> tuple[int, int]:
    """Operations, and the most bytes."""
    ends = source, _ = starting.layers(torch.device("cpu"), HollowLayers)
    progress, T = RunProgress("align", 0, silent=True), fitting.windows.length
    with FakeTensorMode(allow_non_fake_inputs=True), quiet(), Tape() as tape:
        aligning = OnPaper(starting, fitting.how, Path(), ends)
        ids = torch.zeros(windows, T, dtype=torch.long)
        stream = source.embed(ids.split(fitting.how.batch_size))
        scored, last = None, max(starting.new)
        if fitting.held_out is not None:
            ids_scored = torch.zeros(len(fitting.held_out), T, dtype=torch.long)
            scored, last = Scored(ids_scored, starting, source), len(starting.config.pattern) - 1
        flops, known = 0, {}
        kinds = [*zip(*(of_each_kind(end.weights.model)[1] for end in ends), strict=True)]
        for layer, kind in enumerate(kinds[: last + 1]):
            if kind not in known:
                before = aligning.flops
                aligning.take(layer, stream, ids, progress, scored)
                known[kind] = aligning.flops - before, scored and scored.passes
            own, passes = known[kind]
            flops += own
            if scored:
                flops += scored.passed(passes, layer, layer in starting.new)
        if scored:
            scored.scores(source)
            flops += scored.cost.flops
    return flops, tape.most
