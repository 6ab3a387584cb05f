"""A model as growth sees it: weights, each living between named spaces.

A space is a set of interchangeable units: the channels of the residual stream, the heads of one layer's
attention, the neurons of one feed-forward block. Axis 0 of a weight is written (its module produces that
space), axis 1 is read (its module consumes it); a vector has only axis 0. A name that holds `{}` exists once
per layer.

    residual   the stream that every block adds to          gain      the gains of the norms
    normed     what a norm hands to its readers             final     what the last norm hands to the head
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Weight:
    """One matrix [written, read] or vector [written]; `spaces` names its axes, () where nothing grows."""

    name: str
    spaces: tuple[str, ...] = ()

    @property
    def layered(self) -> bool:
        return "{}" in self.name


class Space(NamedTuple):
    """`units` interchangeable units of `width` entries each: 7 heads of 24, or 168 channels of 1."""

    units: int
    width: int = 1

    @property
    def size(self) -> int:
        return self.units * self.width


@dataclass(frozen=True)
class Architecture:
    """All that an operator may look at: the weights, the size of each space, the depth, and how a fresh model
    starts.

    `tied` says that the head is the embedding; `init_std` is the standard deviation of a freshly initialised
    matrix.
    """

    weights: tuple[Weight, ...]
    spaces: dict[str, Space]
    layers: int
    norm_eps: float
    init_std: float
    tied: bool = False
