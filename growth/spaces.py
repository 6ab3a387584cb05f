"""A model as growth sees it: weights, each living between named spaces.

A space is a set of interchangeable units: the channels of the residual stream, the heads of one layer's
attention, the neurons of one feed-forward block. Axis 0 of a weight is written (its module produces that
space), axis 1 is read (its module consumes it); a vector has only axis 0. A name that holds `{}` exists once
per layer.

    residual   the stream that every block adds to          gain      the gains of the norms
    normed     what a norm hands to its readers             final     what the last norm hands to the head
    transform  the neurons of BERT's head, before its norm

In a post-norm model what a norm gives is the stream that the next block adds to: `normed` and `residual` are
then written alike. The last norm reads `transform` where there is one, and the stream elsewhere.
"""

import math
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


FIXED = ("vocab", "positions", "types")  # rows of the embeddings: growth leaves their number alone


def transformer_spaces(hidden: int, heads: int, ffn: int) -> dict[str, Space]:
    """The spaces that every family has and growth widens."""
    spaces = {name: Space(hidden) for name in ("residual", "gain", "normed", "final_gain", "final")}
    spaces |= {f"{name}.{{}}": Space(heads, hidden // heads) for name in ("query", "key", "value")}
    return spaces | {"ffn.{}": Space(ffn)}


@dataclass(frozen=True)
class Architecture:
    """All that an operator may look at: the weights, the size of each space, the depth, and how a fresh model
    starts.

    `tied` says that the head is the embedding, `post_norm` that each norm follows its block, over the sum;
    `init_std` is the standard deviation of a freshly initialised matrix.
    """

    weights: tuple[Weight, ...]
    spaces: dict[str, Space]
    layers: int
    norm_eps: float
    init_std: float
    tied: bool = False
    post_norm: bool = False

    @property
    def parameters(self) -> int:
        return sum(
            math.prod(self.spaces[space].size for space in weight.spaces)
            * (self.layers if weight.layered else 1)
            for weight in self.weights
        )
