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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from growth.errors import reason, refuse
from growth.training.examples import Examples
from growth.training.progress import RunProgress
from growth.transferring.fitting import Cost, Pairs, Steps, descend, solve
from growth.transferring.layers import Layers
from growth.transferring.planned import Made, Start
from growth.transferring.restoration import Restored
from growth.transferring.starting import Starting

LENGTH = 512  # tokens of a window, unless asked otherwise
DRAWN, SOLVED = "drawn, then fitted to the attention", "solved for to fit the attention"
RATES = {"R": 2e-2, "M": 1e-2, "S": 1e-2}
LAST = {"R": "layers.{}.mixer.o.", "M": "layers.{}.mamba.out_proj.", "S": "layers.{}.mamba2.out_proj."}


@dataclass(frozen=True)
class Alignment:
    """How mixers are fitted.

    steps           of AdamW without weight decay; 0: only the last projection, by least squares
    batches         distinct ones, or as many as the data fill, each used again and again
    batch_size      windows in each
    step_size       windows a step: for the same operations many small steps come closer than few large ones
    sequence_length tokens of a window; None: 512, or what the source has positions for
    learning_rate   the highest, reached after 5 steps, then linear to 0; None: by the mixer, RATES
    ridge           batches that the last projection is solved for on, before the steps; 0: it is not. A
                    retention's is without steps alone: from O, which it has, steps lead closer
    """

    steps: int = 0
    batches: int = 8
    batch_size: int = 8
    step_size: int = 2
    sequence_length: int | None = None
    learning_rate: float | None = None
    ridge: int = 2

    def __post_init__(self):
        for name, least in (("steps", 0), ("batches", 1), ("batch_size", 1), ("step_size", 1), ("ridge", 0)):
            if (got := getattr(self, name)) < least:
                what = "align" if name == "steps" else name.replace("_", "-")
                raise refuse(what, f"at least {least}", got, "choose a larger number")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise refuse("learning-rate", "more than 0, and finite", self.learning_rate, "leave it out")

    def solves(self, letter: str) -> bool:
        return self.ridge > 0 and (letter != "R" or not self.steps)

    def rate(self, letter: str) -> float:
        return RATES[letter] if self.learning_rate is None else self.learning_rate


@dataclass
class Aligned:
    """What fitting did: of each layer its mixer, errors and seconds; what each stage took; the windows."""

    layers: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, Cost] = field(default_factory=dict)
    windows: str = ""


def align(
    starting: Starting,
    windows: Examples,
    how: Alignment,
    folder: Path,
    restored: Restored | None = None,
) -> tuple[Aligned, Layers]:
    """Fit every new mixer to windows of text; what they become lies in `folder`, for `kept_in`.

    restored: is told of every layer, and keeps its own streams. Returns the source's layers, too, for their
    ends. Raises Refusal where a number is not finite.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    source, target = starting.layers(device)
    count = min(how.batches, len(windows) // how.batch_size) * how.batch_size
    windows = windows.sample(count, starting.seed)
    ids = windows.batch(range(count))["input_ids"]
    out = Aligned(
        stages={name: Cost() for name in ("source", "start", "steps")}, windows=windows.fingerprint()
    )
    stream = [source.embed(batch) for batch in ids.split(how.batch_size)]
    last = len(starting.config.pattern) - 1 if restored else max(starting.new)
    with RunProgress("align", len(starting.new) * how.steps) as progress:
        for layer in range(last + 1):
            block, own = source.block(layer), None
            x, y = watched(source, layer, block, stream, out.stages["source"])
            if layer in starting.new:
                own = target.with_mixer(layer, block)
                pairs = Pairs(x, y, ids, f"layer {layer}")
                out.layers.append(
                    fit(starting, target, layer, block.mixer, own, pairs, how, out.stages, progress)
                )
                _keep(target.values(layer, own.mixer), folder, layer)
            if restored:
                restored.advance(layer, source, block, target, own)
    return out, source


def fit(
    starting: Starting,
    target: Layers,
    layer: int,
    old: nn.Module,
    block: nn.Module,
    pairs: Pairs,
    how: Alignment,
    stages: dict[str, Cost],
    progress: RunProgress,
) -> dict[str, Any]:
    """Start and fit the mixer of `block`, and what growth.json tells of it. old: the source's mixer there."""
    began, letter, mixer = time.perf_counter(), starting.config.pattern[layer], block.mixer
    starting.begin(layer, mixer, old)
    call = called(target, layer, block, pairs.x)
    with stages["start"].timed():
        errors = {"started": pairs.error(call, how.batch_size, stages["start"])}
        if how.solves(letter):
            solve(mixer, call, pairs, how.batch_size, how.ridge, stages["start"])
            errors["solved"] = pairs.error(call, how.batch_size, stages["start"])
    if how.steps:
        steps = Steps(how.steps, min(how.step_size, len(pairs.x)), how.rate(letter), starting.seed)
        with stages["steps"].timed():
            descend(mixer, call, pairs, steps, stages["steps"], progress)
            errors["aligned"] = pairs.error(call, how.batch_size, stages["steps"])
    seconds = time.perf_counter() - began
    told = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    progress.say(f"layer {layer} ({letter}): error {told}; {seconds:.0f} s")
    return {
        "layer": layer,
        "mixer": letter,
        "start": starting.ways[layer],
        "error": errors,
        "seconds": seconds,
    }


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


def _keep(values: dict[str, Tensor], folder: Path, layer: int) -> None:
    try:
        save_file({name: x.contiguous() for name, x in values.items()}, folder / f"{layer}.safetensors")
    except (OSError, SafetensorError) as error:
        raise refuse(
            str(folder), "room for fitted mixers", reason(error), "make room, or name another"
        ) from error


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
