"""What learns: the small model's weights and the parameters that make large ones of them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from growth.architecture import Weight
from growth.plan import Source


class Operator(nn.Module):
    """It holds the small model's weights, in float32, and makes large ones of them.

    keeps: are numbers that were drawn kept, for the next time, or drawn again?
    """

    def __init__(self, source: Source):
        super().__init__()
        self.keeps = False
        self.drawn: dict[tuple[str, int, torch.device], Tensor] = {}
        model = source.model.architecture
        for weight in model.outside:
            self.register_buffer(key(weight.name), source.read(weight.name, None).float(), persistent=False)
        for name in model.layered:
            layers = range(model.stack_of(name)[1].layers)
            x = torch.stack([source.read(name, j).float() for j in layers])
            self.register_buffer(key(name), x, persistent=False)
        self.rounded: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def forget(self) -> None:
        """What can be made again."""
        self.rounded.clear()
        self.drawn.clear()

    def held(self, name: str) -> Tensor:
        """A buffer in the dtype that products run in: under autocast a copy in 16 bits, made once."""
        x = getattr(self, key(name))
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return x
        copy_of = name, x.device, torch.get_autocast_dtype(kind)
        if copy_of not in self.rounded:
            self.rounded[copy_of] = x.to(copy_of[-1])
        return self.rounded[copy_of]

    def small(self, weight: Weight) -> Tensor:
        """A weight of the small model; those of all layers, [L, ...], where it is layered."""
        return getattr(self, key(weight.name))

    def wide(self, weights: Sequence[Weight], layer: int | None) -> list[Tensor]:
        """Weights of one layer of the large model, or of none, as they are now; differentiable."""
        raise NotImplementedError

    def matrix(self, weight: Weight) -> Tensor | None:
        """The map [T, S] of the last axis of a weight outside the layers; None where that does not grow."""
        raise NotImplementedError


def exactly(x: Tensor) -> AbstractContextManager:
    """No 16 bits: for what makes vectors and the stream of embeddings, which models have in float32."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def key(name: str) -> str:
    """A name for parameters and buffers, which may have no dots."""
    return name.replace(".", "/")
