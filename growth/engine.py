"""What a plan's rows are made by, and the only loop over them.

new[i] = write . (sum_j depth[i, j] old[j]) . read^T
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from growth import apply
from growth.architecture import Architecture, Weight
from growth.checkpoint import by_rows
from growth.families.stored import Entry
from growth.families.table import Model
from growth.maps import Maps
from growth.maps import Row as Mix
from growth.plan import Plan, Recipe, Row, Source, dropped

BLOCK = 2**18  # entries that are made at a time: 1 MB in float32, which stays in a core's cache


def made(plan: Plan, source: Source) -> Iterator[tuple[Row, Iterator[Tensor]]]:
    """Every row with its tensor, in blocks of rows, not rounded yet."""
    for row in plan.rows:
        yield row, row.recipe(source)


@dataclass(frozen=True)
class Copy:
    """A tensor of the source as it is."""

    tensor: str

    def __call__(self, source: Source) -> Iterator[Tensor]:
        return source.checkpoint.blocks(self.tensor)


@dataclass(frozen=True)
class Expand:
    """What the maps make of the weights of one tensor on disk; noise parts the copies."""

    entry: Entry
    layer: int | None
    maps: Maps
    old: Architecture
    new: Architecture
    seed: int

    def __call__(self, source: Source) -> Iterator[Tensor]:
        shape = self.entry.shape(self.new)
        if self.entry.by_rows and math.prod(shape) > BLOCK:
            for weight in self.entry.weights:
                x = self.mixed(source, weight)
                std = self.deviation(x, weight)
                for rows in by_rows(self.new.shape(weight), BLOCK):
                    yield self.entry.to_disk([self.expanded(x, weight, std, rows)])
        else:
            weights = ((weight, self.mixed(source, weight)) for weight in self.entry.weights)
            yield self.entry.to_disk(self.expanded(x, w, self.deviation(x, w)) for w, x in weights)

    def mixed(self, source: Source, weight: Weight) -> Tensor:
        """sum_j depth[i, j] old[j], and behind it the same of what further copies are made of, if that is
        another layer."""
        if self.layer is None:
            return source.raw(weight.name, None)
        x = self.mix(source, weight, self.maps.depth[weight.name][self.layer])
        if row := self.maps.further(weight, self.layer):
            x = torch.cat([x, self.mix(source, weight, row)])
        return self.jittered(apply.exact(x), weight) if self.jitters(weight) else x

    def jitters(self, weight: Weight) -> bool:
        return weight.reads and self.maps.jitter.get(self.layer, 0.0) > 0

    def jittered(self, x: Tensor, weight: Weight) -> Tensor:
        """A copied matrix, off the original by some of its own standard deviations."""
        generator = torch.Generator().manual_seed(named_seed(self.seed, f"copy {weight.name} {self.layer}"))
        noise = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        return torch.add(x, noise, alpha=self.maps.jitter[self.layer] * x.std().item())

    def mix(self, source: Source, weight: Weight, row: Mix) -> Tensor:
        """What a layer is made of."""
        if [w for _, w in row] == [1.0]:
            x = source.raw(weight.name, row[0][0])
        else:
            any_layer = next(j for name, j in source.place if name == weight.name)
            zero = torch.zeros_like(source.read(weight.name, any_layer))
            x = sum((w * source.read(weight.name, j) for j, w in row), zero)
        if constants := self.maps.constants.get(weight.name):
            x = apply.exact(x) + constants[self.layer]
        return x

    def reader(self, weight: Weight) -> Any:
        """The map of what a weight reads, if that grows."""
        return self.maps.of(weight.wires[-1], self.layer) if weight.reads else None

    def deviation(self, x: Tensor, weight: Weight) -> float:
        """The standard deviation of the noise that parts a reader's copies."""
        of = self.reader(weight)
        if of is None or not of.noise:
            return 0.0
        if of.parting != "pairs":
            return self.new.init_std * of.noise
        copies = sum(s >= 0 for s in of.index) / of.sources
        size = torch.linalg.vector_norm(x, dtype=torch.float64).item() / math.sqrt(x.numel())
        return of.noise * size / copies * self.old.scale(weight.name) / weight.scale

    def expanded(self, x: Tensor, weight: Weight, std: float, rows: slice | None = None) -> Tensor:
        """The wide weight, or some of its rows, times what the model no longer multiplies it with."""
        reads = len(weight.wires) - 1 if weight.reads else None
        for axis, wire in enumerate(weight.wires):
            of = self.maps.of(wire, self.layer)
            if axis == 0 and self.maps.further(weight, self.layer):
                of = apply.with_ahead(of)
            part = rows if axis == 0 else None
            if axis == reads:
                x = apply.exact(x)
                x = x if of is None else apply.read(of, x, self.maps.of(weight.wires[0], self.layer), rows)
            elif of is not None:
                x = apply.write(of, x, axis, part)
            elif part:
                x = x[part]
        x, factor = apply.exact(x), self.old.scale(weight.name) / weight.scale
        x = x if factor == 1.0 else x * factor
        if std:
            name = weight.name if self.layer is None else weight.name.format(self.layer)
            name = f"{name}[{rows.start}]" if rows and rows.start else name
            generator = torch.Generator().manual_seed(named_seed(self.seed, name))
            apply.add_noise(self.reader(weight), x, std, generator)
        return x

    def layers(self, weight: Weight) -> list[int | None]:
        """The old layers that take part."""
        if self.layer is None:
            return [None]
        if weight.name in self.maps.mixed:
            stack = self.old.stack_of(weight.name)[1]
            return [j for j, kind in enumerate(stack.kinds) if weight in stack.weights[kind]]
        rows = self.maps.depth[weight.name][self.layer], self.maps.further(weight, self.layer)
        return [j for row in rows for j, _ in row]

    def stays(self, weight: Weight) -> bool:
        """Nothing changes but its place."""
        if any(self.maps.of(wire, self.layer) is not None for wire in weight.wires):
            return False
        if self.layer is not None:
            one = [w for _, w in self.maps.depth[weight.name][self.layer]] == [1.0]
            if not one or weight.name in self.maps.mixed or weight.name in self.maps.constants:
                return False
        return weight.scale == self.old.scale(weight.name) and not self.jitters(weight)


def plan_growth(
    source: Source, target: Model, maps: Maps, seed: int, learned: Callable[[str], Recipe] | None = None
) -> Plan:
    """Where every grown tensor comes from, and what makes it: `learned` gives the recipes of what learns."""
    old, new, rows = source.model.architecture, target.architecture, []
    for name, (entry, layer) in target.table().items():
        expand = Expand(entry, layer, maps, old, new, seed)
        used = [source.where(weight.name, j) for weight in entry.weights for j in expand.layers(weight)]
        sources, note, recipe = tuple(dict.fromkeys(used)), "", expand
        copied = len(sources) == 1 and all(map(expand.stays, entry.weights))
        if copied:
            recipe = Copy(sources[0])
        elif learned:
            recipe = learned(name)
        if not sources:
            value = "one" if any(maps.constants.get(entry.weights[0].name, ())) else "zero"
            note = f"{value}: added layers change nothing at first"
        rows.append(
            Row(
                name,
                entry.shape(new),
                source.dtype(sources or source.tensors(entry.weights)),
                "copied" if copied else "expanded",
                sources,
                note,
                freeze=maps.still is not None and (layer is None or layer in maps.still),
                recipe=recipe,
                block=min(math.prod(entry.shape(new)), BLOCK if copied or entry.by_rows else 2**62),
            )
        )
    return Plan(tuple(rows), dropped(source, rows))


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks that lie in one core's cache: others gain little, and on a busy machine are waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def named_seed(seed: int, name: str) -> int:
    """A seed per tensor, so that one tensor's values depend on nothing but its name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
