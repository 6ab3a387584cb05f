"""What makes a tensor: the source's as it is, what the maps make of its weights, or normal numbers.

new[i] = write . (sum_j depth[i, j] old[j]) . read^T
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from growth import apply, fresh
from growth.architecture import Architecture, Weight
from growth.checkpoint import by_rows
from growth.families.stored import Entry
from growth.maps import Copies, Drawn, Maps
from growth.maps import Row as Mix
from growth.plan import Source

BLOCK = 2**18  # entries that are made at a time: 1 MB in float32, which stays in a core's cache


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
                unit = self.unit(x, weight)
                for rows in by_rows(self.new.shape(weight), BLOCK):
                    yield self.entry.to_disk([self.expanded(x, weight, unit, rows)])
        else:
            weights = ((weight, self.mixed(source, weight)) for weight in self.entry.weights)
            yield self.entry.to_disk(self.expanded(x, w, self.unit(x, w)) for w, x in weights)

    def mixed(self, source: Source, weight: Weight) -> Tensor:
        """sum_j depth[i, j] old[j], and behind it the same of what further copies are made of, if that is
        another layer."""
        if self.layer is None:
            return source.raw(self.maps.source(weight.name), None)
        x = self.mix(source, weight, self.maps.depth[weight.name][self.layer])
        if row := self.maps.further(weight, self.layer):
            x = torch.cat([x, self.mix(source, weight, row)])
        return self.set_apart(x, weight)

    def set_apart(self, x: Tensor, weight: Weight) -> Tensor:
        """With what parts it from others that are made of the same, before its units are copied: copies stay
        copies, which readers that are not to see noise rely on."""
        if not (share := self.maps.apart(weight.name, self.layer)):
            return x
        x = apply.exact(x)
        noise = torch.randn(x.shape, dtype=x.dtype, generator=self.generator(weight, None, 1))
        return x + noise * (share * x.std(correction=0).item())

    def mix(self, source: Source, weight: Weight, row: Mix) -> Tensor:
        """What a layer is made of."""
        made_of = self.maps.source(weight.name)
        if [w for _, w in row] == [1.0]:
            x = source.raw(made_of, row[0][0])
        else:
            some = row[0][0] if row else next(j for name, j in source.place if name == made_of)
            zero = source.zeros(made_of, some)
            x = sum((w * source.read(made_of, j) for j, w in row), zero)
        if constants := self.maps.constants.get(weight.name):
            x = apply.exact(x) + constants[self.layer]
        return x

    def reader(self, weight: Weight) -> Any:
        """The map of what a weight reads, if that grows."""
        return self.maps.of(weight.wires[-1], self.layer) if weight.reads else None

    def unit(self, x: Tensor, weight: Weight) -> float:
        """The standard deviation of a unit of the noise that parts a reader's copies, unseen; `x`: what the
        weight is made of."""
        of = self.reader(weight)
        if of is None or not of.noise:
            return 0.0
        if of.parting != "pairs":
            return self.new.init_std
        copies = sum(s >= 0 for s in of.index) / of.sources
        size = torch.linalg.vector_norm(x, dtype=torch.float64).item() / math.sqrt(x.numel())
        scale = self.old.scale(self.maps.source(weight.name)) / weight.scale
        return size / copies * scale

    def expanded(self, x: Tensor, weight: Weight, unit: float = 0.0, rows: slice | None = None) -> Tensor:
        """The wide weight, or some of its rows, times what the model no longer multiplies it with. unit: of
        noise."""
        x, factor = apply.exact(self.widened(x, weight, rows)), self.factor(weight)
        x = x if factor == 1.0 else x * factor
        if unit:
            first = rows.start if rows else 0
            part_copies(x, self.reader(weight), weight, self.layer, unit, self.seed, first)
        return self.begun(x, weight, rows) if self.maps.fresh else x

    def widened(self, x: Tensor, weight: Weight, rows: slice | None) -> Tensor:
        """write . x . read^T, or some of its rows, axis by axis."""
        reads = len(weight.wires) - 1 if weight.reads else None
        for axis in range(len(weight.wires)):
            of, part = self.along(weight, axis), rows if axis == 0 else None
            if axis == reads:
                x = apply.exact(x)
                x = x if of is None else apply.read(of, x, self.maps.of(weight.wires[0], self.layer), rows)
            elif of is not None:
                x = apply.write(of, x, axis, part)
            elif part:
                x = x[part]
        return x

    def along(self, weight: Weight, axis: int) -> Any:
        """The map of an axis, if that grows: over both of what was mixed, where further copies are made of
        another layer, and without units of none, where these have what the source's units have in turn."""
        of = self.maps.of(weight.wires[axis], self.layer)
        if axis == 0 and self.maps.further(weight, self.layer):
            of = apply.with_ahead(of)
        if self.maps.fresh and self.old.starts[weight.name] == "own":
            of = fresh.in_turn(of)
        return of

    def begun(self, x: Tensor, weight: Weight, rows: slice | None) -> Tensor:
        """With what starts as in a new model, where it stands for no unit or no layer."""
        if (start := self.old.starts[weight.name]) == "own":
            return x
        generator = self.generator(weight, rows)
        return fresh.filled(x, self.maps_of(weight), start, self.new.init_std, generator, rows)

    def factor(self, weight: Weight) -> float:
        """What the model multiplied the weight with, over what it does now."""
        return self.old.scale(self.maps.source(weight.name)) / weight.scale

    def generator(self, weight: Weight, rows: slice | None, which: int = 0) -> torch.Generator:
        """Of the numbers that this weight, or a block of its rows, is drawn from."""
        return generator(weight, self.layer, self.seed + which, rows.start if rows else 0)

    @property
    def drawn(self) -> int:
        """Random numbers that it takes, where no matrix of the source is zero."""
        return sum(map(self.drawn_for, self.entry.weights))

    def drawn_for(self, weight: Weight) -> int:
        shape, of, count = self.new.shape(weight), self.reader(weight), 0
        if of is not None and of.noise:
            count += shape[0] * apply.parted(of)
        if self.maps.apart(weight.name, self.layer):
            one = math.prod(self.old.shape(self.old.weight(self.maps.source(weight.name))))
            count += 2 * one if self.maps.further(weight, self.layer) else one
        if self.maps.fresh and self.old.starts[weight.name] == "normal":
            count += fresh.count_drawn(shape, self.maps_of(weight))
        return count

    def maps_of(self, weight: Weight) -> list[Any] | None:
        """The map of each axis; None where it is made of no layer."""
        if self.layer is not None and not self.maps.depth[weight.name][self.layer]:
            return None
        return [self.maps.of(wire, self.layer) for wire in weight.wires]

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
        if self.maps.apart(weight.name, self.layer):
            return False
        return weight.scale == self.old.scale(self.maps.source(weight.name))


@dataclass(frozen=True)
class Draw:
    """What a Drawn says: a weight of normal numbers, made of none."""

    shape: tuple[int, ...]
    of: Drawn
    name: str
    seed: int

    @property
    def drawn(self) -> int:
        return math.prod(self.shape) // self.of.each if self.of.std else 0

    def __call__(self, source: Source) -> Iterator[Tensor]:
        if not self.of.std:
            yield torch.zeros(self.shape)
            return
        rows, *rest = self.shape
        generator = torch.Generator().manual_seed(named_seed(self.seed, self.name))
        x = torch.randn(rows // self.of.each, *rest, generator=generator) * self.of.std
        yield x.repeat_interleave(self.of.each, 0)


def part_copies(
    x: Tensor, of: Copies, weight: Weight, layer: int | None, std: float, seed: int, first: int = 0
) -> None:
    """Add, in place, what `of` has of noise to a reader, or to its rows from the first on: the numbers depend
    on the seed and the weight's name alone. std: of a fresh matrix."""
    apply.add_noise(of, x, std * of.noise, generator(weight, layer, seed, first))


def generator(weight: Weight, layer: int | None, seed: int, first: int = 0) -> torch.Generator:
    """Of the numbers that a weight, or a block of its rows from the first on, is drawn from."""
    name = weight.name if layer is None else weight.name.format(layer)
    return torch.Generator().manual_seed(named_seed(seed, f"{name}[{first}]" if first else name))


def named_seed(seed: int, name: str) -> int:
    """A seed per tensor, so that one tensor's values depend on nothing but its name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
