"""What gradients become where weights become write . W . read^T: the maps change roles.

    W' = P W Q^T   (P writes, Q reads; Q^T P = 1 on every wire)
    dL/dW' = Q (dL/dW) P^T

A wide wire carries P x, and its gradient is Q g: copies share it out as readers share the value out. A weight
has the gradient of what it writes along each written axis, and what it reads along the read one. So, with
gamma the factor of the gradient of an entry, m' = gamma m and v' = gamma^2 v of Adam, and

    a copy's row of a matrix, a bias, a gain, a table's column      share / scale of the wire it writes
    a copy's column of a reader                                     scale of the wire it reads
    what the model multiplies by s, once, and by s' when grown      s' / s   (Gemma's embedding, Granite's)

Gains that a norm's factor is folded into, tied heads and gains stored as g - 1 follow: each has the scale of
its own wire, and an offset has no gradient. All of it is exact where growth is lossless, readers got no noise
and every copy of a head of keys and values serves all that this served, each equally often: no moment tells
what each of several query heads asked of it. Nor does any tell how the mean that a LayerNorm takes over
channels that are no copies (LEMON's remainder) moves gradients. There, and with noise, it is an estimate, as
it is for layers that are mixes of others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from growth.apply import exact
from growth.architecture import Architecture, Weight
from growth.errors import refuse
from growth.expand import Expand
from growth.families.stored import Entry
from growth.families.table import Model
from growth.maps import Copies, Maps, Row
from growth.plan import Source

PLAIN = {"rest": "zero", "noise": 0.0, "parting": "spread"}


def dual(of: Any, power: int, old: Architecture, wire: str) -> Any:
    """The map of what belongs to gradients: `write` is for written axes and `read` for the one that is read.

    power: 2 for squares of gradients, entry by entry. wire: the name of the wide wire.
    """
    if isinstance(of, Copies):
        scales = of.scale if isinstance(of.scale, tuple) else (of.scale,) * len(of.index)
        written = tuple((x / y) ** power for x, y in zip(of.share, scales, strict=True))
        taken = tuple(x**power for x in scales)
        return replace(of, share=taken, scale=written, **PLAIN)
    from growth.learned.maps import Widen, dense

    made = dense(of, _narrow(old, wire).size)
    return Widen(made.read_matrix.detach() ** power, made.write_matrix.detach() ** power)


def first(of: Any) -> Copies:
    """The first copy of each unit as it was, all others new.

    Raises Refusal where units are mixes, among which none is an old one.
    """
    if not isinstance(of, Copies):
        remedy = "choose copy-scaled or reset"
        raise refuse("asymmetric-reset", "units that are copies", "mixes of units", remedy)
    seen: set[int] = {-1}
    index = tuple(-1 if s in seen or seen.add(s) else s for s in of.index)
    return replace(of, index=index, share=(1.0,) * len(index), scale=1.0, **PLAIN)


def new_units(of: Any, axis_is_read: bool) -> Tensor:
    """Of each unit of a wide wire, by the dual map of it: does nothing old tell of it?"""
    if isinstance(of, Copies):
        counts = of.share if axis_is_read else of.scale
        counts = counts if isinstance(counts, tuple) else (counts,) * len(of.index)
        new = (s < 0 or not x for s, x in zip(of.index, counts, strict=True))
        return torch.tensor([*new]).repeat_interleave(of.width)
    matrix = of.read_matrix if axis_is_read else of.write_matrix
    return (matrix == 0).all(1)


def added(model: Architecture, maps: Maps) -> dict[str, frozenset[int]]:
    """Of each stack, the layers of the target that add nothing to the stream at first."""
    found = {}
    for prefix, stack in model.stacks.items():
        of_kind = {}
        for kind, ops in stack.blocks.items():
            after = stack.after_sum(kind)
            adding = (op for op in ops if stack.adds(op) and op not in after)
            named = [weight.name for op in adding for weight in op.weights()]
            of_kind[kind] = [maps.depth[name] for name in named if name not in maps.drawn]
        silent = (i for i, kind in enumerate(stack.kinds) if not all(rows[i] for rows in of_kind[kind]))
        found[prefix] = frozenset(silent)
    return found


def dual_maps(old: Architecture, new: Architecture, maps: Maps, power: int, only_first: bool = False) -> Maps:
    """The maps of what belongs to gradients. A layer that adds nothing at first has no row: its gradients are
    of another kind than those of the layer it was made of. only_first: see `first`."""
    made: dict[int, Any] = {}
    for name, of in maps.wires.items():
        if id(of) not in made:
            made[id(of)] = first(of) if only_first else dual(of, power, old, name)
    wires = {name: made[id(of)] for name, of in maps.wires.items()}
    silent = added(new, maps)
    after = {
        weight.name
        for stack in new.stacks.values()
        for kind in stack.blocks
        for op in stack.after_sum(kind)
        for weight in op.weights()
    }
    depth, again = {}, _again(new, maps) if only_first else frozenset()
    for name, rows in maps.depth.items():
        gone = frozenset() if name in after else silent[new.stack_of(name)[0]]
        kept = tuple(() if i in gone or name in again else row for i, row in enumerate(rows))
        depth[name] = _firsts(kept) if only_first else tuple(_raised(row, power) for row in kept)
    ahead = {name: tuple(_raised(row, power) for row in rows) for name, rows in maps.ahead.items()}
    return replace(
        maps,
        wires=wires,
        depth=depth,
        ahead={} if only_first else ahead,
        constants={},
        eps={},
        mixed=frozenset(),
        fresh=False,
        parted={},
    )


def _again(new: Architecture, maps: Maps) -> frozenset[str]:
    """The weights that are made of what another is, of the same units, as further copies of experts are."""
    seen, found = set(), []
    for name, weight in new.layered.items():
        units = (getattr(maps.of(wire, 0), "index", None) for wire in weight.wires)
        made_of = (maps.source(name), *units)
        if name in maps.made_of and made_of in seen:
            found.append(name)
        seen.add(made_of)
    return frozenset(found)


def _narrow(old: Architecture, wide: str):
    """The source's wire of the name of a target's, which has the layer's number in the place of {}."""
    head, _, number = wide.rpartition(".")
    return old.wires[f"{head}.{{}}" if number.isdigit() and f"{head}.{{}}" in old.wires else wide]


def _raised(row: Row, power: int) -> Row:
    return tuple((j, w**power) for j, w in row)


def _firsts(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows that are a whole old layer, where it stands first."""
    seen: set[int] = set()
    kept = []
    for row in rows:
        whole = len(row) == 1 and row[0][1] == 1.0 and row[0][0] not in seen
        seen.update(j for j, _ in row if whole)
        kept.append(row if whole else ())
    return tuple(kept)


class Moment:
    """What belongs to each entry of a checkpoint's tensors, seen as `Source` shows the tensors themselves.

    tensors: by their names in the family's table, in their layout on disk.
    """

    def __init__(self, source: Source, tensors: Mapping[str, Tensor]):
        self.place, self.tensors = source.place, tensors

    def raw(self, weight: str, layer: int | None) -> Tensor:
        name, entry, part = self.place[weight, layer]
        return replace(entry, offset=0.0).from_disk(self.tensors[name])[part]

    def read(self, weight: str, layer: int | None) -> Tensor:
        return exact(self.raw(weight, layer))

    def zeros(self, weight: str, layer: int | None) -> Tensor:
        return torch.zeros_like(self.read(weight, layer))


@dataclass(frozen=True)
class Carry(Expand):
    """What dual maps make of the moments of one tensor on disk."""

    power: int = 1
    scaled: bool = True

    def factor(self, weight: Weight) -> float:
        return super().factor(weight) ** -self.power if self.scaled else 1.0

    @property
    def is_new(self) -> bool:
        """Is there nothing old that it could be made of?"""
        names = [weight.name for weight in self.entry.weights]
        if self.maps.drawn.keys() & set(names):
            return True
        return self.layer is not None and not all(self.maps.depth[name][self.layer] for name in names)

    def made(self, moment: Moment, filled: bool) -> Tensor:
        """In its layout on disk. filled: new rows and columns get the mean of the others, not zero."""
        weights = []
        for weight in self.entry.weights:
            x = self.expanded(self.mixed(moment, weight), weight)
            weights.append(self._filled(x, weight) if filled else x)
        return replace(self.entry, offset=0.0).to_disk(weights)

    def _filled(self, x: Tensor, weight: Weight) -> Tensor:
        for axis, wire in enumerate(weight.wires):
            of = self.maps.of(wire, self.layer)
            if of is None:
                continue
            new = new_units(of, weight.reads and axis == len(weight.wires) - 1)
            if new.any():
                mean = x.index_select(axis, (~new).nonzero().flatten()).mean(axis, keepdim=True)
                shape = [-1 if i == axis else 1 for i in range(x.ndim)]
                x = torch.where(new.view(shape), mean, x)
        return x


def carries(
    source: Source, target: Model, maps: Maps, power: int, only_first: bool = False
) -> dict[str, Carry]:
    """Of every tensor of the target, what makes its moments; power: 1 of means, 2 of squares."""
    old, new = source.model.architecture, target.architecture
    duals = dual_maps(old, new, maps, power, only_first)
    table: dict[str, tuple[Entry, int | None]] = target.table()
    return {
        name: Carry(entry, layer, duals, old, new, 0, power, not only_first)
        for name, (entry, layer) in table.items()
    }
