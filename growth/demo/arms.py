"""Models of one kind of data, trained beside each other: a source, baselines, and arms that start ahead.

Every arm sees the same examples in the same order as its baseline, for as many steps. A baseline's rate falls
along a cosine over all its steps; an arm's, which starts ahead, over a part of them (LEMON's schedule), from
the same peak unless its budget has another.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

import growth
from growth.demo.budgets import Budget, Group
from growth.demo.saving import COSTS, compare
from growth.errors import Refusal
from growth.loading import load_model, quiet
from growth.methods import METHODS
from growth.report import Report
from growth.sizes import Sizes
from growth.training.examples import Examples
from growth.training.trainer import TrainReport


class Arms:
    """One group of the report; everything is written below `out`.

    prefix: of the models' names. auto: what makes a fresh model. unit: of the loss.
    """

    prefix: ClassVar[str] = ""
    auto: ClassVar[type]
    unit: ClassVar[str]

    def __init__(
        self, numbers: Group, out: Path, console: Console, seed: int, examples: Examples, held_out: Examples
    ):
        self.numbers, self.out, self.console, self.seed = numbers, out, console, seed
        self.examples, self.held_out = examples, held_out
        self.losses: dict[str, Tensor] = {}  # of every held-out example, at the end of every arm

    def beside(self, folder: Path) -> None:
        """Writes what belongs beside a fresh model."""

    def told(self, model: PreTrainedModel) -> dict:
        """What the report says of a trained model, beside its numbers."""
        raise NotImplementedError

    def trained(self, name: str) -> Path:
        return self.out / "trained" / name

    def start(self, name: str) -> Path:
        return self.out / "start" / name

    def scratch(self, name: str, config: PreTrainedConfig, budget: Budget, **settings) -> dict:
        """A baseline: a fresh model of that configuration, trained; settings: other than usual."""
        torch.manual_seed(self.seed)
        with quiet():
            self.auto.from_config(config).save_pretrained(self.start(name))
        self.beside(self.start(name))
        report = self.train(name, budget, **{"schedule": "cosine", "warmup": budget.steps // 20} | settings)
        return self.record(name, report, baseline=None, start={"flops": 0, "seconds": 0.0})

    def grown(self, source: str, methods: Iterable[str], baseline: dict) -> list[dict]:
        """An arm for each method."""
        arms = []
        for method in methods:
            name = self.prefix + method
            made = self.grow(source, method, self.start(name))
            arms.append(self.arm(name, made, baseline, self.numbers.growing))
        return arms

    def grow(
        self, source: str, method: str, dst: Path | None, carries: bool = False, **options: float
    ) -> Report:
        """The source grown to the target's sizes; only planned where there is no place to put it. carries:
        with its optimizer's state. options: of the method."""
        target, lesson, kind = self.numbers.target, self.numbers.learning, METHODS[method]
        how = {"steps": lesson.steps, "batch_size": lesson.batch_size, "learning_rate": lesson.rate}
        how = {option: x for option, x in how.items() if option in {field.name for field in fields(kind)}}
        return growth.grow(
            self.trained(source),
            dst,
            Sizes(hidden=target.hidden, layers=target.layers),
            kind(data=self.examples, **how) if kind.learned else kind(**options),
            optimizer=self.trained(source) if carries else None,
            seed=self.seed,
            dry_run=dst is None,
        )

    def left_out(self, source: str) -> dict[str, str]:
        """The methods that do not make the target of the source, and why."""
        found = {}
        for method in METHODS:
            try:
                self.grow(source, method, None)
            except Refusal as refusal:
                found[method] = str(refusal)
        return found

    def arm(self, name: str, made: Report, baseline: dict, budget: Budget, **rates) -> dict:
        how = {"schedule": "lemon", "warmup": budget.warmup, "decay": budget.decay}
        report = self.train(name, replace(budget, rate=budget.peak or budget.rate), **how, **rates)
        start = {"flops": made.flops, "seconds": made.seconds}
        arm = self.record(name, report, baseline["name"], start) | {"lossless": made.lossless}
        apart = self.losses[name] - self.losses[baseline["name"]]
        arm |= {"noise": apart.std().item() / len(apart) ** 0.5} | compare(arm, baseline)
        self.say(arm)
        return arm

    def train(self, name: str, budget: Budget, **settings) -> TrainReport:
        return growth.train(
            self.start(name),
            self.examples,
            self.trained(name),
            steps=budget.steps,
            batch_size=self.numbers.batch_size,
            learning_rate=budget.rate,
            validation=self.held_out,
            eval_every=math.ceil(budget.steps / self.numbers.evaluations),
            save_every=0,
            seed=self.seed,
            **settings,
        )

    def record(self, name: str, report: TrainReport, baseline: str | None, start: dict) -> dict:
        """What the report says of a trained model."""
        model = load_model(report.out).eval()
        self.losses[name] = self.held_out.losses(model)
        return {
            "name": name,
            "baseline": baseline,
            "start": start,
            "checkpoint": str(report.out.relative_to(self.out)),
            "parameters": report.parameters,
            "step_flops": report.step_flops,
            "unfrozen_at": report.unfrozen_at,
            "curve": [asdict(point) for point in report.curve],
            **self.told(model),
        }

    def say(self, arm: dict) -> None:
        """The arm's result, as soon as it is known."""
        result = "the from-scratch loss was not reached"
        if arm["saved"]:
            flops, seconds = (f"{arm['saved'][cost]:.0%}" for cost in COSTS)
            result = f"the from-scratch loss with {flops} of its FLOPs and {seconds} of its time saved"
        self.console.print(f"{arm['name']}: {result}", highlight=False, soft_wrap=True)
