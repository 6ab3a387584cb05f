"""What a plan's rows are made by, and the only loop over them.

new[i] = write . (sum_j depth[i, j] old[j]) . read^T
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from growth import apply
from growth.architecture import Architecture, Weight
from growth.checkpoint import by_rows
from growth.families.stored import Entry
from growth.families.table import Model
from growth.maps import Drawn, Maps
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
                apart = self.apart(x, weight)
                for rows in by_rows(self.new.shape(weight), BLOCK):
                    yield self.entry.to_disk([self.expanded(x, weight, rows, apart)])
        else:
            weights = (self.expanded(self.mixed(source, weight), weight) for weight in self.entry.weights)
            yield self.entry.to_disk(weights)

    def mixed(self, source: Source, weight: Weight) -> Tensor:
        """sum_j depth[i, j] old[j]."""
        made_of = self.maps.source(weight.name)
        if self.layer is None:
            x = source.raw(made_of, None)
        else:
            row = self.maps.depth[weight.name][self.layer]
            if [w for _, w in row] == [1.0]:
                x = source.raw(made_of, row[0][0])
            else:
                any_layer = next(j for name, j in source.place if name == made_of)
                zero = torch.zeros_like(source.read(made_of, any_layer))
                x = sum((w * source.read(made_of, j) for j, w in row), zero)
            if constants := self.maps.constants.get(weight.name):
                x = apply.exact(x) + constants[self.layer]
        return x

    def apart(self, x: Tensor, weight: Weight) -> float:
        """The deviation of the noise that parts this weight from others that are made of the same, `x`."""
        share = self.maps.parted.get(weight.name, 0.0)
        return share * apply.exact(x).std(correction=0).item() if share else 0.0

    def expanded(
        self, x: Tensor, weight: Weight, rows: slice | None = None, apart: float | None = None
    ) -> Tensor:
        """The wide weight, or some of its rows, times what the model no longer multiplies it with.

        apart: what `apart` gives, where it is known.
        """
        apart = self.apart(x, weight) if apart is None else apart
        reads = len(weight.wires) - 1 if weight.reads else None
        for axis, wire in enumerate(weight.wires):
            of = self.maps.of(wire, self.layer)
            part = rows if axis == 0 else None
            if axis == reads:
                x = apply.exact(x)
                x = x if of is None else apply.read(of, x)
            elif of is not None:
                x = apply.write(of, x, axis, part)
            elif part:
                x = x[part]
        x, factor = apply.exact(x), self.old.scale(self.maps.source(weight.name)) / weight.scale
        x = x if factor == 1.0 else x * factor
        of = self.maps.of(weight.wires[-1], self.layer) if weight.reads else None
        if of is not None and of.noise:
            apply.add_noise(of, x, self.old.init_std * of.noise, self._generator(weight, rows))
        if apart:
            x = x + apart * torch.randn(x.shape, dtype=x.dtype, generator=self._generator(weight, rows))
        return x

    def _generator(self, weight: Weight, rows: slice | None) -> torch.Generator:
        """Random numbers of this weight's name, and of the block of its rows."""
        name = weight.name if self.layer is None else weight.name.format(self.layer)
        name = f"{name}[{rows.start}]" if rows and rows.start else name
        return torch.Generator().manual_seed(named_seed(self.seed, name))

    def layers(self, weight: Weight) -> list[int | None]:
        """The old layers that take part."""
        if self.layer is None:
            return [None]
        if weight.name in self.maps.mixed:
            stack = self.old.stack_of(weight.name)[1]
            return [j for j, kind in enumerate(stack.kinds) if weight in stack.weights[kind]]
        return [j for j, _ in self.maps.depth[weight.name][self.layer]]

    def stays(self, weight: Weight) -> bool:
        """Nothing changes but its place."""
        if any(self.maps.of(wire, self.layer) is not None for wire in weight.wires):
            return False
        if self.layer is not None:
            one = [w for _, w in self.maps.depth[weight.name][self.layer]] == [1.0]
            if not one or weight.name in self.maps.mixed or weight.name in self.maps.constants:
                return False
        return weight.name not in self.maps.parted and weight.scale == self.old.scale(
            self.maps.source(weight.name)
        )


@dataclass(frozen=True)
class Draw:
    """What a Drawn says: a weight of normal numbers, made of none."""

    shape: tuple[int, ...]
    of: Drawn
    name: str
    seed: int

    def __call__(self, source: Source) -> Iterator[Tensor]:
        if not self.of.std:
            yield torch.zeros(self.shape)
            return
        rows, *rest = self.shape
        generator = torch.Generator().manual_seed(named_seed(self.seed, self.name))
        x = torch.randn(rows // self.of.each, *rest, generator=generator) * self.of.std
        yield x.repeat_interleave(self.of.each, 0)


def drawn_row(source: Source, name: str, shape: tuple[int, ...], of: Drawn, seed: int) -> Row:
    """A tensor that nothing of the source becomes."""
    dtype, note = source.dtype(source.on_disk.values()), f"normal numbers of deviation {of.std}"
    if not of.std:
        note = "zero: it changes nothing at first"
    elif of.each > 1:
        note += f", each row {of.each} times"
    recipe, block = Draw(shape, of, name, seed), math.prod(shape)
    return Row(name, shape, dtype, "initialised", (), note, recipe=recipe, block=block)


def plan_growth(
    source: Source, target: Model, maps: Maps, seed: int, learned: Callable[[str], Recipe] | None = None
) -> Plan:
    """Where every grown tensor comes from, and what makes it: `learned` gives the recipes of what learns."""
    old, new, rows = source.model.architecture, target.architecture, []
    for name, (entry, layer) in target.table().items():
        if drawn := maps.drawn.get(entry.weights[0].name):
            rows.append(drawn_row(source, name, entry.shape(new), drawn, seed))
            continue
        expand, made_of = Expand(entry, layer, maps, old, new, seed), maps.source
        used = [source.where(made_of(w.name), j) for w in entry.weights for j in expand.layers(w)]
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
                source.dtype(sources or source.tensors(entry.weights) or source.on_disk.values()),
                "copied" if copied else "expanded",
                sources,
                note,
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
