"""FINE's factors: found a layer at a time, put together, and what of them learns (growth.methods.fine has the
equations)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from growth import apply
from growth.architecture import Weight
from growth.expand import Expand
from growth.learned.maps import LearnedMaps, depth_matrix
from growth.learned.operator import key
from growth.maps import Maps
from growth.plan import Recipe, Source

if TYPE_CHECKING:
    from growth.growing import Growth


@dataclass(frozen=True)
class Basis:
    """What the layers share of one kind of matrix: written [m, r] and read [n, r'], orthonormal, in float64.

    error: what all layers lose by them, relative to their norm.
    """

    written: Tensor
    read: Tensor
    error: float

    def own(self, x: Tensor) -> Tensor:
        """S = Uᵀ W V of one layer, [r, r']."""
        return self.written.T @ x.double() @ self.read

    def whole(self, own: Tensor) -> Tensor:
        """U S Vᵀ."""
        return self.written @ own.to(self.written) @ self.read.T


def factorised(source: Source, rank: int | None = None) -> dict[str, Basis]:
    """Of each matrix that layers have, by its name: `rank` columns on each side, or all where it has fewer.

    A layer is in memory at a time, and the products of the rows and of the columns of one kind, in float64.
    """
    architecture, found = source.model.architecture, {}
    for name in (name for name, weight in architecture.layered.items() if weight.reads):
        layers = [layer for of, layer in source.place if of == name]
        found[name] = _basis(source, name, layers, rank)
    return found


def _basis(source: Source, name: str, layers: Sequence[int], rank: int | None) -> Basis:
    rows = columns = 0
    for layer in layers:
        x = source.read(name, layer).double()
        rows, columns = rows + x @ x.T, columns + x.T @ x
    written, read = (torch.linalg.eigh(x).eigenvectors.flip(1)[:, :rank] for x in (rows, columns))
    basis = Basis(written.contiguous(), read.contiguous(), 0.0)
    if max(len(rows), len(columns)) <= (rank or math.inf):
        return basis
    whole, lost = rows.trace().item(), 0.0
    for layer in layers:
        x = source.read(name, layer).double()
        lost += (x - basis.whole(basis.own(x))).square().sum().item()
    return Basis(basis.written, basis.read, math.sqrt(lost / whole) if whole else 0.0)


@dataclass(frozen=True)
class Composed(Expand):
    """What the maps make of matrices put together from their factors."""

    bases: Mapping[str, Basis]
    learned: Mapping[str, Tensor]  # S of every new layer, [L, r, r'], where it learned

    def mixed(self, source: Source, weight: Weight) -> Tensor:
        basis = self.bases.get(weight.name)
        if basis is None:
            return super().mixed(source, weight)
        if weight.name in self.learned:
            return basis.whole(self.learned[weight.name][self.layer])
        row = self.maps.depth[weight.name][self.layer]
        own = sum(w * basis.own(source.read(weight.name, j)) for j, w in row)
        return basis.whole(own) if row else basis.written.new_zeros(len(basis.written), len(basis.read))


class Sigmas(LearnedMaps):
    """The maps, whose numbers stay, and an S for each new layer, which learns."""

    def __init__(self, maps: Maps, source: Source, bases: Mapping[str, Basis]):
        super().__init__(maps, source, learn=())
        self.bases = bases
        own = {}
        for name, basis in bases.items():
            old = torch.stack([basis.own(x) for x in self._buffers.pop(key(name))])
            own[key(name)] = torch.tensordot(depth_matrix(maps.depth[name], len(old)), old, 1).float()
            written, read = (maps.of(wire, 0) for wire in source.model.architecture.layered[name].wires)
            wide = basis.written if written is None else apply.write(written, basis.written)
            self.register_buffer(f"{key(name)}/written", wide.float(), persistent=False)
            wide = basis.read.T if read is None else apply.read(read, basis.read.T)
            self.register_buffer(f"{key(name)}/read", wide.float(), persistent=False)
        self.own = nn.ParameterDict(own)

    def _one(self, weight: Weight, layer: int | None) -> Tensor:
        if weight.name not in self.bases:
            return super()._one(weight, layer)
        written, read = (getattr(self, f"{key(weight.name)}/{side}") for side in ("written", "read"))
        return written @ self.own[key(weight.name)][layer] @ read


class Factored:
    """The factors of a source, and what learns of them where there are steps."""

    def __init__(self, growth: "Growth"):
        self.growth, self.lesson, method = growth, None, growth.method
        self.learned: dict[str, Tensor] = {}
        with FlopCounterMode(display=False) as counter:
            if method.steps:
                from growth.learned.fit import Learned  # and the trainer, which takes a second to import

                self.lesson = Learned(growth)
                self.bases = self.lesson.expansion.operator.bases
            else:
                self.bases = factorised(growth.source, method.rank)
        self.flops, self.table = counter.get_total_flops(), growth.target.table()

    def recipe(self, name: str) -> Recipe | None:
        """What makes a tensor of matrices out of their factors; None for any other."""
        entry, layer = self.table[name]
        if not any(weight.name in self.bases for weight in entry.weights):
            return None
        growth = self.growth
        old, new = growth.source.model.architecture, growth.target.architecture
        return Composed(entry, layer, growth.maps, old, new, growth.seed, self.bases, self.learned)

    def fit(self) -> tuple[int, dict[str, Any]]:
        """The operations that took, and what growth.json tells of it: errors, of each kind of matrix."""
        flops, told = self.lesson.fit() if self.lesson else (0, {})
        if self.lesson:
            own = self.lesson.expansion.operator.own
            self.learned |= {name: own[key(name)].detach() for name in self.bases}
        errors = {name: basis.error for name, basis in self.bases.items()}
        return self.flops + flops, told | {"errors": errors}
