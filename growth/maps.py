"""How wires grow: what producers write, what readers read, which layers a new layer is a mix of.

    new[i] = write . (sum_j depth[i, j] old[j]) . read^T

A map is lossless for a linear reader iff read^T write = I: readers of the wide wire see exactly the narrow
one. `Copies` only duplicates units, so a checkpoint of any size streams through; maps that are learned are in
growth.learned. Nothing here computes with tensors; growth.apply does.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from growth.architecture import Wire

Row = tuple[tuple[int, float], ...]  # of a depth matrix: the old layers and their coefficients


@dataclass(frozen=True, eq=False)  # told apart as objects: comparing would read every index
class Copies:
    """Unit t of the wide wire is a copy of unit index[t]; index -1 marks a unit of its own, which no reader
    sees.

    Readers take share[t] of what they took from the original; a unit of its own is written as zero or as the
    mean of all units (`rest`); all that is written is multiplied by `scale`, one number or one per unit.
    width: entries per unit. noise: standard deviation, in units of a fresh matrix, of what readers are given
    that they cannot see.
    """

    index: tuple[int, ...]
    share: tuple[float, ...]
    sources: int
    width: int = 1
    rest: Literal["zero", "mean"] = "zero"
    scale: float | tuple[float, ...] = 1.0
    noise: float = 0.0


def copies(
    index: tuple[int, ...],
    wire: Wire,
    rest: Literal["zero", "mean"] = "zero",
    scale: float | tuple[float, ...] = 1.0,
    noise: float = 0.0,
) -> Copies:
    """The map that copies the units of a wire by `index`; readers divide by the number of copies."""
    count = Counter(index)
    share = tuple(1 / count[i] if i >= 0 else 0.0 for i in index)
    return Copies(index, share, wire.units, wire.width, rest, scale, noise)


def round_robin(old: int, new: int) -> tuple[int, ...]:
    """0 1 2 0 1: every unit in turn."""
    return tuple(t % old for t in range(new))


def grouped(heads: tuple[int, int], groups: tuple[int, int]) -> tuple[int, ...]:
    """Heads whose group copies a group of the source: each group's copies share its heads out in turn.

    heads, groups: of the source and of the target. With whole groups added the new ones are copies of groups;
    with none, heads are added inside each.
    """
    (Q, P), (G, H) = heads, groups
    n, m = Q // G, P // H
    return tuple((g % G) * n + ((g // G) * m + i) % n for g in range(H) for i in range(m))


def groups(heads: int, have: int, new: int) -> int:
    """The groups of `new` heads, where `heads` had `have`: as large as these, else the fewest that divide the
    heads and hold every head of the source; of fewer heads, the most that they can be."""
    group = heads // have
    if new % group == 0:
        return new // group
    if new < heads:
        return next(n for n in range(have, 0, -1) if may_keep((heads, new), (have, n)))
    choices = (n for n in range(have, new + 1) if new % n == 0)
    return next(n for n in choices if n // have * (new // n) >= group)


def may_keep(heads: tuple[int, int], groups: tuple[int, int]) -> bool:
    """Of the source and the target: can these fewer groups be some of the source's, each with as many of its
    heads, or each the mean of as many neighbours?"""
    (Q, P), (G, H) = heads, groups
    return P % H == 0 and (P // H <= Q // G or G % H == 0)


@dataclass(frozen=True)
class Drawn:
    """A weight that nothing of the source becomes: normal numbers of this deviation, of which each row stands
    there `each` times in a row; zeros for 0."""

    std: float
    each: int = 1


@dataclass(frozen=True)
class Maps:
    """What a method returns: a map per wire that grows, and per layered weight what each layer is a mix of.

    wires     keyed by the name of the wire, in a layer with its number in the target ("ffn.3"); a wire that
              is not there stays as it is
    depth     of each layered weight, a row for each layer of the target
    constants of some weights, what is added to each layer's mix
    eps       of some fields of norms' eps, what they are multiplied by
    mixed     the weights whose depth will be learned: every old layer takes part
    made_of   of some weights of the target, the source's weight that they are made of; of others that of
              their name
    drawn     the weights of the target that are made of none
    parted    of some weights, the deviation of the noise that is added to them, in units of their own
    """

    wires: Mapping[str, Any]
    depth: Mapping[str, tuple[Row, ...]]
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    eps: Mapping[str, float] = field(default_factory=dict)
    mixed: frozenset[str] = frozenset()
    made_of: Mapping[str, str] = field(default_factory=dict)
    drawn: Mapping[str, Drawn] = field(default_factory=dict)
    parted: Mapping[str, float] = field(default_factory=dict)

    def source(self, weight: str) -> str:
        """The name of the source's weight that a weight of the target is made of."""
        return self.made_of.get(weight, weight)

    def at(self, layer: int) -> frozenset[tuple[str, int]]:
        """What tells layers with other maps apart: which object is the map of each wire there."""
        return frozenset(
            (name.removesuffix(f".{layer}"), id(of))
            for name, of in self.wires.items()
            if name.endswith(f".{layer}")
        )

    def of(self, wire: str, layer: int | None) -> Any:
        """The map of a wire, None where it does not grow."""
        return self.wires.get(wire if layer is None else wire.format(layer))
