"""What stays: layers, and units of every wire that shrinks. As a map, a subset of units is copies of it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from growth.architecture import Architecture, Attention, Experts, Linear, Op
from growth.depth import rows
from growth.maps import Copies, Maps
from growth.methods.copying import tied_factors
from growth.shrinking.bonds import Bonds, Place

Index = tuple[int, ...]
EXPERT = r"(^expert|\.experts\.)(\d+)"  # in the names of wires and of weights


class Scores(Protocol):
    """How much a model needs each of its layers and units."""

    def layers(self, prefix: str) -> Tensor:
        """Of each layer of a stack, [L]."""

    def units(self, place: Place, most: int, block: int = 1) -> Tensor:
        """Of each unit of a class, or of each `block` of neighbouring ones, [units / block]; most: how many
        will stay."""

    def experts(self, router: Linear, layer: int) -> Tensor:
        """Of each expert of a mixture, by what writes its logits."""


@dataclass(frozen=True)
class Kept:
    """layers: of each stack, those that stay. units: of each class that shrinks, by layer of the source.
    pools: of classes of keys and values, the groups whose mean each new one is. experts: of each layer with
    some, those that stay."""

    layers: Mapping[str, Index]
    units: dict[Place, Index] = field(default_factory=dict)
    pools: dict[Place, tuple[Index, ...]] = field(default_factory=dict)
    experts: dict[int, Index] = field(default_factory=dict)

    def made_of(self, name: str, layer: int | None) -> str:
        """The weight or wire of the source that one of the target's is: experts are numbered anew."""
        if layer not in self.experts:
            return name
        return re.sub(EXPERT, lambda found: found[1] + str(self.experts[layer][int(found[2])]), name)


def best(scores: Tensor, count: int) -> Index:
    """The units of the highest scores in their order; of equal ones the first."""
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


def best_of_kinds(scores: Tensor, kinds: Sequence[str], count: int) -> Index:
    """The same, but that of each kind the best stays where there is room: a hybrid stays one."""
    order = scores.argsort(descending=True, stable=True).tolist()
    firsts = [next(j for j in order if kinds[j] == kind) for kind in sorted(set(kinds))]
    if len(firsts) > count:
        return best(scores, count)
    return tuple(sorted([*firsts, *(j for j in order if j not in firsts)][:count]))


def kept(bonds: Bonds, new: Architecture, layers: Mapping[str, Index], scores: Scores) -> Kept:
    """What stays of a model whose stacks keep these layers, at the sizes of `new`."""
    old, found = bonds.model, Kept(layers)
    for op, layer in _mixtures(bonds, layers):
        if (after := new.wires[op.logits].units) < old.wires[op.logits].units:
            found.experts[layer] = best(scores.experts(bonds.router(op), layer), after)
    for place, (wire, attention) in _places(bonds, layers).items():
        before, after = old.wires[wire].units, new.wires[re.sub(EXPERT, r"\g<1>0", wire)].units
        if attention:
            groups = old.wires[attention.key].units, new.wires[attention.key].units
            keys = {bonds.place(attention.key, j) for j in _layers(bonds, layers, place, attention)}
            _keep_heads(found, scores, place, keys, (before, after), groups)
        elif before != after:
            found.units[place] = best(scores.units(place, after), after)
    return found


def _mixtures(bonds: Bonds, layers: Mapping[str, Index]) -> Iterator[tuple[Experts, int]]:
    for layer, ops in _kept_ops(bonds, layers):
        yield from ((op, layer) for op in ops if isinstance(op, Experts))


def _places(bonds: Bonds, layers: Mapping[str, Index]) -> dict[Place, tuple[str, Attention | None]]:
    """Of each class a wire; of the classes of heads of query their attention; those of keys go with these."""
    found: dict[Place, tuple[str, Attention | None]] = {}
    keys = {bonds.of[op.key] for op in bonds.model.all_ops if isinstance(op, Attention)}
    for layer, ops in _kept_ops(bonds, layers):
        for op in ops:
            if isinstance(op, Attention):
                found[bonds.place(op.query, layer)] = op.query, op
            for wire in _named(op):
                if wire in bonds.model.growing and bonds.of[wire] not in keys:
                    found.setdefault(bonds.place(wire, layer), (wire, None))
    return found


def _kept_ops(bonds: Bonds, layers: Mapping[str, Index]) -> Iterator[tuple[int | None, tuple[Op, ...]]]:
    """The ops of the layers that stay, then those outside."""
    for prefix, stack in bonds.model.stacks.items():
        for layer in layers[prefix]:
            yield layer, stack.blocks[stack.kinds[layer]]
    yield None, bonds.model.ops


def _layers(bonds: Bonds, layers: Mapping[str, Index], place: Place, attention: Attention) -> Index:
    """The layers whose heads of this attention are chosen at that place: one, or all that have it."""
    ops = _kept_ops(bonds, layers)
    return tuple(j for j, of in ops if attention in of and bonds.place(attention.query, j) == place)


def _named(op: object) -> list[str]:
    one = [getattr(op, role, "") for role in ("reads", "writes", "gain")]
    return [*one, *getattr(op, "wires", ())]


def _keep_heads(
    found: Kept,
    scores: Scores,
    place: Place,
    keys: set[Place],
    heads: tuple[int, int],
    groups: tuple[int, int],
) -> None:
    """Whole groups where there are fewer, the heads of each evenly; or means of neighbouring groups."""
    (Q, P), (G, H) = heads, groups
    if heads == (Q, Q) and groups == (G, G):
        return
    n, m = Q // G, P // H
    if m <= n:
        chosen = best(scores.units(place, H, n), H) if H < G else tuple(range(G))
        pools = tuple((g,) for g in chosen)
    else:
        pools = tuple(tuple(range(h * G // H, (h + 1) * G // H)) for h in range(H))
    each = scores.units(place, P)
    index: list[int] = []
    for pool in pools:
        members = torch.tensor([head for g in pool for head in range(g * n, (g + 1) * n)])
        index += members[list(best(each[members], m))].tolist()
    if tuple(index) != tuple(range(Q)):
        found.units[place] = tuple(index)
    for other in keys if H < G else ():
        found.units[other] = tuple(pool[0] for pool in pools)
        if m > n:
            found.pools[other] = pools


def maps(bonds: Bonds, kept: Kept, new: Architecture) -> Maps:
    """Copies of what stays, each of one unit; readers take all of it.

    A tied head whose scale, or whose table's, follows the width reads as much as it did.
    """
    old, wires = bonds.model, {}
    scales: dict[str, float] = {}
    for wire, factor in tied_factors(old, new).items():
        gains = [norm.gain for norm in old.norms if norm.writes == wire and norm.gain]
        scales |= dict.fromkeys((wire, *gains), 1 / factor)
    made: dict[tuple, Copies] = {}
    for name, wire in old.growing.items():
        layered = "{}" in name
        for i, j in enumerate(kept.layers[old.stack_of(name)[0]] if layered else (None,)):
            if layered and name not in new.wires:
                continue  # an expert's, of which there are fewer
            index = kept.units.get(bonds.place(kept.made_of(name, j), j))
            if index is not None:
                of = Copies(index, (1.0,) * len(index), wire.units, wire.width, scale=scales.get(name, 1.0))
                wires[name.format(i)] = made.setdefault((index, wire, of.scale), of)
    for op, layer in _mixtures(bonds, kept.layers):
        if index := kept.experts.get(layer):
            i, E = kept.layers[old.stack_of(op.logits)[0]].index(layer), old.wires[op.logits].units
            wires[op.logits.format(i)] = Copies(tuple(range(len(index))), (1.0,) * len(index), E)
    depth = {name: rows(kept.layers[old.stack_of(name)[0]]) for name in old.layered}
    return Maps(wires, depth)


def order_of(kept: Mapping[str, Index]) -> Callable[[int, int], Index]:
    """Which layer each of the target's is, as lists of a configuration want it: those of the first stack."""
    first = next(iter(kept.values()))
    return lambda old, new: first
