"""How weights lie on disk: names, and layouts that are read both ways.

A tensor on disk may hold several weights (a fused projection) or one with its axes in another order; its
layout is an einops pattern from the disk to the weight, whose reverse writes it back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from growth.architecture import Architecture, Weight


@dataclass(frozen=True)
class Stored:
    """How a module's tensors, or one tensor, lie on disk.

    name      of the module there, without ".weight"; of a tensor, with it
    layout    einops, from the disk to the weight, "" where that is as it is. Of a fused tensor it puts the
              weights on a first axis `part`; `h` is the number of heads. Without one they lie side by side
    bias      the layout of the bias
    lengths   of axes that the pattern cannot tell: the fields of the configuration that hold them
    offset    what is stored is so much less than the weight: 1 for a gain that is stored as w - 1
    less_one  the field of the configuration, if any, under which offset is 1
    """

    name: str
    layout: str = ""
    bias: str = ""
    lengths: tuple[tuple[str, str], ...] = ()
    offset: float = 0.0
    less_one: str = ""


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: its weights, and the layout from the disk to them.

    sizes: of the weights' first axes; lengths: of the axes that the layout names.
    """

    weights: tuple[Weight, ...]
    sizes: tuple[int, ...]
    layout: str = ""
    lengths: tuple[tuple[str, int], ...] = ()
    offset: float = 0.0

    def from_disk(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.offset:
            x = x.double() + self.offset  # in float32, 1 + w would round w
        if self.layout:
            x = rearrange(x, self.layout, **dict(self.lengths))
        return tuple(x) if self.fused else x.split(self.sizes)

    def to_disk(self, weights: Iterable[Tensor]) -> Tensor:
        weights = [*weights]
        x = torch.stack(weights) if self.fused else torch.cat(weights) if len(weights) > 1 else weights[0]
        if self.layout:
            disk, inside = self.layout.split("->")
            x = rearrange(x, f"{inside}->{disk}", **dict(self.lengths))
        return x - self.offset if self.offset else x

    @property
    def fused(self) -> bool:
        return "part" in self.layout

    @property
    def by_rows(self) -> bool:
        """Is a block of rows on disk one of a weight's own?"""
        return not self.layout

    def shape(self, model: Architecture) -> tuple[int, ...]:
        """The shape on disk where the wires have the sizes of `model`."""
        return tuple(self.to_disk(torch.empty(model.shape(x), device="meta") for x in self.weights).shape)


def block(
    disk: str, modules: Mapping[str | tuple[str, ...], str | Stored], weights: str = "layers.{}."
) -> dict:
    """Names of a layer: both columns with their prefixes."""
    out = {}
    for key, stored in modules.items():
        keys = tuple(weights + name for name in key) if isinstance(key, tuple) else weights + key
        stored = stored if isinstance(stored, Stored) else Stored(stored)
        out[keys] = replace(stored, name=disk + stored.name)
    return out
