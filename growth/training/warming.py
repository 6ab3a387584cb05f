"""New units warm up while old ones train at the full rate.  SPARKLING's re-warmup of what was added.

    update of a new entry = share . what the optimizer made of it
    share = start + (peak - start) (step + 1) / steps,    1 once `steps` are over

For Adam and AdamW, whose update is the rate times something, that is a parameter group of the new entries
with a rate of its own, also where old and new entries share a tensor. SPARKLING's is start 0, peak 1.3 over
250 steps, then the common schedule.
"""

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.families import model_of
from growth.families.stored import Entry
from growth.families.table import Model
from growth.optimizing.saved import parts
from growth.record import RECORD


class WarmNewUnits(TrainerCallback, ExportableState):
    """Scales the updates of what growth.json in `folder` calls new, for the first `steps` steps from where
    training begins or goes on.

    A callback for any `transformers.Trainer` whose model has whole parameters, not sharded ones. A run that
    was interrupted resumes exactly: the state is in trainer_state.json. Raises Refusal where the folder tells
    of no new units, and where a number does not fit.
    """

    def __init__(self, folder: str | Path, steps: int, start: float = 0.0, peak: float = 1.0):
        if steps < 1:
            raise refuse("warm-new", "at least 1 step", steps, "choose a larger number")
        if not (0 <= start < float("inf") and 0 < peak < float("inf")):
            got = f"{start} to {peak}"
            raise refuse("warm-new", "shares of the rate, from 0 on to above 0", got, "such as 0 and 1")
        self.folder, self.steps, self.start, self.peak = str(folder), steps, start, peak
        self.began: int | None = None
        self.names = new_entries(folder)
        told = " ".join(f"{name} {mask.sum().item()}" for name, mask in sorted(self.names.items()))
        self._of = f"{zlib.crc32(told.encode()):08x}"
        self._parameters: list[tuple[nn.Parameter, Tensor]] = []
        self._before: list[Tensor] = []

    def state(self) -> dict:
        return {
            "args": {"folder": self.folder, "steps": self.steps, "start": self.start, "peak": self.peak},
            "attributes": {"began": [self.began, self._of]},
        }

    def share(self, step: int) -> float:
        """Of the rate, in a step."""
        done = step - (self.began or 0)
        if done >= self.steps:
            return 1.0
        return self.start + (self.peak - self.start) * (done + 1) / self.steps

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        self.began = state.global_step
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved and saved["attributes"]["began"][1] == self._of:  # else that of the model before it grew
            self.began = saved["attributes"]["began"][0]
        checkpoint = Checkpoint(self.folder)
        made_of = parts(model, model_of(checkpoint.config, checkpoint.names))
        self._parameters = []
        for name, parameter in model.named_parameters():
            masks = [self.names[part] for part in made_of.get(name, ()) if part in self.names]
            if masks:  # of experts' matrices, which are joined, all have some
                mask = torch.stack(masks).reshape(parameter.shape)
                self._parameters.append((parameter, mask.to(parameter.device)))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.share(state.global_step) != 1.0:
            self._before = [parameter.detach()[mask] for parameter, mask in self._parameters]

    def on_optimizer_step(self, args, state, control, **kwargs):
        share = self.share(state.global_step)
        with torch.no_grad():
            for before, (parameter, mask) in zip(self._before, self._parameters):
                parameter[mask] = torch.lerp(before, parameter[mask], share)
        self._before = []


def new_entries(folder: str | Path) -> dict[str, Tensor]:
    """Of every tensor of a grown checkpoint with new entries, by its name: which these are.

    Raises Refusal where its growth.json tells of none.
    """
    checkpoint = Checkpoint(folder)
    new: Any = checkpoint.record().get("new")
    model = model_of(checkpoint.config, checkpoint.names)
    if not model or not isinstance(new, dict) or not {"wires", "layers"} <= set(new):
        expected = f"a checkpoint with new units in its {RECORD}, as growth grow writes it"
        raise refuse(f"warm-new {folder}", expected, "none", "train without --warm-new")
    masks = {name: _mask(model, entry, layer, new) for name, (entry, layer) in model.table().items()}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _mask(model: Model, entry: Entry, layer: int | None, new: dict) -> Tensor:
    weights = []
    for weight in entry.weights:
        shape = model.architecture.shape(weight)
        whole = layer is not None and layer in new["layers"].get(
            model.architecture.stack_of(weight.name)[0], ()
        )
        mask = torch.full(shape, whole)
        for axis, wire in enumerate(weight.wires):
            width = model.architecture.wires[wire].width
            own = wire if layer is None else wire.format(layer)
            for first, many in new["wires"].get(wire, new["wires"].get(own, ())):
                mask.narrow(axis, first * width, many * width).fill_(True)
        weights.append(mask)
    return replace(entry, offset=0.0).to_disk(weights)
