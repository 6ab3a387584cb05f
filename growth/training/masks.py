"""Masks that open during training: a model that `growth grow --method msg` made starts as its source.

    readers  take m x of what new units carry          norms   weigh each unit by its m in mean and variance
    layers   m f(x) + (1 - m) x, the new ones          m       min(1, step / steps)

Yao et al., ICLR 2024 (2305.02869). Nothing is masked at m = 1: the hooks are gone then, the model is plain.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from growth.architecture import Linear, Norm, Output, Tied
from growth.checkpoint import Checkpoint
from growth.errors import Refusal, refuse
from growth.families import model_of
from growth.families.table import Model, listed
from growth.record import RECORD
from growth.training.skipping import Forward

GIVEN = {"pooled": "pooler_output"}  # of wires that a model gives; all others as this
STATES = "last_hidden_state"


class OpenMasks(TrainerCallback, ExportableState):
    """Closes the masks of new units and layers as training begins, and opens them linearly in `steps` steps.

    grown: the folder of a checkpoint that method msg made, or its growth.json as a dict. A callback for any
    `transformers.Trainer`, before those that measure: what is evaluated after step n has n / steps of what is
    new, and step n trains at that. With `steps` 0 nothing is ever masked. An interrupted run resumes exactly,
    for the masks follow from the step alone; what is saved is the plain model.

    Raises Refusal where the record has nothing new or is not this model's, where training ends before the
    masks are open, where FSDP shares the weights out, where an earlier checkpoint, masks half open, would be
    loaded at the end, and where what reads a new unit is never called, as in a fused kernel. A line tells
    where another callback stops training before they are.
    """

    def __init__(self, grown: str | Path | Mapping[str, Any], steps: int):
        self.closed = closed_of(grown)
        if not self.closed:
            expected = f"a checkpoint with what is new in its {RECORD}, as method msg writes it"
            raise refuse("masks", expected, "nothing new", "train without masks")
        if not isinstance(steps, int) or steps < 0:
            raise refuse(
                "masks", "a whole number of steps, at least 0", steps, "a quarter of the steps is usual"
            )
        self.steps, self.masks = steps, None

    @property
    def opened(self) -> float:
        """m, as it is now."""
        return 1.0 if self.masks is None else self.masks.opened

    def state(self) -> dict:
        return {"args": {"grown": {"closed": self.closed}, "steps": self.steps}, "attributes": {}}

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        refuse_unopened(self.steps, state.max_steps)
        if args.fsdp:
            raise refuse_shared()
        if args.load_best_model_at_end:
            remedy = "set it to False"
            raise refuse("masks", "the model of the last step", "load_best_model_at_end", remedy)
        if self.masks is None and state.global_step < self.steps:
            self.masks = Masks(model, self.closed)
        self._open(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._open(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        if self.masks is not None and (idle := self.masks.idle()):
            remedy = "train without the fused kernel, or with --masks 0"
            raise refuse("masks", "a model that calls its modules", f"{idle}, which is not called", remedy)

    def on_train_end(self, args, state, control, **kwargs):
        if self.masks is not None and state.is_world_process_zero:  # a callback stopped it
            left = f"masks are open by {self.opened:.2f} after {state.global_step} of {self.steps} steps"
            print(f"{left}: what is saved is the model without masks, which is another", file=sys.stderr)

    def _open(self, step: int) -> None:
        if self.masks is None:
            return
        if step >= self.steps:
            self.masks.remove()
            self.masks = None
        else:
            self.masks.open(step / self.steps)


class Masks:
    """Hooks in a loaded model, which then computes with masks, closed at first; `remove` leaves it plain.

    closed: as growth.fresh.closed has it. Raises Refusal where that is not this model's.
    """

    def __init__(self, model: PreTrainedModel, closed: Mapping[str, Any]):
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        seen = model_of(model.config, names)
        if seen is None:
            got = model.config.model_type
            raise refuse("masks", "a model of the families that grow", got, "train without masks")
        if missing := sorted(seen.table().keys() - seen.modules(names).keys()):
            got, remedy = f"one without {listed(missing)}", "close them in the model before it is wrapped"
            raise refuse("masks", f"the weights of a {model.config.model_type}", got, remedy)
        self.model, self.opened, self.called, self._hooks = model, 0.0, set(), []
        some = next(model.parameters())
        place = {"device": some.device, "dtype": torch.promote_types(some.dtype, torch.float32)}
        self.at_first = {
            wire: _at_first(seen, wire, runs).to(**place) for wire, runs in closed["wires"].items()
        }
        self.now = {wire: x.clone() for wire, x in self.at_first.items()}
        self.layer = torch.zeros((), **place)
        self.watched: set[str] = set()
        for path, wire, kind in _modules(model, seen, names, self.now):
            {"reads": self._reads, "layer": self._layer_norm, "rms": self._rms_norm}[kind](model, path, wire)
        for path in _new_layers(seen, names, closed["layers"]):
            self._hooked(model, path, after=self._blended)
        given = [op.reads for op in seen.architecture.ops if isinstance(op, Output) and op.reads in self.now]
        if given:
            self._hooks.append(model.register_forward_hook(self._given(given)))

    def open(self, m: float) -> None:
        """Lets m of what is new through."""
        self.opened = m
        self.layer.fill_(m)
        for wire, x in self.at_first.items():
            self.now[wire].copy_(x + (1 - x) * m)

    def remove(self) -> None:
        self.open(1.0)  # for who compiled the hooks in
        for hook in self._hooks:
            hook.remove()

    def idle(self) -> str:
        """A module whose mask has not been asked for, though no step left its layer out; "" for none."""
        if not (left := sorted(self.watched - self.called)):
            return ""
        skipped = tuple(
            f"{name}."
            for name, module in self.model.named_modules()
            if isinstance(forward := module.__dict__.get("forward"), Forward) and not forward.ran
        )
        return next((path for path in left if not path.startswith(skipped)), "")

    def _hooked(
        self, model: nn.Module, path: str, before: Callable | None = None, after: Callable | None = None
    ) -> None:
        module = model.get_submodule(path)
        self.watched.add(path)
        self._hooks.append(module.register_forward_pre_hook(lambda *_: self.called.add(path)))
        if before:
            self._hooks.append(module.register_forward_pre_hook(before))
        if after:
            self._hooks.append(module.register_forward_hook(after, with_kwargs=True))

    def _reads(self, model: nn.Module, path: str, wire: str) -> None:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0] * self.now[wire].to(inputs[0].dtype), *inputs[1:])

        self._hooked(model, path, before)

    def _layer_norm(self, model: nn.Module, path: str, wire: str) -> None:
        def after(module: nn.LayerNorm, inputs: tuple[Tensor, ...], _: dict, y: Tensor) -> Tensor:
            x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
            share = self.now[wire].to(x.dtype)
            share = share / share.sum()
            x = x - (x * share).sum(-1, keepdim=True)
            x = x * ((x * x * share).sum(-1, keepdim=True) + module.eps).rsqrt()
            return (x * module.weight + module.bias).to(y.dtype)

        self._hooked(model, path, after=after)

    def _rms_norm(self, model: nn.Module, path: str, wire: str) -> None:
        """Whatever its gain and its gate: the norm of sqrt(m T / sum m) x, over that factor again."""

        def root(x: Tensor) -> Tensor:
            m = self.now[wire]
            return (m * (len(m) / m.sum())).sqrt().to(x.dtype)

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            x = inputs[0]  # heads side by side are flattened by the norm, which calls itself then
            return (x * root(x), *inputs[1:]) if x.shape[-1] == len(self.now[wire]) else None

        def after(module: nn.Module, inputs: tuple[Tensor, ...], _: dict, y: Tensor) -> Tensor | None:
            if y.shape[-1] != len(self.now[wire]):
                return None
            factor = root(y)
            return y * torch.where(factor > 0, 1 / factor.clamp(min=torch.finfo(y.dtype).tiny), 0.0)

        self._hooked(model, path, before, after)

    def _blended(self, module: nn.Module, inputs: tuple, given: dict, output: Any) -> Any:
        x = inputs[0] if inputs else given["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        m = self.layer.to(y.dtype)
        y = m * y + (1 - m) * x
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _given(self, wires: list[str]) -> Callable:
        def after(module: nn.Module, inputs: tuple, output: Any) -> Any:
            for wire in wires:
                name = GIVEN.get(wire, STATES)
                if output.get(name) is not None:
                    output[name] = output[name] * self.now[wire].to(output[name].dtype)
            return output

        return after


def closed_of(grown: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """What masks hold closed at first in a checkpoint that growth made, {} where nothing is."""
    record = grown if isinstance(grown, Mapping) else Checkpoint(grown).record()
    return dict(record.get("closed", {}))


def refuse_shared() -> Refusal:
    """What says that masks and FSDP do not go together."""
    return refuse("masks", "whole weights on each process", "FSDP", "train without it, or with --masks 0")


def mask_steps(closed: Mapping[str, Any], asked: int | None, steps: int) -> int | None:
    """The steps in which masks open: by default a quarter of all, None where none are closed.

    Raises Refusal where masks are asked for and none are closed, and where they would not be open at the end.
    """
    if not closed:
        if asked is not None:
            expected = f"a checkpoint with masks to open in its {RECORD}, as method msg writes it"
            raise refuse("masks", expected, "none", "leave it out")
        return None
    found = math.ceil(steps / 4) if asked is None else asked
    if found < 0:
        raise refuse("masks", "a number of steps, at least 0", found, "leave it out")
    refuse_unopened(found, steps)
    return found


def refuse_unopened(steps: int, of: int) -> None:
    """Raises Refusal where training ends before masks are open."""
    if steps > of:
        remedy = "choose fewer, for what is saved is the model without masks"
        raise refuse("masks", f"at most the {of} steps of training", steps, remedy)


def _at_first(seen: Model, wire: str, runs: list[list[float]]) -> Tensor:
    """[T]: the share of each entry while masks are closed, float32."""
    size = seen.architecture.wires[wire].size if wire in seen.architecture.wires else 0
    if not runs or max(run[1] for run in runs) > size:
        raise refuse(
            "masks", f"what is new in this model's wire {wire}", f"{size} entries", "name its own folder"
        )
    x = torch.ones(size)
    for first, last, share in runs:
        x[int(first) : int(last)] = share
    return x


def _modules(
    model: PreTrainedModel, seen: Model, names: list[str], wires: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, str]]:
    """The modules that read these wires: path, wire, and how: reads, or the kind of norm."""
    paths = seen.modules(names)
    ops = {weight.name: op for op in seen.architecture.all_ops for weight in op.weights()}
    found = {}
    for name, (entry, _) in seen.table().items():
        op = ops[entry.weights[0].name]
        if isinstance(op, Linear) and op.reads in wires:
            found[paths[name]] = op.reads, "reads"
        elif isinstance(op, Norm) and op.per == "wire" and op.reads in wires:
            found[paths[name]] = op.reads, op.kind
    for op in seen.architecture.ops:
        if isinstance(op, Tied) and op.reads in wires:
            head = model.get_output_embeddings()
            found[next(path for path, module in model.named_modules() if module is head)] = op.reads, "reads"
    for path, (wire, kind) in found.items():
        yield path, wire, kind


def _new_layers(seen: Model, names: list[str], layers: Mapping[str, list[int]]) -> Iterator[str]:
    """The modules of the new layers."""
    paths = seen.modules(names)
    for prefix, numbers in layers.items():
        for name, (entry, layer) in seen.table().items():
            if layer in numbers and entry.weights[0].name.startswith(f"{prefix}layers."):
                numbers = [i for i in numbers if i != layer]
                yield f"{paths[name].split(f'.{layer}.')[0]}.{layer}"
