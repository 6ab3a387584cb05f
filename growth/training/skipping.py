"""Layers that a step of training leaves out: their input is their output, and nothing of them is computed.

    x_{l+1} = x_l + (B_l(x_l) - x_l) scale      where layer l, whose block is B_l, is run
    x_{l+1} = x_l                               where it is skipped
    x_{l+1} = B_l(x_l), a constant              where it is held: no gradient goes into it or below

What a layer hands on beside the stream (T5: biases by distance) a skipped one hands on as it came. The first
layer of a stack always runs. Weights of skipped layers get no gradient, so AdamW leaves them as they are, and
their moments.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from growth.training.flops import Saving, StepFlops
from growth.training.layers import layers_of


class Skipping(Saving, TrainerCallback):
    """A callback whose heirs say in `on_step_begin` which layers the step skips: `self.skipped`, the names of
    their modules, which it holds, `self.held`, and `self.scales`, by name, of those that run (1 where none).

    Evaluation, which is not in training mode, runs every layer.
    """

    def __init__(self):
        self.stacks: dict[str, list[str]] = {}
        self.skipped: frozenset[str] = frozenset()
        self.held: frozenset[str] = frozenset()
        self.scales: Mapping[str, float] = {}
        self._forwards: list[Forward] = []

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        self._leave()  # a run that was broken off
        found = layers_of(model, type(self).__name__)
        self.stacks = {prefix: list(layers) for prefix, layers in found.items()}
        for layers in found.values():
            handed: list[Any] = []
            for name, layer in layers.items():
                if not isinstance(layer.__dict__.get("forward"), Forward):
                    layer.forward = Forward(layer, name, handed)
                layer.forward.users.append(self)
                self._forwards.append(layer.forward)

    def on_step_end(self, args, state, control, **kwargs):
        for forward in self._forwards:
            forward.handed.clear()  # which hold the step's graph

    def on_train_end(self, args, state, control, **kwargs):
        self._leave()

    def _leave(self) -> None:
        for forward in self._forwards:
            forward.leave(self)
        self._forwards, self.skipped, self.held, self.scales = [], frozenset(), frozenset(), {}

    def spent(self, flops: StepFlops) -> StepFlops:
        return flops.without_backward(self.held).without(self.skipped)


class Forward:
    """A layer's forward that callbacks may have skipped, in the layer's place as long as there are some.

    handed: what the stack's last layer that ran gave beside the stream.
    """

    def __init__(self, layer: nn.Module, name: str, handed: list[Any]):
        self.layer, self.name, self.handed, self.inner = layer, name, handed, layer.forward
        self.users: list[Skipping] = []
        self.ran = False  # ever

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.layer.training:
            return self.inner(x, *args, **kwargs)
        if any(self.name in user.skipped for user in self.users):
            return (x, *self.handed) if self.handed else x
        self.ran = True
        held = any(self.name in user.held for user in self.users)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not held):
            out = self.inner(x, *args, **kwargs)
        alone = isinstance(out, Tensor)
        y, self.handed[:] = (out, ()) if alone else (out[0], out[1:])
        for user in self.users:
            if (scale := user.scales.get(self.name, 1.0)) != 1:
                y = x + (y - x) * scale
        return y if alone else (y, *self.handed)

    def leave(self, user: Skipping) -> None:
        self.users.remove(user)
        if not self.users:
            del self.layer.forward
