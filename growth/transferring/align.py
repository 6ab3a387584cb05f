"""Mixers fitted to the attention whose place they take, a layer of the source at a time.

    minimise over the mixer's parameters alone   |mixer(x) - attention(x)|^2 / |attention(x)|^2

where x is what the source's own layer reads.  Kasai et al. 2021 (T2R), Zhang et al. 2024 (LoLCATs), Goldstein
et al. 2025 (RADLADS).

The source runs once over each distinct window. Held are three streams [N, T, hidden_size] of all of them, and
of the source one layer, which is read, watched, fitted to and dropped. No layer's error depends on another
mixer, and steps are taken for each by itself, so fitting all layers at once gives the same; it would hold the
whole source for no gain.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from growth.errors import reason, refuse
from growth.methods.option import refuse_below, refuse_other_types
from growth.training.examples import Examples
from growth.training.progress import RunProgress
from growth.transferring.layers import Layers
from growth.transferring.one_mixer import Cost, Pairs, Steps, descend, solve
from growth.transferring.planned import Made, Start
from growth.transferring.restoration import Restored
from growth.transferring.starting import Starting

DRAWN, SOLVED = "drawn, then fitted to the attention", "solved for to fit the attention"
RATES = {"R": 1e-2, "M": 1.5e-2, "S": 1e-2}
LAST = {"R": "layers.{}.mixer.o.", "M": "layers.{}.mamba.out_proj.", "S": "layers.{}.mamba2.out_proj."}


@dataclass(frozen=True)
class Alignment:
    """How mixers are fitted.

    steps           of AdamW without weight decay; 0: only the last projection, by least squares
    batches         distinct ones, or as many as the data fill, each used again and again
    batch_size      windows in each
    step_size       windows a step: for the same operations, many small steps come closer than few large ones
    sequence_length tokens of a window; None: 512, or what the source has positions for
    learning_rate   the highest, reached after 5 steps, then linear to 0; None: by the mixer, RATES
    ridge           batches that the last projection is solved for on, before the steps, or more where its
                    features are many (`solve`); 0: it is not. A retention's is without steps alone: from O,
                    which it has, steps lead closer
    """

    steps: int = 0
    batches: int = 8
    batch_size: int = 8
    step_size: int = 1
    sequence_length: int | None = None
    learning_rate: float | None = None
    ridge: int = 2

    def __post_init__(self):
        for name, least in (("steps", 0), ("batches", 1), ("batch_size", 1), ("step_size", 1), ("ridge", 0)):
            refuse_below("align" if name == "steps" else name.replace("_", "-"), getattr(self, name), least)
        refuse_other_types(self)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise refuse("learning-rate", "more than 0, and finite", self.learning_rate, "leave it out")

    def windows(self, available: int) -> int:
        """How many distinct ones are used, of so many."""
        return min(self.batches, available // self.batch_size) * self.batch_size

    def solves(self, letter: str) -> bool:
        return self.ridge > 0 and (letter != "R" or not self.steps)

    def rate(self, letter: str) -> float:
        return RATES[letter] if self.learning_rate is None else self.learning_rate


class Aligning:
    """One pass over the source, a layer at a time; what new mixers become lies in `folder`, for `kept_in`.

    source, target: the layers of `ends`, or the source's and the model's as they start. layers: of each new
    one its mixer, errors, seconds. stages: what each took.
    """

    def __init__(
        self, starting: Starting, how: Alignment, folder: Path, ends: tuple[Layers, Layers] | None = None
    ):
        self.starting, self.how, self.folder = starting, how, folder
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.source, self.target = ends or starting.layers(device)
        self.layers: list[dict[str, Any]] = []
        self.stages = {name: Cost() for name in ("source", "start", "steps")}

    @property
    def flops(self) -> int:
        """Of all stages."""
        return sum(cost.flops for cost in self.stages.values())

    def run(self, windows: Examples, restored: Restored | None = None) -> str:
        """Fit every new mixer to windows of text, of which it returns the fingerprint.

        restored: is told of every layer, and keeps its own streams. Raises Refusal where a number is not
        finite.
        """
        new, count = self.starting.new, self.how.windows(len(windows))
        windows = windows.sample(count, self.starting.seed)
        ids = windows.batch(range(count))["input_ids"]
        stream = self.source.embed(ids.split(self.how.batch_size))
        last = len(self.starting.config.pattern) - 1 if restored else max(new)
        with RunProgress("align", len(new) * self.how.steps) as progress:
            for layer in range(last + 1):
                self.take(layer, stream, ids, progress, restored)
        return windows.fingerprint()

    def take(
        self,
        layer: int,
        stream: list[Tensor],
        ids: Tensor,
        progress: RunProgress,
        restored: Restored | None,
    ) -> None:
        """One layer, of which nothing is left afterwards. stream: in front of it, then behind it."""
        block = self.source.block(layer)
        own = self.target.with_mixer(layer, block) if layer in self.starting.new else None
        for end in (self.source, self.target):
            end.weights.forget()
        x, y = watched(self.source, layer, block, stream, self.stages["source"])
        if own:
            self.layers.append(
                self.fit(layer, own, block.mixer, Pairs(x, y, ids, f"layer {layer}"), progress)
            )
            self.keep(layer, own.mixer)
        if restored:
            restored.advance(layer, self.source, block, self.target, own)

    def keep(self, layer: int, mixer: nn.Module) -> None:
        """What has become of a layer's mixer."""
        values, folder = self.target.values(layer, mixer), self.folder
        try:
            save_file({name: x.contiguous() for name, x in values.items()}, folder / f"{layer}.safetensors")
        except (OSError, SafetensorError) as error:
            raise refuse(
                str(folder), "room for fitted mixers", reason(error), "make room, or name another"
            ) from error

    def steps(self, size: int, rate: float) -> Steps:
        """Of so many windows each, at that rate."""
        return Steps(self.how.steps, size, rate, self.starting.seed)

    def fit(
        self, layer: int, block: nn.Module, old: nn.Module, pairs: Pairs, progress: RunProgress
    ) -> dict[str, Any]:
        """Start and fit the mixer of `block`, and what growth.json tells of it. old: the source's mixer."""
        began, how, stages = time.perf_counter(), self.how, self.stages
        letter, mixer = self.starting.config.pattern[layer], block.mixer
        self.starting.begin(layer, mixer, old)
        call = called(self.target, layer, block, pairs.x)
        with stages["start"].timed():
            errors = {"started": pairs.error(call, how.batch_size, stages["start"])}
            if how.solves(letter):
                solve(mixer, call, pairs, how.batch_size, how.ridge, stages["start"])
                errors["solved"] = pairs.error(call, how.batch_size, stages["start"])
        if how.steps:
            steps = self.steps(min(how.step_size, len(pairs.x)), how.rate(letter))
            with stages["steps"].timed():
                descend(mixer, call, pairs, steps, stages["steps"], progress)
                errors["aligned"] = pairs.error(call, how.batch_size, stages["steps"])
        seconds, start = time.perf_counter() - began, self.starting.ways[layer]
        told = {"layer": layer, "mixer": letter, "start": start, "error": errors, "seconds": seconds}
        if how.steps:
            told["learning_rate"] = steps.rate
        progress.say(f"layer {layer} of {len(self.starting.config.pattern)}, {seconds:.1f} s")
        return told


def layer_line(layer: dict[str, Any]) -> str:
    """The same for people."""
    errors = ", ".join(f"{name} {error:.4f}" for name, error in layer["error"].items())
    where = f"layer {layer['layer']} ({layer['mixer']}, {layer['start']})"
    return f"{where}: error {errors}; {layer['seconds']:.1f} s"


def kept_in(folder: Path, starting: Starting, how: Alignment) -> dict[int, Start]:
    """The starts of the layers that `align` fits, which read what it leaves in `folder`."""
    starts = {}
    for layer in starting.new:
        letter, of = starting.config.pattern[layer], starting.begun_from(layer)
        made = dict(starting.made(layer))
        for name, sources in of.items():
            last = name.startswith(LAST[letter])
            if how.steps:
                of_source = () if last and how.solves(letter) else sources
                made[name] = Made("aligned", of_source, "" if of_source else DRAWN)
            elif last and how.solves(letter):
                made[name] = Made("fitted", (), SOLVED)
        starts[layer] = Start(made, partial(_read, folder))
    return starts


def _read(folder: Path, layer: int) -> dict[str, Tensor]:
    return load_file(folder / f"{layer}.safetensors")


def watched(
    source: Layers, layer: int, block: nn.Module, stream: list[Tensor], cost: Cost
) -> tuple[Tensor, Tensor]:
    """What the mixer of a source's layer reads and gives, [N, T, hidden_size] each.

    stream: batches [B, T, hidden_size] in front of the layer; they are those behind it afterwards.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    hook = block.mixer.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    with cost.counted(), cost.timed():
        for i, x in enumerate(stream):
            stream[i] = source.run(layer, block, x)
    hook.remove()
    x, y = zip(*seen)
    return torch.cat(x), torch.cat(y)


class Called(nn.Module):
    """In a mixer's place: notes what the model hands to it besides x, and gives x back."""

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        self.given, self.named = given, named
        return x


def called(target: Layers, layer: int, block: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The block's mixer as a function of x [B, T, hidden_size] alone, called as the model calls it."""
    mixer, note = block.mixer, Called()
    block.mixer = note
    target.run(layer, block, x[:1])
    block.mixer = mixer
    return lambda x: mixer(x, *note.given, **note.named)
