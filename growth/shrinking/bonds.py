"""Which units stay or go together, and where each layer reads them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from growth.architecture import Architecture, Experts, Linear, Norm, Op, Tied
from growth.methods.copying import together

Place = tuple[str, int | None]  # a class of wires, and the layer of the source; None: one choice for all


@dataclass(frozen=True)
class Site:
    """What one or several ops read: `wire` in that layer, as it is when the first of them does.

    name: of the first one's weight. readers: the linear ops, none for the norm that reads it.
    """

    name: str
    wire: str
    layer: int | None
    op: Op
    readers: tuple[Linear | Tied, ...] = ()


class Bonds:
    """A model's wires in classes whose units go together, each by the name of one of them.

    shared: wires of layers whose units are chosen once for all of them.
    """

    def __init__(self, model: Architecture, shared: Iterable[str] = ()):
        self.model, self.of = model, dict(together(model))
        for op in model.ops:
            if isinstance(op, Tied):  # its table's columns are those of the stream
                self._join(op.reads, model.table(op.table).writes)
        # One choice for all layers.
        self.whole = {self.of[wire] for wire in model.growing if "{}" not in wire or wire in shared}

    def _join(self, one: str, other: str) -> None:
        names = {self.of[one], self.of[other]}
        self.of = {wire: min(names) if name in names else name for wire, name in self.of.items()}

    def place(self, wire: str, layer: int | None) -> Place:
        name = self.of[wire]
        return name, None if name in self.whole else layer

    def wires(self, name: str) -> list[str]:
        """Those of a class that may change."""
        return [wire for wire in self.model.growing if self.of[wire] == name]

    def router(self, op: Experts) -> Linear:
        """What writes the logits of a mixture."""
        return next(x for x in self.model.all_ops if isinstance(x, Linear) and x.writes == op.logits)

    def mixture(self, op: Op) -> Experts | None:
        """The experts whose logits an op writes."""
        mixtures = (x for x in self.model.all_ops if isinstance(x, Experts))
        return next((x for x in mixtures if x.logits == getattr(op, "writes", "")), None)

    def ops(self) -> Iterator[tuple[int | None, tuple[Op, ...]]]:
        """Those of each layer, then those outside, which may read what the layers leave."""
        for stack in self.model.stacks.values():
            for layer, kind in enumerate(stack.kinds):
                yield layer, stack.blocks[kind]
        yield None, self.model.ops

    @cached_property
    def sites(self) -> list[Site]:
        """Everything that linear ops, and norms over a wire, read of wires that may change."""
        found: list[Site] = []
        for layer, ops in self.ops():
            reading: dict[str, int] = {}  # of each wire, the site that holds what is there now
            for op in ops:
                wire = getattr(op, "reads", "")
                if isinstance(op, Linear | Tied) and wire in self.model.growing:
                    if wire not in reading:
                        reading[wire] = len(found)
                        found.append(Site(site_name(op, layer), wire, layer, op))
                    at = reading[wire]
                    found[at] = Site(found[at].name, wire, layer, found[at].op, (*found[at].readers, op))
                if isinstance(op, Norm) and op.gain and op.per == "wire" and wire in self.model.growing:
                    found.append(Site(site_name(op, layer), wire, layer, op))
                if isinstance(op, Linear | Norm):
                    reading.pop(op.writes, None)
        return found

    def read_at(self, place: Place) -> list[Site]:
        """The sites of a class where linear ops read it."""
        return [site for site in self.sites if site.readers and self.place(site.wire, site.layer) == place]


def site_name(op: Op, layer: int | None) -> str:
    """The name of an op's weight in that layer."""
    return f"{op.name}.weight" if layer is None else f"{op.name}.weight".format(layer)
