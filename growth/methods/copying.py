"""What the methods that copy have in common: which unit each new unit copies, on every wire at once."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from growth.architecture import Architecture, Attention, Linear, Norm, Output, Pointwise, Table, Tied, Vector
from growth.maps import Copies, Parting, at_random, copies, evenly, grouped, round_robin
from growth.methods.option import option, refuse_below, refuse_other
from growth.methods.ordered import Index, Ordered

SYMMETRY: dict[str, Parting] = {"projection": "spread", "comp": "first"}


@dataclass(frozen=True)
class Copying(Ordered):
    """What all methods that copy can be told."""

    noise: float = option(0.1, "how far copies differ, in units of a fresh matrix")
    symmetry: str = option("projection", "how readers tell copies apart: projection | comp; noise 0: not")

    def __post_init__(self):
        super().__post_init__()
        refuse_below("noise", self.noise, 0.0)
        refuse_other("symmetry", self.symmetry, tuple(SYMMETRY))

    @property
    def parting(self) -> Parting:
        return SYMMETRY[self.symmetry] if self.noise else "spread"


def indices(old: Architecture, new: Architecture, seed: int | None = None) -> dict[str, Index]:
    """Of every wire that grows: unit t copies unit index[t] of the source, in turn, or with a seed each once
    and then any. Heads that stay as many are put in another order where groups are added."""
    classes, fixed = together(old), {}

    def choose(name: str, old: int, new: int, in_turn: bool = False) -> Index:
        return round_robin(old, new) if in_turn or seed is None else at_random(old, new, f"{seed} {name}")

    for op in old.all_ops:
        if isinstance(op, Attention):
            query, key = classes[op.query], classes[op.key]
            heads, groups = (
                tuple(model.wires[wire].units for model in (old, new)) for wire in (op.query, op.key)
            )
            fixed[key] = choose(key, *groups, op.in_turn)
            inside = partial(choose, query, in_turn=op.in_turn)
            fixed[query] = grouped(heads, groups, fixed[key], inside)
    found = {
        name: fixed.get(classes[name]) or choose(classes[name], wire.units, new.wires[name].units)
        for name, wire in old.growing.items()
    }
    return {
        name: index
        for name, index in found.items()
        if new.wires[name] != old.wires[name] or index != tuple(range(len(index)))
    }


def evened(old: Architecture, index: dict[str, Index]) -> dict[str, Index]:
    """The same with -1 at the copies that some units have and others have not, where a norm sums over the
    wire, or cosines of what the model gives do, and the wire can hold what is no copy.

    They see every unit as often as every other then. What is no copy has to be zero, or for a LayerNorm
    the mean of all units: only what linear maps write can be that, and what a norm writes cannot.
    """
    classes, uneven = together(old), {}
    given = [op.reads for op in old.ops if isinstance(op, Output)]
    for wire in (*(norm.reads for norm in old.norms if norm.per == "wire"), *given):
        if wire in index:
            kept = _kept(index[wire])
            uneven.setdefault(classes[wire], set()).update(t for t, keeps in enumerate(kept) if not keeps)
    for wire in old.growing:
        if wire in needs_mean(old) and not _linear(old, wire):
            uneven.pop(classes[wire], None)
    return {
        name: tuple(-1 if t in uneven.get(classes[name], ()) else s for t, s in enumerate(of))
        for name, of in index.items()
    }


def needs_mean(model: Architecture) -> set[str]:
    """The wires that a LayerNorm reads: what is no copy there has to be the mean."""
    return {norm.reads for norm in model.norms if norm.kind == "layer" and norm.per == "wire"}


def widened(
    old: Architecture,
    new: Architecture,
    noise: float = 0.0,
    parting: Parting = "spread",
    seed: int | None = None,
) -> dict[str, Copies]:
    """Copies of every unit, as plain as can be; what a tied head reads is shared out among the copies."""
    index = indices(old, new, seed)
    maps = {name: copies(of, old.wires[name], noise=noise, parting=parting) for name, of in index.items()}
    for wire, factor in tied_factors(old, new).items():
        units = index.get(wire, tuple(range(old.wires[wire].units)))
        scaled = tuple(x / factor for x in evenly(units))
        for name in (wire, *(norm.gain for norm in old.norms if norm.writes == wire and norm.gain)):
            of = index.get(name, tuple(range(old.wires[name].units)))
            maps[name] = copies(of, old.wires[name], scale=scaled, noise=noise, parting=parting)
    return maps


def tied_factors(old: Architecture, new: Architecture) -> dict[str, float]:
    """Of each wire that a tied head reads and whose width grows: how many times what it should the head takes
    from a copy, for the table's own scale and the head's may follow the width."""
    found = {}
    for small, wide in zip(old.ops, new.ops, strict=True):
        if isinstance(small, Tied) and old.wires[small.reads] != new.wires[small.reads]:
            before, after = (model.table(small.table).scale for model in (old, new))
            found[small.reads] = before / after * wide.scale / small.scale
    return found


def per_layer(new: Architecture, maps: dict[str, Copies]) -> dict[str, Copies]:
    """Keyed as Maps.wires is: one map of a layered wire serves all layers."""
    return {
        name.format(i): of
        for name, of in maps.items()
        for i in range(new.stack_of(name)[1].layers if "{}" in name else 1)
    }


def together(model: Architecture) -> dict[str, str]:
    """The wires whose units go together, each with one of them as the name of all."""
    of = {name: name for name in model.wires}

    def join(wires: Iterable[str]) -> None:
        names = {of[wire] for wire in wires if wire and not model.wires[wire].fixed}
        for wire, name in of.items():
            if name in names:
                of[wire] = min(names)

    for op in model.all_ops:
        if isinstance(op, Norm):
            join((op.reads, op.writes, op.gain))
        elif isinstance(op, Pointwise):
            join(op.wires)
        elif isinstance(op, Attention):
            join((op.query, op.mixed, *op.along))
            join((op.key, op.value))
    return of


def _kept(index: Index) -> list[bool]:
    """False at the copies beyond the least number that any unit has."""
    least, seen, kept = min(Counter(index).values()), Counter(), []
    for i in index:
        kept.append(seen[i] < least)
        seen[i] += 1
    return kept


def _linear(model: Architecture, wire: str) -> bool:
    """Is all that is written there linear in weights, so that it can be written as a mean?"""
    writers = [op for op in model.all_ops if wire in (getattr(op, "writes", ""), getattr(op, "mixed", ""))]
    changed = any(isinstance(op, Pointwise) and wire in op.wires for op in model.all_ops)
    return not changed and all(isinstance(op, Linear | Table | Vector) for op in writers)
