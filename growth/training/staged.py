"""Staged training: a model grows while it trains, in one run.  Shen et al., ICML 2022, arXiv 2203.06211.

    stage ends   after step `step`, or once the loss falls too slowly:
                 d ln L / d ln C >= slope,   C = sum over steps of the model's parameters
    then         model, moments, schedule, step and data order go on in the grown model

The slope is that of the line of least squares through the last `window` logged losses. Published constants:
-0.0575 to deepen, -0.0475 to widen, -0.052 the optimum; they count C in FLOPs a token, which are proportional
to it. What the loss does as a model grows is its method's promise: by lemon nothing.

A run of `growth train` has a folder and settings of its own and ends with its model: there stages are runs,
with `--schedule constant`, `growth grow --optimizer` and `--resume` between them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.growing import grow
from growth.jsonfile import read_object
from growth.methods import Method, method_of
from growth.plan import Source
from growth.sizes import Sizes
from growth.targets import target_of
from growth.training.run import STATE, newest

Point = tuple[float, float]  # ln C, ln L


@dataclass(frozen=True)
class GrowAt:
    """When a stage ends, and what the model becomes then.

    step | slope   one of them; window: of how many logged losses the slope is. sizes, method, policy,
    allow_lossy, seed: as `growth.grow` has them. Raises Refusal where one does not fit.
    """

    sizes: Sizes
    method: Method | str = "lemon"
    step: int | None = None
    slope: float | None = None
    window: int = 10
    policy: str = "copy-scaled"
    allow_lossy: bool = False
    seed: int = 0

    def __post_init__(self):
        if (self.step is None) == (self.slope is None):
            got = "neither" if self.step is None else "both"
            raise refuse("stage", "a step or a slope at which it ends", got, "give one of them")
        if self.step is not None and self.step < 1:
            raise refuse("stage", "a step of at least 1", self.step, "choose a larger one")
        if self.slope is not None and not -math.inf < self.slope < 0:
            raise refuse(
                "stage", "a slope below 0, and finite", self.slope, "-0.05 is about the published one"
            )
        if self.window < 2:
            raise refuse("stage", "a window of at least 2 losses", self.window, "choose a larger one")


@dataclass
class StageEnd(TrainerCallback, ExportableState):
    """Stops a Trainer where stage `number` ends, and has it save: `reached` is true then."""

    stage: GrowAt
    number: int
    points: list[Point] = field(default_factory=list)
    compute: float = 0.0
    reached: bool = False

    def state(self) -> dict:
        known = {"points": self.points, "compute": self.compute, "reached": self.reached}
        return {"args": {"number": self.number}, "attributes": known}

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved:
            self.compute = saved["attributes"]["compute"]
            if saved["args"]["number"] == self.number:
                self.points = [(x, y) for x, y in saved["attributes"]["points"]]
        self._parameters = model.num_parameters()

    def on_step_end(self, args, state, control, **kwargs):
        self.compute += self._parameters
        if self.stage.step is not None and state.global_step >= self.stage.step:
            self._end(control)

    def on_log(self, args, state, control, *, logs, **kwargs):
        if self.stage.slope is None or "loss" not in logs:
            return
        self.points = [*self.points, (math.log(self.compute), math.log(logs["loss"]))][-self.stage.window :]
        if len(self.points) == self.stage.window and slope(self.points) >= self.stage.slope:
            self._end(control)

    def _end(self, control) -> None:
        self.reached = control.should_save = control.should_training_stop = True


def slope(points: Sequence[Point]) -> float:
    """Of the line of least squares through points (x, y)."""
    return float(np.polyfit(*np.array(points).T, 1)[0])


def train_in_stages(
    make_trainer: Callable[[str], Trainer],
    model: str | Path,
    stages: Sequence[GrowAt],
    *,
    resume: bool = False,
) -> Trainer:
    """Trains the checkpoint `model`, and grows it at the end of each stage, in one run of one process.

    make_trainer   makes a Trainer for the model in a folder, each time with the same data, seed, optimizer
                   (AdamW), schedule, number of steps in all and output folder; there checkpoint-N is where
                   stage i ended, and grown-i what became of it, with the optimizer's state
    resume         go on from the newest checkpoint of a run that was broken off, or ended

    Returns the last Trainer, after its training. What a grown model sees is what the run would have gone on
    with: the same windows in the same order, at the same rates. Raises Refusal, before anything is trained,
    where a stage's sizes are not those of a larger model, its step is not after the last one's or not before
    the end, or the output folder holds another run.
    """
    _refuse_odd(model, stages)
    trainer = make_trainer(str(model))
    out = Path(trainer.args.output_dir)
    _refuse_late(trainer, stages)
    if not resume and (found := newest(out)):
        raise refuse(str(out), "no interrupted run", found.name, "remove it, or resume")
    number, last, ended = _reached(out) if resume else (0, None, False)
    if last and not ended:
        done = TrainerState.load_from_json(last / STATE)
        if done.global_step >= done.max_steps:  # `train` would add a step
            trainer = make_trainer(str(last))
            trainer.state = done
            return trainer
    while True:
        if ended:
            number, last = number + 1, _grown(out, last, number + 1, stages[number])
        if number:
            trainer = make_trainer(str(out / f"grown-{number}"))
        if number < len(stages):
            trainer.add_callback(end := StageEnd(stages[number], number))
        trainer.train(resume_from_checkpoint=last and str(last))
        if number == len(stages) or not end.reached or trainer.state.global_step >= trainer.state.max_steps:
            return trainer
        last, ended = out / f"checkpoint-{trainer.state.global_step}", True


def _grown(out: Path, checkpoint: Path, number: int, stage: GrowAt) -> Path:
    """What becomes of the checkpoint at the end of a stage, and of the optimizer's state in it."""
    how = {"allow_lossy": stage.allow_lossy, "seed": stage.seed, "policy": stage.policy}
    folder = out / f"grown-{number}"
    grow(checkpoint, folder, stage.sizes, stage.method, optimizer=checkpoint, **how)
    return folder


def _reached(out: Path) -> tuple[int, Path | None, bool]:
    """How often the model has grown, the newest checkpoint since, and whether a stage ended there."""
    number = 0
    while (out / f"grown-{number + 1}").is_dir():
        number += 1
    grown, found = out / f"grown-{number}" if number else None, newest(out)
    if found is None or (grown and _state(found)["global_step"] <= _state(grown)["global_step"]):
        return number, grown, False
    end = _state(found)["stateful_callbacks"].get(StageEnd.__name__)
    return number, found, bool(end) and end["args"]["number"] == number and end["attributes"]["reached"]


def _state(folder: Path) -> dict:
    return read_object(folder / STATE, "global_step", "stateful_callbacks")


def _refuse_odd(model: str | Path, stages: Sequence[GrowAt]) -> None:
    """Raises Refusal where one stage's sizes do not follow from the last one's, or its step does not."""
    if not stages:
        raise refuse("stages", "at least one", "none", "train without")
    seen, last = Source(Checkpoint(model)).model, 0
    for stage in stages:
        seen, _ = target_of(seen, stage.sizes, method_of(stage.method))
        if stage.step is not None and stage.step <= last:
            raise refuse("stage", f"a step after {last}, where one ended", stage.step, "put them in order")
        last = stage.step or last


def _refuse_late(trainer: Trainer, stages: Sequence[GrowAt]) -> None:
    steps = trainer.args.max_steps
    for stage in stages:
        if stage.step is not None and 0 < steps <= stage.step:
            expected = f"a step before the Trainer's last, {steps}"
            raise refuse("stage", expected, stage.step, "end it sooner, or train for longer")
