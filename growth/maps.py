"""How wires grow: what producers write, what readers read, which layers a new layer is a mix of.

    new[i] = write . (sum_j depth[i, j] old[j]) . read^T

A map is lossless for a linear reader iff read^T write = I: readers of the wide wire see exactly the narrow
one. `Copies` only duplicates units, so a checkpoint of any size streams through; maps that are learned are in
growth.learned. Nothing here computes with tensors; growth.apply does.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any, Literal

from growth.architecture import Weight, Wire

Row = tuple[tuple[int, float], ...]  # of a depth matrix: the old layers and their coefficients
Parting = Literal["spread", "first", "pairs", "blocks"]


@dataclass(frozen=True, eq=False)  # told apart as objects: comparing would read every index
class Copies:
    """Unit t of the wide wire is a copy of unit index[t]; index -1 marks a unit of its own, which no reader
    sees.

    Readers take share[t] of what they took from the original; a unit of its own is written as zero or as the
    mean of all units (`rest`); all that is written is multiplied by `scale`, one number or one per unit.
    width: entries per unit. noise: standard deviation, in units of a fresh matrix, of what readers are given
    that they cannot see, R being normal numbers; parting: how the copies of a unit, W their weight, share it:

    spread  W / n + R less the mean of R over the copies
    first   the first takes W less all other R, each other copy its R
    pairs   W / n + R and W / n - R in turn, an odd last copy W / n; noise is in units of the root mean square
            of W / n
    blocks  a row that is itself a copy takes from the copies of its own number, so that whole factors make
            diagonal blocks: of n copies, read by the r-th of m copies, those whose number is r modulo
            g = gcd(m, n), g / n of W each; R as in spread
    """

    index: tuple[int, ...]
    share: tuple[float, ...]
    sources: int
    width: int = 1
    rest: Literal["zero", "mean"] = "zero"
    scale: float | tuple[float, ...] = 1.0
    noise: float = 0.0
    parting: Parting = "spread"


def copies(
    index: tuple[int, ...],
    wire: Wire,
    rest: Literal["zero", "mean"] = "zero",
    scale: float | tuple[float, ...] = 1.0,
    noise: float = 0.0,
    parting: Parting = "spread",
) -> Copies:
    """The map that copies the units of a wire by `index`; readers divide by the number of copies, or take all
    from the first."""
    share = evenly(index)
    if parting == "first":
        share = tuple(float(s >= 0 and r == 0) for s, (r, _) in zip(index, numbered(index), strict=True))
    return Copies(index, share, wire.units, wire.width, rest, scale, noise, parting)


def evenly(index: tuple[int, ...]) -> tuple[float, ...]:
    """Of each unit, one over the number of copies; 0 of what is no copy."""
    count = Counter(index)
    return tuple(1 / count[s] if s >= 0 else 0.0 for s in index)


@lru_cache(maxsize=64)
def numbered(index: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Of each unit, which copy it is and of how many: (0, 2) is the first of two; (0, 1) what is no copy."""
    count, seen, found = Counter(index), Counter(), []
    for s in index:
        found.append((seen[s], count[s]) if s >= 0 else (0, 1))
        seen[s] += 1
    return tuple(found)


def round_robin(old: int, new: int) -> tuple[int, ...]:
    """0 1 2 0 1: every unit in turn."""
    return tuple(t % old for t in range(new))


def at_random(old: int, new: int, seed: str) -> tuple[int, ...]:
    """0 1 2 1 1: every unit, then any; fewer are the first of more."""
    some = Random(seed)
    return (*range(min(old, new)), *(some.randrange(old) for _ in range(new - old)))


def grouped(
    heads: tuple[int, int],
    groups: tuple[int, int],
    which: tuple[int, ...] | None = None,
    choose: Callable[[int, int], tuple[int, ...]] = round_robin,
) -> tuple[int, ...]:
    """Heads whose group copies a group of the source: each group's copies share its heads out, in turn.

    heads, groups: of the source and of the target. With whole groups added the new ones are copies of groups;
    with none, heads are added inside each. which: the group that each copies, in turn unless given; choose:
    in which order a group's heads are shared out.
    """
    (Q, P), (G, H) = heads, groups
    n, m = Q // G, P // H
    which = which or round_robin(G, H)
    copy = [c for c, _ in numbered(which)]
    return tuple(s * n + i for s, c in zip(which, copy, strict=True) for i in choose(n, (c + 1) * m)[c * m :])


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
    ahead     of some layered weights, what the further copies of the units that they write are made of: rows
              as in `depth`
    still     the target's layers that training is to hold still at first, and with them what lies outside
              the layers; None: nothing
    fresh     units of no unit, and layers of no layer, start as those of a new model do, not as zero
    made_of   of some weights of the target, the source's weight that they are made of; of others that of
              their name
    drawn     the weights of the target that are made of none
    parted    of some weights, in all layers or in one whose number is in the name, the standard deviation of
              the noise that is added to them, in units of their own
    """

    wires: Mapping[str, Any]
    depth: Mapping[str, tuple[Row, ...]]
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    eps: Mapping[str, float] = field(default_factory=dict)
    mixed: frozenset[str] = frozenset()
    ahead: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    still: frozenset[int] | None = None
    fresh: bool = False
    made_of: Mapping[str, str] = field(default_factory=dict)
    drawn: Mapping[str, Drawn] = field(default_factory=dict)
    parted: Mapping[str, float] = field(default_factory=dict)

    def source(self, weight: str) -> str:
        """The name of the source's weight that a weight of the target is made of."""
        return self.made_of.get(weight, weight)

    def apart(self, weight: str, layer: int | None) -> float:
        """The noise that is added to a weight, in units of its own deviation."""
        own = weight if layer is None else weight.format(layer)
        return self.parted.get(own, self.parted.get(weight, 0.0))

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

    def further(self, weight: Weight, layer: int | None) -> Row:
        """The layers that the further copies of a weight's units are made of; none where there are no copies,
        or they are made of the same layers."""
        of = self.of(weight.wires[0], layer)
        if layer is None or of is None or weight.name not in self.ahead:
            return ()
        row, copied = self.ahead[weight.name][layer], any(copy for copy, _ in numbered(of.index))
        return row if copied and row != self.depth[weight.name][layer] else ()
