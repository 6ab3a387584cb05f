"""Runs of one family and one seed: what is made, trained, and told of it.

Every run sees the same examples in the same order as its baseline. A fresh model is that of its seed.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

import growth
from growth.demo.arms import ARMS, SCRATCH, Arm
from growth.demo.material import Material
from growth.demo.models import MODELS
from growth.demo.scales import Budget, Numbers, Size
from growth.errors import Refusal
from growth.loading import load_model, quiet
from growth.methods import METHODS
from growth.report import Report
from growth.sizes import Sizes
from growth.training.trainer import TrainReport
from growth.transferring.align import Alignment

SOURCE, EARLY = "source", "early source"
FREE = {"flops": 0, "seconds": 0.0}


@dataclass(frozen=True)
class Run:
    """part: whole | short | equal; trial: of a rate, among others."""

    arm: str
    seed: int
    part: str
    budget: Budget | None
    trial: bool = False

    @property
    def folder(self) -> str:
        name = "-".join(self.arm.replace(",", "").split())
        at = f"-{self.budget.rate:g}" if self.trial else ""
        return name + "-equal" * (self.part == "equal") + at


class Runs:
    """Of one family and one seed; everything is written below `out`. keep: models stay there; else those of
    sources alone."""

    def __init__(self, numbers: Numbers, of: Material, out: Path, seed: int, keep: bool):
        self.numbers, self.material, self.out, self.seed, self.keep = numbers, of, out, seed, keep
        self.configured, self.auto = MODELS[numbers.model]
        self.losses: dict[str, torch.Tensor] = {}  # of every held-out example, at the end of each run

    def done(self, run: Run) -> dict:
        """Makes the run's model of its source, trains it, and tells what came of it."""
        start, end = (self.out / kind / run.folder for kind in ("start", "trained"))
        arm = ARMS.get(run.arm)
        for stale in (start, end, end.with_name(f"{end.name}.unfinished")):
            shutil.rmtree(stale, ignore_errors=True)
        made = self.begin(run.arm, start) if arm is None else self.make(arm, start)
        spent = FREE if made is None else {"flops": made.flops, "seconds": made.seconds}
        report = self.train(run, arm, start, end)
        record = {
            "arm": run.arm,
            "seed": self.seed,
            "part": run.part,
            "baseline": arm and arm.baseline,
            "source": arm and arm.source,
            "group": SOURCE if run.arm in (SOURCE, EARLY) else group(run.arm),
            "rate": run.budget.rate,
            "steps": report.settings["steps"],
            "parameters": report.parameters,
            "step_flops": report.step_flops,
            "start": spent,
            "lossless": None if made is None else made.lossless,
            "curve": [asdict(point) for point in report.curve],
            "checkpoint": str(end.relative_to(self.out.parents[1])) if self.keep else None,
        }
        record |= self.measured(run, end)
        if not self.keep:
            shutil.rmtree(start)
            if run.arm not in (SOURCE, EARLY) or run.trial:
                shutil.rmtree(end)
        return record

    def adopt(self, trial: Run) -> None:
        """Takes a trial for the run itself."""
        if trial.folder in self.losses:
            self.losses[replace(trial, trial=False).folder] = self.losses[trial.folder]

    def has(self, source: str) -> bool:
        """Is this source there, trained?"""
        return (self.out / "trained" / Run(source, self.seed, "whole", None).folder).is_dir()

    def begin(self, name: str, start: Path) -> None:
        """A fresh model: the source's, the target's, or of what its source was transferred to."""
        config = self.twin(name) if name.startswith(f"{SCRATCH} of ") else self.config(name != SCRATCH)
        torch.manual_seed(self.seed)
        with quiet():
            self.auto.from_config(config).save_pretrained(start)
        self.material.beside(start)

    def budget(self, arm: str) -> Budget:
        """Its own, or its group's."""
        budgets, arm = self.numbers.budgets, SOURCE if arm == EARLY else arm
        if arm in budgets:
            return budgets[arm]
        return budgets[group(arm) if arm in ARMS else f"{SCRATCH} of any"]

    def config(self, small: bool) -> PreTrainedConfig:
        size = self.numbers.source if small else self.numbers.target
        return self.configured(self.numbers, size, self.material.classes)

    def parameters(self, size: Size) -> int:
        with torch.device("meta"):
            model = self.auto.from_config(self.configured(self.numbers, size, self.material.classes))
        return sum(x.numel() for x in model.parameters())

    def twin(self, name: str) -> PreTrainedConfig:
        """The configuration of a transfer, whose new mixers do not matter."""
        arm, folder = ARMS[name.removeprefix(f"{SCRATCH} of ")], self.out / "start" / "twin"
        self.make(replace(arm, fitted=None), folder)
        config = AutoConfig.from_pretrained(folder)
        shutil.rmtree(folder)
        return config

    def make(self, arm: Arm, start: Path | None) -> Report:
        """The start of an arm, of its source; only planned where there is no place to put it."""
        source = self.out / "trained" / Run(arm.source, self.seed, "whole", None).folder
        if arm.mixers is None:
            return self.grow(arm, source, start)
        numbers = self.numbers
        batch = numbers.batch_size
        steps = (numbers.align.get(arm.name) or numbers.align["transfer"]) if arm.fitted == "steps" else 0
        align = Alignment(arm.longer * steps, numbers.windows // batch, batch, step_size=1)
        how = {"align": align, "data": self.material.examples} if arm.fitted else {}
        return growth.transfer(source, start, seed=self.seed, **how, **arm.mixers)

    def grow(self, arm: Arm, source: Path, start: Path | None) -> Report:
        target, kind = self.numbers.target, METHODS[arm.method]
        return growth.grow(
            source,
            start,
            Sizes(hidden=target.hidden, layers=target.layers, heads=target.heads, ffn=target.ffn),
            kind(**self.lesson(kind), **arm.options),
            optimizer=source if arm.carries else None,
            seed=self.seed,
            dry_run=start is None,
        )

    def lesson(self, kind: type) -> Mapping[str, object]:
        """What a method that learns is told."""
        if not kind.learned:
            return {}
        lesson = self.numbers.learning
        told = {"steps": lesson.steps, "batch_size": lesson.batch_size, "learning_rate": lesson.rate}
        known = {field.name for field in fields(kind)}
        return {"data": self.material.examples} | {name: x for name, x in told.items() if name in known}

    def left_out(self) -> dict[str, str]:
        """The arms of growth that do not make the target of the source, and why."""
        found = {}
        for name in self.numbers.arms:
            try:
                if ARMS[name].method:
                    self.make(ARMS[name], None)
            except Refusal as refusal:
                found[name] = str(refusal)
        return found

    def train(self, run: Run, arm: Arm | None, start: Path, end: Path) -> TrainReport:
        budget, numbers = run.budget, self.numbers
        how = {"callbacks": list(arm.callbacks(budget.steps)), "resume": arm.carries} if arm else {}
        if arm and arm.mixers:
            how |= {"copied_rate": numbers.copied}
        if run.arm == EARLY:
            how |= {"schedule": "constant"}
        elif arm is None:
            how |= {"schedule": "cosine"}
        else:
            how |= {"schedule": "lemon", "decay": budget.decay}
        return growth.train(
            start,
            self.material.examples,
            end,
            steps=budget.steps,
            batch_size=numbers.batch_size,
            learning_rate=budget.rate,
            warmup=budget.warmup,
            validation=self.material.held_out,
            eval_every=math.ceil(budget.steps / numbers.evaluations),
            save_every=0,
            keep_optimizer=run.arm in (SOURCE, EARLY),
            bf16=numbers.bf16,
            seed=self.seed,
            **how,
        )

    def measured(self, run: Run, end: Path) -> dict:
        """What the trained model does on what it did not see."""
        model, of = load_model(end).eval(), self.material
        self.losses[run.folder] = of.losses(model, of.held_out, self.auto, end)
        far = of.far and of.losses(model, of.far, self.auto, end).mean().item()
        return {"noise": self.noise(run), "far": far, **of.told(model, self.numbers, self.seed)}

    def noise(self, run: Run) -> float | None:
        """The standard error of the difference to the baseline's loss, where that was measured here."""
        arm = ARMS.get(run.arm)
        beside = arm and self.losses.get(Run(arm.baseline, self.seed, "whole", None).folder)
        if beside is None:
            return None
        apart = self.losses[run.folder] - beside
        return apart.std().item() / len(apart) ** 0.5


def group(name: str) -> str:
    """growth | transfer, of an arm or of a baseline."""
    if name in ARMS:
        return ARMS[name].group
    return "growth" if name == SCRATCH else "transfer"
