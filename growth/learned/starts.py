"""Where LiGO's maps start: as the published ones do, or as maps that preserve the function."""

import math
from collections.abc import Callable, Collection
from dataclasses import replace

import torch

from growth import apply
from growth.architecture import Architecture, Attention
from growth.depth import rows
from growth.errors import refuse
from growth.expand import named_seed
from growth.learned.maps import Added, chosen, depth_matrix
from growth.lossless import lost
from growth.maps import Copies, Maps

DEPTH_NOISE = 0.03


def preserving(
    old: Architecture, new: Architecture, maps: Maps, learn: Collection[str], seed: int, must: bool
) -> Maps:
    """Maps that copy, as maps that learn. must: raises Refusal where they lose anything."""
    if must and (why := lost(old, new, maps)):
        remedy = "choose one of these, or sizes at which nothing is lost"
        raise refuse("start", "net2net or published", f"lossless, and {why[0]}", remedy)
    generator = torch.Generator().manual_seed(named_seed(seed, "ligo"))
    read, outside, written = _read(old), _read_outside(old), _written(old)
    wires = {
        name: added(
            of,
            generator if _unnumbered(name) in outside else None,
            _unnumbered(name) in read,
            _unnumbered(name) in written,
        )
        for name, of in maps.wires.items()
    }
    return _planned(old, replace(maps, wires=wires), learn)


def added(
    of: Copies, generator: torch.Generator | None, is_read: bool = True, is_written: bool = True
) -> Added:
    """A map that duplicates as `of` does, with its shares, and its noise in what layers read.

    generator: of wires that are read outside of layers, whose wide matrices are never made. They read what is
    no original at random, too, `of.noise` in units of their own weights, such that together it is nothing.
    """
    S, first = of.sources * of.width, {}
    for t, s in enumerate(of.index):
        first.setdefault(s, t)
    later = [t for t, s in enumerate(of.index) if first[s] != t or s < 0]
    below = replace(
        of, index=tuple(of.index[t] for t in later), share=tuple(of.share[t] for t in later), scale=1.0
    )
    eye = torch.eye(S, dtype=torch.float64)
    written = apply.write(below, eye) if later else eye[:0]
    scale = of.scale
    if isinstance(scale, tuple):  # copies that share what a tied head reads: the originals keep it all
        scale, written = sum(x for x, s in zip(scale, of.index, strict=True) if s == 0), written * 0
    place = _places(of, first, later)
    if not is_read:
        return Added(written, None, scale, place, is_written)
    taken = apply.read(below, eye).T if later else eye[:0]
    if generator and later:
        fresh = torch.randn(S, len(taken), dtype=torch.float64, generator=generator)
        taken = taken + apply.unseen(below, fresh * of.noise / math.sqrt(S)).T
    kept = torch.zeros(of.sources, dtype=torch.float64)
    for t, s in enumerate(of.index):  # less what the others take as rounded, so that together it is all
        if s >= 0:
            kept[s] += of.share[t] - (t != first[s]) * torch.tensor(of.share[t]).item()
    kept = kept.repeat_interleave(of.width)
    return Added(written, taken.contiguous(), scale, place, is_written, kept, of if of.noise else None)


def parted(of: Copies, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense maps [T, S] by which copies are read and written; what parts them, `of.noise` in units of the
    weights that read them, together is nothing."""
    S, T = of.sources * of.width, len(of.index) * of.width
    eye = torch.eye(S, dtype=torch.float64)
    fresh = torch.randn(S, T, dtype=torch.float64, generator=generator) * of.noise / math.sqrt(S)
    return (apply.read(of, eye) + apply.unseen(of, fresh)).T.float(), apply.write(of, eye).float()


def _places(of: Copies, first: dict[int, int], later: list[int]) -> torch.Tensor | None:
    """Where the rows of [old; new] go; None where the old ones come first and in order."""
    if later and later[0] >= of.sources and [first[s] for s in range(of.sources)] == list(range(of.sources)):
        return None
    row = {first[s]: s for s in range(of.sources)} | {t: of.sources + i for i, t in enumerate(later)}
    units = torch.tensor([row[t] for t in range(len(of.index))])
    return (units[:, None] * of.width + torch.arange(of.width)).flatten()


def published(
    old: Architecture,
    new: Architecture,
    order: Callable[[int, int], tuple[int, ...]],
    tied: bool,
    learn: Collection[str],
    seed: int,
) -> Maps:
    """Averages at random, of layers in some order, by default the stack of them. tied: A = B."""
    generator, read = torch.Generator().manual_seed(named_seed(seed, "ligo")), _read(old)

    def averaged(name: str) -> Added:
        a, b = old.wires[name].size, new.wires[name].size
        written = torch.rand(b - a, a, dtype=torch.float64, generator=generator)
        written /= written.sum(1, keepdim=True)
        return Added(written, None if name not in read else written if tied else written.clone())

    def layers(name: str) -> range:
        return range(new.stack_of(name)[1].layers if "{}" in name else 1)

    grown = [name for name, wire in old.growing.items() if new.wires[name] != wire]
    wires = {name.format(i): averaged(name) for name in grown for i in layers(name)}
    if tied:
        stream = [name for name in grown if "{}" not in name and old.wires[name] == old.wires["residual"]]
        wires |= dict.fromkeys(stream, next((wires[name] for name in stream if name in read), None))
        for op in (op for op in old.all_ops if isinstance(op, Attention) and op.mixed in grown):
            if old.wires[op.mixed] == old.wires[op.value]:  # A of the outputs is B of the values
                wires |= {op.value.format(i): wires[op.mixed.format(i)] for i in layers(op.value)}
    depth = {}
    for name in old.layered:
        prefix, stack = old.stack_of(name)
        L, M = stack.layers, new.stacks[prefix].layers
        depth[name] = rows(order(L, M))
        if M > L:
            mixed = depth_matrix(depth[name], L)
            mixed += torch.rand(mixed.shape, dtype=torch.float64, generator=generator) * DEPTH_NOISE
            mixed /= mixed.sum(1, keepdim=True)
            depth[name] = tuple(tuple(enumerate(row)) for row in mixed.tolist())
    return _planned(old, Maps(wires, depth), learn)


def _planned(old: Architecture, maps: Maps, learn: Collection[str]) -> Maps:
    """With the weights whose depth will be learned."""
    names = (name for name in chosen(old, maps, learn) if name.startswith("depth."))
    return replace(maps, mixed=frozenset(name.removeprefix("depth.") for name in names))


def _read(old: Architecture) -> set[str]:
    """The wires that a matrix reads."""
    return {weight.wires[-1] for weight in (*old.outside, *old.layered.values()) if weight.reads}


def _read_outside(old: Architecture) -> set[str]:
    return {weight.wires[-1] for weight in old.outside if weight.reads}


def _written(old: Architecture) -> set[str]:
    """The wires that a weight writes."""
    weights = (*old.outside, *old.layered.values())
    return {wire for weight in weights for wire in weight.wires[: -1 if weight.reads else None]}


def _unnumbered(wire: str) -> str:
    head, _, last = wire.rpartition(".")
    return f"{head}.{{}}" if last.isdigit() else wire
