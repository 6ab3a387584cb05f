"""Does a mixture of experts give what its origin gives? From maps alone, as growth.lossless judges."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from growth.architecture import STREAM, Architecture, Experts, Linear, Op, Stack
from growth.maps import Copies, Maps


def mixed(old: Architecture, stack: Stack, maps: Maps, ops: tuple[Op, ...], layer: int) -> Iterator[str]:
    """What is lost in a layer of the target's `stack` that has experts. ops: of the source's layer."""
    was = next((x for x in ops if isinstance(x, Experts)), None)
    for op in stack.blocks[stack.kinds[layer]]:
        if isinstance(op, Experts):
            why = _parted(op, maps) or (_copied if was else _cut)(op, was, old, maps, layer)
            if why:
                yield f"{op.name}: {why}"
        elif isinstance(op, Linear) and op.writes == STREAM:
            if any(maps.drawn[weight.name].std for weight in op.weights() if weight.name in maps.drawn):
                yield f"{op.name}: what it writes is new"


def _parted(op: Experts, maps: Maps) -> str | None:
    shares = {share for name, share in maps.parted.items() if name.startswith(f"{op.name}.")}
    return f"noise of {min(shares):g} of their deviation parts the copies" if shares else None


def _cut(op: Experts, was: None, old: Architecture, maps: Maps, layer: int) -> str | None:
    """Of a feed-forward block: its shards lie side by side, count together, and add up to it."""
    module, E = op.name.removesuffix(".experts"), len(op.neurons)
    router = maps.drawn.get(f"{module}.router.weight")
    G, block = router.each if router else 1, old.wires["ffn.{}"].size
    whole = all(made == f"{module}.down.weight" for made in _made_of(op, maps))
    for first in range(0, E, G):
        taken: Counter[int] = Counter()
        for wire in op.neurons[first : first + G]:
            taken.update(_taken(maps.of(wire, layer), block))
        whole = whole and all(math.isclose(taken[unit], G) for unit in range(block))
    if whole and op.top_k % G == 0 and (op.normalised or op.top_k == E):
        return None
    return f"{op.top_k} of {E} experts do not add up to the block that they were made of"


def _copied(op: Experts, was: Experts, old: Architecture, maps: Maps, layer: int) -> str | None:
    """Of experts: each as often as the others, as many times more of them count. What becomes of the neurons
    of experts that stay who they are is judged as that of all neurons is."""
    E, of = len(op.neurons), maps.of(op.logits, layer)
    index = tuple(range(len(was.neurons))) if of is None else of.index
    times, more = Counter(index), E // len(was.neurons)
    fits = _made_of(op, maps) == [f"{was.name}.{i}.down.weight" for i in index]
    fits = fits and (of is None or of.scale == 1.0) and {times[i] for i in range(len(was.neurons))} == {more}
    fits = fits and (op.top_k, op.normalised) == (more * was.top_k, was.normalised)
    for wire, i in zip(op.neurons, index if more > 1 else (), strict=more > 1):
        size = old.wires[was.neurons[i]].size
        taken = _taken(maps.of(wire, layer), size)
        fits = fits and all(math.isclose(taken[unit], 1) for unit in range(size))
    if fits:
        return None
    return f"{op.top_k} of {E} experts count where {was.top_k} of {len(was.neurons)} did"


def _made_of(op: Experts, maps: Maps) -> list[str]:
    return [maps.source(f"{op.name}.{e}.down.weight") for e in range(len(op.neurons))]


def _taken(of: Any, units: int) -> Counter[int]:
    """How much of each of a block's neurons an expert's give; none where they are no copies, for neurons are
    not linear."""
    if of is None:
        return Counter(range(units))
    found: Counter[int] = Counter()
    if isinstance(of, Copies) and of.scale == 1.0:
        for unit, share in zip(of.index, of.share, strict=True):
            found[unit] += share
    return found
