"""What a grown model has of no unit and no layer of its source: how it starts, what masks hold closed.

A matrix starts as a new model's does, a gain as 1, a bias as 0; what each unit has of its own, such as steps
and taps, is that of the source's units in turn.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from growth import apply
from growth.architecture import Architecture, Start
from growth.maps import Copies, Maps


def in_turn(of: Copies | None) -> Copies | None:
    """The same with a copy of some unit wherever there is none."""
    if of is None or -1 not in of.index:
        return of
    return replace(of, index=tuple(t % of.sources if s < 0 else s for t, s in enumerate(of.index)))


def filled(
    x: Tensor,
    maps: Sequence[Copies | None] | None,
    start: Start,
    std: float,
    generator: torch.Generator,
    rows: slice | None = None,
) -> Tensor:
    """x with a start wherever it stands for no unit on one of its axes, or all of it where `maps` is None.

    maps: of each axis. rows: those of the whole weight that x holds.
    """
    if maps is None:
        return _begun(x, start, std, generator)
    first, last = (rows.start, rows.stop) if rows else (0, len(x))
    for axis, of in enumerate(maps):
        for run in apply.runs(of) if of is not None else ():
            a, b = run.start, run.start + run.length
            if axis == 0:
                a, b = max(a, first) - first, min(b, last) - first
            if run.source < 0 and a < b:
                part = x.narrow(axis, a, b - a)
                part.copy_(_begun(part, start, std, generator))
    return x


def count_drawn(shape: Sequence[int], maps: Sequence[Copies | None] | None) -> int:
    """Numbers that `filled` draws for a weight of that shape that starts with normal ones."""
    if maps is None:
        return math.prod(shape)
    runs = [(T, run) for T, of in zip(shape, maps, strict=True) if of is not None for run in apply.runs(of)]
    return sum(math.prod(shape) // T * run.length for T, run in runs if run.source < 0)


def _begun(like: Tensor, start: Start, std: float, generator: torch.Generator) -> Tensor:
    if start == "normal":
        return torch.randn(like.shape, dtype=like.dtype, generator=generator) * std
    return torch.full_like(like, 1.0 if start == "one" else 0.0)


def closed(old: Architecture, new: Architecture, maps: Maps) -> dict[str, Any]:
    """What is new, as growth.json has it; {} where nothing is.

    wires    of each, runs [first entry, behind the last, share] of entries: new ones have the share 0 of what
             they will count, copies the share that together makes them one
    layers   of each stack, by its prefix, the numbers of the new layers
    """
    wires = {
        name: runs
        for name in old.growing
        if (of := maps.of(name, 0 if "{}" in name else None)) is not None and (runs := _shares(of))
    }
    layers = {prefix: _without_source(old, new, maps, prefix) for prefix in old.stacks}
    layers = {prefix: found for prefix, found in layers.items() if found}
    return {"wires": wires, "layers": layers} if wires or layers else {}


def _shares(of: Copies) -> list[list[float]]:
    runs, t = [], 0
    for share, units in groupby(of.share):
        end = t + len([*units])
        if share != 1.0:
            runs.append([t * of.width, end * of.width, share])
        t = end
    return runs


def _without_source(old: Architecture, new: Architecture, maps: Maps, prefix: str) -> list[int]:
    """The layers whose matrices are made of no layer's."""
    names = [name for name in old.layered if old.stack_of(name)[0] == prefix and old.layered[name].reads]
    return [i for i in range(new.stacks[prefix].layers) if not any(maps.depth[name][i] for name in names)]
