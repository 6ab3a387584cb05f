"""Scores from the weights alone.

    unit     |what is written there| |what reads it|, Euclidean norms over all matrices and tables that do; a
             norm's gain counts with those that read what it gives. Of channels over all layers.
    expert   the norm of its row of the router
    layer    the Euclidean norm of all of its matrices

What nothing reads, or nothing writes, has the other factor alone. Han et al. 2015 score single weights so.
"""

from collections import defaultdict

import torch
from torch import Tensor

from growth.architecture import Linear, Norm, Op, Tied
from growth.checkpoint import by_rows
from growth.expand import BLOCK
from growth.plan import Source
from growth.shrinking.bonds import Bonds, Place


class Magnitude:
    """One pass over the source's tensors, in blocks of rows; of each entry of each wire, what is written and
    read there."""

    def __init__(self, source: Source, bonds: Bonds):
        self.source, self.bonds = source, bonds
        self.written: dict[Place, Tensor] = {}
        self.read: dict[tuple[str, int | None], Tensor] = {}
        self.whole: dict[tuple[str, int], float] = defaultdict(float)
        model = bonds.model
        for prefix, stack in model.stacks.items():
            for layer, kind in enumerate(stack.kinds):
                self._look(stack.blocks[kind], layer, prefix)
        self._look(model.ops, None, "")

    def layers(self, prefix: str) -> Tensor:
        found = [x for (of, _), x in self.whole.items() if of == prefix]
        return torch.tensor(found, dtype=torch.float64).sqrt()

    def units(self, place: Place, most: int, block: int = 1) -> Tensor:
        wires = self.bonds.wires(place[0])
        units = self.bonds.model.wires[wires[0]].units
        nothing = torch.zeros(units, dtype=torch.float64)
        read = sum((self._units(x, units) for x in self._read(place)), nothing)
        score = torch.ones_like(nothing)
        for x in (self.written.get(place, nothing), read):
            score = score * x.sqrt() if x.any() else score
        return score.view(-1, block).sum(1)

    def experts(self, router: Linear, layer: int) -> Tensor:
        return self.source.read(f"{router.name}.weight", layer).double().norm(dim=1)

    def entries(self, wire: str, layer: int | None) -> Tensor:
        """Of each entry of a wire in that layer, the sum of squares of what reads it, [S]."""
        size = self.bonds.model.wires[wire].size
        return self.read.get((wire, layer), torch.zeros(size, dtype=torch.float64))

    def _read(self, place: Place) -> list[Tensor]:
        return [x for (wire, at), x in self.read.items() if self.bonds.place(wire, at) == place]

    def _units(self, x: Tensor, units: int) -> Tensor:
        return x.view(units, -1).sum(1)

    def _look(self, ops: tuple[Op, ...], layer: int | None, prefix: str) -> None:
        gains: dict[str, Tensor] = {}
        model = self.bonds.model
        for op in ops:
            if isinstance(op, Norm) and op.gain and op.per == "wire":
                gains[op.writes] = self.source.read(f"{op.name}.weight", layer).double() ** 2
            if isinstance(op, Tied):
                self._add_read(op.reads, layer, self._squares(f"{op.table}.weight", None)[1], gains)
            for weight in op.weights():
                if len(weight.wires) != 2:
                    continue
                sums = tuple(x * weight.scale**2 for x in self._squares(weight.name, layer))
                if layer is not None:
                    self.whole[prefix, layer] += sums[0].sum().item()
                for axis, wire in enumerate(weight.wires):
                    if wire not in model.growing:
                        continue
                    if axis == 1 and weight.reads:
                        self._add_read(wire, layer, sums[1], gains)
                    else:
                        x = self._units(sums[axis], model.wires[wire].units)
                        place = self.bonds.place(wire, layer)
                        self.written[place] = self.written.get(place, 0) + x

    def _squares(self, name: str, layer: int | None) -> tuple[Tensor, Tensor]:
        """The sums of squares of a matrix's rows, and of its columns, in float64."""
        x, rows = self.source.raw(name, layer), []
        columns = torch.zeros(x.shape[1], dtype=torch.float64)
        for part in by_rows(x.shape, BLOCK):
            squares = x[part].double() ** 2
            rows.append(squares.sum(1))
            columns += squares.sum(0)
            del squares  # before the next are made
        return torch.cat(rows), columns

    def _add_read(self, wire: str, layer: int | None, squares: Tensor, gains: dict[str, Tensor]) -> None:
        """squares: the sum of what reads each entry."""
        self.read[wire, layer] = self.read.get((wire, layer), 0) + squares * gains.get(wire, 1.0)
