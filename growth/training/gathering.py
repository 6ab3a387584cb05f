"""Layers in a row that compute some positions of their input, and are told of these positions alone."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from growth.errors import refuse

# What layers are told of each position -> the axis that positions lie on.
TOLD = {"position_embeddings": 1, "rotary": 1, "position_ids": 1, "attention_mask": -1, "mask": -1}


class Gathering:
    """Hooks on consecutive layers: the first takes `kept` [B, K] of the T positions, the last puts what comes
    of them back among the others. Nothing happens while `kept` is None.

    Raises Refusal, by the layer's name, where a layer is told something that is not in TOLD.
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.layers = list(layers.values())
        self.kept: Tensor | None = None
        self.signatures = {layer: inspect.signature(type(layer).forward) for layer in self.layers}

    def keep(self, kept: Tensor, T: int) -> None:
        self.kept, self.T = kept, T

    def hooks(self) -> list[RemovableHandle]:
        before = [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in self.layers]
        return [*before, self.layers[-1].register_forward_hook(self._after)]

    def _before(self, layer: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict] | None:
        if self.kept is None:
            return None
        bound = self.signatures[layer].bind(layer, *arguments, **named)
        names = [*bound.arguments][1 : len(arguments) + 1]
        x, *others = arguments
        if layer is self.layers[0]:
            self.whole, x = x, gathered(x, self.kept, 1)
        told = [self._told(layer, name, value) for name, value in zip(names[1:], others)]
        return (x, *told), {name: self._told(layer, name, value) for name, value in named.items()}

    def _after(self, layer: nn.Module, arguments: tuple, output: Any) -> Any:
        if self.kept is None:
            return None
        if not isinstance(output, Tensor):
            raise _unknown(layer, "output beside the stream")
        index = self.kept[..., None].expand_as(output)
        whole, self.whole = self.whole, None
        return whole.scatter(1, index, output.to(whole.dtype))

    def _told(self, layer: nn.Module, name: str, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor) and not value.dim():  # the number of labels
            return value
        if name not in TOLD:
            raise _unknown(layer, name)
        if isinstance(value, tuple):
            return tuple(self._told(layer, name, x) for x in value)
        if not isinstance(value, Tensor):
            raise _unknown(layer, name)
        if value.dim() < 2 or value.shape[axis := TOLD[name]] != self.T:
            raise _unknown(layer, f"{name} of shape {tuple(value.shape)}")
        if (
            axis == -1 and value.dim() == 4 and value.shape[-2] == self.T
        ):  # a mask for each position that reads
            value = gathered(value, self.kept, -2)
        return gathered(value, self.kept, axis)


def gathered(x: Tensor, kept: Tensor, axis: int) -> Tensor:
    """x [B or 1, ...] at the positions `kept` [B, K] of an axis: [B, ...]."""
    axis %= x.dim()
    (B, K), shape = kept.shape, list(x.shape)
    shape[0], shape[axis] = B, K
    index = kept.reshape(B, *(K if i == axis else 1 for i in range(1, x.dim()))).expand(shape)
    return x.expand(B, *x.shape[1:]).gather(axis, index)


def _unknown(layer: nn.Module, what: str):
    expected = f"layers that are told {', '.join(TOLD)}"
    return refuse("drop-tokens", expected, f"{type(layer).__name__} with {what}", "leave it out")
