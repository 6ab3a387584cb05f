"""Which runs a family's report needs. Those that it has are not done again: a study goes on where it ended.

rate(arm)   the one of the grid whose run, of the first seed, ends lowest; the grid goes on from its edge
whole       a baseline, or, where nothing is parted, an arm: the steps of its budget
short       an arm on fewer steps than its baseline, in which the rate falls: when does it arrive?
equal       an arm on as many FLOPs as its baseline, its start's included: where does it end?
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf
from pathlib import Path

import torch
from rich.console import Console

from growth.demo.arms import ARMS, SCRATCH
from growth.demo.material import Material, material
from growth.demo.runs import EARLY, SOURCE, Run, Runs
from growth.demo.saving import compare
from growth.demo.scales import Budget, Numbers, Scale
from growth.errors import refuse
from growth.training.finite import NotFinite

BEYOND = 3  # rates that the grid goes on by, at most
NAMES = {"gpt_neox": "GPT-NeoX", "llama": "Llama", "bert": "BERT", "vit": "ViT"}


class Study:
    """One family of a scale. told: what its report has so far; keep: is called with that after every run;
    made: tells where and when a run is carried out."""

    def __init__(
        self,
        scale: Scale,
        name: str,
        work: Path,
        told: dict | None,
        keep: Callable[[dict], None],
        console: Console,
        made: Callable[[], dict],
    ):
        self.scale, self.name, self.work, self.keep, self.console = scale, name, work, keep, console
        self.made = made
        self.numbers: Numbers = scale.families[name]
        if told and told.get("numbers") != self.numbers.digest:
            remedy = "name another folder, or take them away"
            raise refuse(f"results of {name}", "those of the same sizes and budgets", "others'", remedy)
        self.material: Material = material(self.numbers, work / name / "text" if scale.keep else None)
        self.runs = {
            seed: Runs(self.numbers, self.material, work / name / str(seed), seed, scale.keep)
            for seed in scale.seeds
        }
        self.told = told or self.begun()
        for trial, records in ((False, self.told["runs"]), (True, self.told["pending"])):
            for record in (x for x in records if "losses" in x and x["seed"] in self.runs):
                run = Run(record["arm"], record["seed"], record["part"], self.at(record), trial)
                self.runs[run.seed].losses[run.folder] = torch.tensor(record["losses"])

    def at(self, record: dict) -> Budget:
        return replace(self.runs[record["seed"]].budget(record["arm"]), rate=record["rate"])

    def begun(self) -> dict:
        first = self.runs[self.scale.seeds[0]]
        sizes = {
            of: {"layers": size.layers, "hidden": size.hidden, "parameters": first.parameters(size)}
            for of, size in (("source", self.numbers.source), ("target", self.numbers.target))
        }
        title = " to ".join(
            f"{of['layers']} x {of['hidden']} ({of['parameters'] / 1e6:,.3g} M)" for of in sizes.values()
        )
        return {
            "name": self.name,
            "title": f"{NAMES[self.numbers.model]}, {title}",
            "said": self.material.said,
            "unit": self.material.unit,
            "numbers": self.numbers.digest,
            "corpus": digest(self.material),
            **sizes,
            "rates": list(self.numbers.rates),
            "tried": [],
            "pending": [],
            "left_out": {},
            "runs": [],
        }

    def carry_out(self) -> dict:
        """All that is missing. Returns what the report has of the family."""
        if self.told["runs"] and all(self.found(*run) for run in self.wanted()):
            return self.told
        if self.told.get("corpus", own := digest(self.material)) != own:
            expected, remedy = "those of the same text or images", "go on with the Python that began them"
            raise refuse(f"results of {self.name}", expected, "another's", remedy)
        arms = self.numbers.arms
        for source in sorted({ARMS[name].source for name in arms}, reverse=True):
            self.rest(source, self.scale.seeds[0])
        self.told["left_out"] = self.runs[self.scale.seeds[0]].left_out()
        for arm, why in self.told["left_out"].items():
            self.say(f"{arm} left out: {why}")
        for arm, seed, part in self.wanted():
            self.need(arm, seed, part)
        return self.told

    def arms(self) -> list[str]:
        """Those that can be made."""
        return [name for name in self.numbers.arms if name not in self.told["left_out"]]

    def wanted(self) -> Iterator[tuple[str, int, str]]:
        """Arms, seeds and parts, in order: the first arms, every arm of one seed, and all that is left."""
        arms, seeds = self.arms(), self.scale.seeds
        if not self.scale.parted:
            yield from ((arm, seed, "whole") for seed in seeds for arm in arms)
            return
        first = [arm for arm in arms if arm in self.numbers.first]
        yield from ((arm, seed, "short") for arm in first for seed in seeds)
        yield from ((arm, seed, "equal") for arm in first for seed in seeds)
        yield from ((arm, seed, "short") for seed in seeds for arm in arms)
        yield from ((arm, seed, "equal") for seed in seeds for arm in arms)

    def found(self, arm: str, seed: int, part: str) -> dict | None:
        keys = {"arm": arm, "seed": seed, "part": part}
        return next((run for run in self.told["runs"] if keys.items() <= run.items()), None)

    def need(self, arm: str, seed: int, part: str = "whole") -> dict:
        """A run's record, and first what it rests on: its source, its baseline."""
        if found := self.found(arm, seed, part):
            return found
        if arm in ARMS:
            self.rest(ARMS[arm].source, seed)
            self.need(ARMS[arm].baseline, seed)
        elif arm not in (SOURCE, EARLY, SCRATCH):
            self.rest(SOURCE, seed)
        record = self.tried(arm, part) if self.tries(arm, seed, part) else None
        budget = self.budget(arm)
        if part == "equal":
            budget = replace(budget, steps=self.equal_steps(arm, seed), decay=1.0)
        if record is None:
            record = self.done(Run(arm, seed, part, budget))
        self.told["runs"].append(record)
        self.finish(record)
        return record

    def tries(self, arm: str, seed: int, part: str) -> bool:
        """Is this the run whose rate the grid is for?"""
        free = self.runs[seed].budget(arm).rate is None
        known = any(x["arm"] == arm for x in self.told["tried"])  # of a source whose checkpoint is lost
        return free and seed == self.scale.seeds[0] and part != "equal" and arm != EARLY and not known

    def tried(self, arm: str, part: str) -> dict | None:
        """The record of the best rate of the grid; None of a source, which is run again and stays."""
        self.attempt_all(arm, part)
        trials = [x for x in self.pending(arm) if "failed" not in x]
        if not trials:
            rates = ", ".join(f"{rate:g}" for rate in self.numbers.rates)
            raise refuse(arm, "a rate at which its loss stays finite", rates, "leave the arm out")
        self.told["pending"] = [x for x in self.told["pending"] if x["arm"] != arm]
        self.told["tried"] += [{"arm": arm, "rate": x["rate"], "loss": end(x)["loss"]} for x in trials]
        best, seed = self.budget(arm), self.scale.seeds[0]
        self.runs[seed].adopt(Run(arm, seed, part, best, trial=True))
        return None if arm == SOURCE else next(x for x in trials if x["rate"] == best.rate)

    def attempt_all(self, arm: str, part: str) -> None:
        """A trial of every rate of the grid, and some beyond its edge, however often ended."""
        for rate in self.numbers.rates:
            self.attempt(arm, part, rate)
        most = len(self.numbers.rates) + BEYOND
        while len(self.pending(arm)) < most and (rate := beyond(self.pending(arm))):
            self.attempt(arm, part, rate)

    def pending(self, arm: str) -> list[dict]:
        """What is kept of its trials, until the best of them is known."""
        return [x for x in self.told["pending"] if x["arm"] == arm]

    def attempt(self, arm: str, part: str, rate: float) -> None:
        """A trial, unless there was one of this rate."""
        if any(x["rate"] == rate for x in self.pending(arm)):
            return
        seed = self.scale.seeds[0]
        budget = replace(self.runs[seed].budget(arm), rate=rate)
        found = self.trial(Run(arm, seed, part, budget, trial=True))
        self.told["pending"].append(found)
        self.keep(self.told)
        said = found.get("failed") or f"ended at {end(found)['loss']:.3f}"
        self.say(f"{arm}, seed {seed}, at {rate:g}: {said}")

    def trial(self, run: Run) -> dict:
        """Its record, or what is kept of one that diverges."""
        try:
            return self.done(run)
        except NotFinite as error:
            return {"arm": run.arm, "rate": run.budget.rate, "failed": str(error)}

    def done(self, run: Run) -> dict:
        """Its record, with what goes on need: of a baseline, its loss on each held-out example."""
        record = self.runs[run.seed].done(run) | {"made": self.made()}
        if record["baseline"] is None and record["group"] != SOURCE:
            record["losses"] = [round(x, 6) for x in self.runs[run.seed].losses[run.folder].tolist()]
        return record

    def rest(self, source: str, seed: int) -> None:
        """A trained source, whose record may be there without its checkpoint."""
        record = self.found(source, seed, "whole")
        if record and not self.runs[seed].has(source):
            self.told["runs"].remove(record)
        self.need(source, seed)

    def budget(self, arm: str) -> Budget:
        """With its own rate, or the one of the grid that ends lowest. Sources have the same, early or not."""
        budget = self.runs[self.scale.seeds[0]].budget(arm)
        if budget.rate is not None:
            return budget
        tried = [x for x in self.told["tried"] if x["arm"] == (SOURCE if arm == EARLY else arm)]
        return replace(budget, rate=min(tried, key=lambda x: x["loss"])["rate"])

    def equal_steps(self, arm: str, seed: int) -> int:
        """As many as its baseline's FLOPs pay, less its start's; callbacks may make a step cheaper."""
        short = self.need(arm, seed, "short")
        whole = end(self.need(ARMS[arm].baseline, seed))["flops"]
        step = end(short)["flops"] / short["steps"]
        return max(1, int((whole - short["start"]["flops"]) / step))

    def finish(self, record: dict) -> None:
        """Keeps what was done, and says it in a line."""
        self.keep(self.told)
        last = end(record)
        said = f"ended at {last['loss']:.3f} after {last['flops']:.2e} FLOPs, {last['seconds']:.0f} s"
        if record["baseline"]:
            beside = self.found(record["baseline"], record["seed"], "whole")
            saved = compare(record, beside)["saved"]
            said += (
                f"; {saved['flops']:.0%} of the FLOPs saved"
                if saved
                else "; its baseline's loss was not reached"
            )
        self.say(f"{record['arm']}, seed {record['seed']}, {record['part']}: {said}")

    def say(self, line: str) -> None:
        self.console.print(f"{self.name}: {line}", highlight=False, soft_wrap=True)


def beyond(trials: list[dict]) -> float | None:
    """Half the least of the rates, or twice the highest, where that is the best; none where all diverge."""
    losses = {x["rate"]: inf if "failed" in x else end(x)["loss"] for x in trials}
    best = min(losses, key=losses.get)
    if losses[best] == inf:
        return None
    return best / 2 if best == min(losses) else best * 2 if best == max(losses) else None


def digest(of: Material) -> str:
    """Of what is learned from and measured on: another Python's library is another text."""
    parts = (of.examples, of.held_out, of.far)
    told = " ".join(x.fingerprint() for x in parts if x is not None)
    return hashlib.sha256(told.encode()).hexdigest()[:10]


def end(record: dict) -> dict:
    """The last point of a run's curve."""
    return record["curve"][-1]
