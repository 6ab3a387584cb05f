"""Scores from what a model's wires carry on data.

activation   a unit's root mean square where matrices read it, of channels over all layers (Muralidharan et
             al. 2024, eq. 1 and 2); of a layer how much it adds, |y - x| / |x|; of an expert how many tokens
             choose it
redundancy   of a layer 1 - cos(x, y) (Men et al. 2024); of units the order of a Cholesky factor of E[x x^T]
             with pivots, each weighted by the norm of what reads it: next comes the one of which those before
             it leave most. A copy of a unit that stays comes last. Experts as by activation

A unit that no matrix reads is scored by magnitude.
"""

import torch
from torch import Tensor

from growth.architecture import Linear
from growth.shrinking.bonds import Bonds, Place
from growth.shrinking.calibration import Calibration
from growth.shrinking.magnitude import Magnitude


class Activation:
    """Larger ones stay."""

    def __init__(self, bonds: Bonds, found: Calibration, magnitude: Magnitude):
        self.bonds, self.found, self.magnitude = bonds, found, magnitude

    def layers(self, prefix: str) -> Tensor:
        return torch.tensor([row["added"] for row in self.found.layers[prefix]], dtype=torch.float64)

    def experts(self, router: Linear, layer: int) -> Tensor:
        chosen = self.found.chosen(router, layer)
        return self.magnitude.experts(router, layer) if chosen is None else chosen

    def units(self, place: Place, most: int, block: int = 1) -> Tensor:
        sites = [site for site in self.bonds.read_at(place) if site in self.found]
        if not sites:
            return self.magnitude.units(place, most, block)
        units = self.bonds.model.wires[sites[0].wire].units
        squares = sum(self.found.square(site).view(units, -1).sum(1) for site in sites)
        return squares.view(-1, block).sum(1).sqrt()


class Redundancy(Activation):
    """What the others do not tell stays."""

    def layers(self, prefix: str) -> Tensor:
        return torch.tensor([1 - row["cosine"] for row in self.found.layers[prefix]], dtype=torch.float64)

    def units(self, place: Place, most: int, block: int = 1) -> Tensor:
        sites = [site for site in self.bonds.read_at(place) if site in self.found]
        if not sites:
            return self.magnitude.units(place, most, block)
        units = self.bonds.model.wires[sites[0].wire].units
        width = self.bonds.model.wires[sites[0].wire].width
        order, left = pivots(self.gram(place), width * block, most if width * block == 1 else units // block)
        score = left / left.max().clamp(min=torch.finfo(left.dtype).tiny)  # at most 1, of those that are left
        score[order] = torch.arange(len(order), 0, -1, dtype=score.dtype) + 1
        return score

    def gram(self, place: Place) -> Tensor:
        """sum of D^1/2 E[x x^T] D^1/2, where D is what reads each entry, over the places that read the class,
        [S, S]."""
        total = None
        for site in self.bonds.read_at(place):
            weight = self.magnitude.entries(site.wire, site.layer).sqrt()
            part = self.found.moments(site).mul_(weight).mul_(weight[:, None])
            total = part if total is None else total.add_(part)
        return total


def pivots(gram: Tensor, width: int, most: int, floor: float = 1e-9) -> tuple[list[int], Tensor]:
    """At most so many blocks of `width` entries, each the one of which those before leave most, while some is
    left.

    gram [S, S]. Returns the order, and what is left of each block, [S / width], which is 0 for those in it.
    """
    left, columns = gram.diagonal().clone(), gram.new_zeros(len(gram), most * width)
    order: list[int] = []
    least, used = floor * left.view(-1, width).sum(1).max(), 0
    while len(order) < most and (blocks := left.view(-1, width).sum(1)).max() > least:
        pivot = int(blocks.argmax())
        at = slice(pivot * width, (pivot + 1) * width)
        residual = gram[:, at] - columns[:, :used] @ columns[at, :used].T
        values, vectors = torch.linalg.eigh(residual[at])
        some = values > floor * values.max()
        new = residual @ (vectors[:, some] * values[some].rsqrt())
        columns[:, used : used + new.shape[1]] = new
        used += new.shape[1]
        left = (left - new.square().sum(1)).clamp_(min=0)
        left[at] = 0
        order.append(pivot)
    return apart(gram, width, most, order)


def apart(gram: Tensor, width: int, most: int, order: list[int]) -> tuple[list[int], Tensor]:
    """The order, and on with what single entries of those in it tell least of, to the same end.

    Few data span few directions: a unit that the others tell together may be told by none of them alone, and
    is no copy that can go.
    """
    own = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
    left, order = own.clone(), list(order)

    def without(left: Tensor, at: slice) -> Tensor:
        told = (gram[:, at].square() / own[at]).amax(1)
        left = torch.minimum(left, (own - told).clamp(min=0))
        left[at] = 0
        return left

    for pivot in tuple(order):
        left = without(left, slice(pivot * width, (pivot + 1) * width))
    while len(order) < most:
        pivot = int(left.view(-1, width).sum(1).argmax())
        if pivot in order:
            break
        order.append(pivot)
        left = without(left, slice(pivot * width, (pivot + 1) * width))
    return order, left.view(-1, width).sum(1)
