"""Which runs a family's report needs. Those that it has are not done again: a study goes on where it ended.

rate(arm)   the one of the grid whose run of a third of the steps, of the first seed, ends lowest
whole       a baseline, or, where nothing is parted, an arm: the steps of its budget
short       an arm on fewer steps than its baseline, in which the rate falls: when does it arrive?
equal       an arm on as many FLOPs as its baseline, its start's included: where does it end?
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from growth.demo.arms import ARMS, SCRATCH
from growth.demo.material import Material, material
from growth.demo.runs import EARLY, SOURCE, Run, Runs
from growth.demo.saving import compare
from growth.demo.scales import Budget, Numbers, Scale

NAMES = {"gpt_neox": "GPT-NeoX", "llama": "Llama", "bert": "BERT", "vit": "ViT"}
TRIED = 3  # a trial of a rate has a third of the steps


class Study:
    """One family of a scale. told: what its report has so far; keep: is called with that after every run."""

    def __init__(
        self,
        scale: Scale,
        name: str,
        work: Path,
        told: dict | None,
        keep: Callable[[dict], None],
        console: Console,
    ):
        self.scale, self.name, self.work, self.keep, self.console = scale, name, work, keep, console
        self.numbers: Numbers = scale.families[name]
        self.material: Material = material(self.numbers, work / name / "text" if scale.keep else None)
        self.runs = {
            seed: Runs(self.numbers, self.material, work / name / str(seed), seed, scale.keep)
            for seed in scale.seeds
        }
        self.told = told or self.begun()

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
            **sizes,
            "rates": list(self.numbers.rates),
            "tried": [],
            "left_out": {},
            "runs": [],
        }

    def carry_out(self) -> dict:
        """All that is missing. Returns what the report has of the family."""
        arms = self.numbers.arms or ARMS
        for source in sorted({ARMS[name].source for name in arms}, reverse=True):
            self.rest(source, self.scale.seeds[0])
        self.told["left_out"] = self.runs[self.scale.seeds[0]].left_out()
        for arm, seed, part in self.wanted():
            self.need(arm, seed, part)
        return self.told

    def arms(self) -> list[str]:
        """Those that can be made."""
        return [name for name in self.numbers.arms or ARMS if name not in self.told["left_out"]]

    def wanted(self) -> Iterator[tuple[str, int, str]]:
        """Arms, seeds and parts, in order: the arms in theirs, what arrives early before what ends late."""
        if not self.scale.parted:
            yield from ((arm, seed, "whole") for seed in self.scale.seeds for arm in self.arms())
            return
        yield from ((arm, seed, "short") for arm in self.arms() for seed in self.scale.seeds)
        yield from ((arm, seed, "equal") for arm in self.arms() for seed in self.scale.seeds)

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
        budget = self.budget(arm)
        if part == "equal":
            budget = replace(budget, steps=self.equal_steps(arm, seed), decay=1.0)
        record = self.runs[seed].done(Run(arm, seed, part, budget))
        self.told["runs"].append(record)
        self.finish(record)
        return record

    def rest(self, source: str, seed: int) -> None:
        """A trained source, whose record may be there without its checkpoint."""
        record = self.found(source, seed, "whole")
        if record and not self.runs[seed].has(source):
            self.told["runs"].remove(record)
        self.need(source, seed)

    def budget(self, arm: str) -> Budget:
        """With a rate: its own, or the best of the grid. Sources have the same, early or not."""
        arm = SOURCE if arm == EARLY else arm
        budget = self.runs[self.scale.seeds[0]].budget(arm)
        if budget.rate is not None:
            return budget
        trial = replace(budget, steps=max(1, budget.steps // TRIED), warmup=budget.warmup // TRIED)
        for rate in self.numbers.rates:
            if not any((x["arm"], x["rate"]) == (arm, rate) for x in self.told["tried"]):
                run = Run(arm, self.scale.seeds[0], "rate", replace(trial, rate=rate))
                record = self.runs[run.seed].done(run)
                self.told["tried"].append({"arm": arm, "rate": rate, "loss": record["curve"][-1]["loss"]})
                self.finish(record)
        tried = [x for x in self.told["tried"] if x["arm"] == arm]
        return replace(budget, rate=min(tried, key=lambda x: x["loss"])["rate"])

    def equal_steps(self, arm: str, seed: int) -> int:
        """As many as its baseline's FLOPs pay, less its start's; callbacks may make a step cheaper."""
        short = self.need(arm, seed, "short")
        whole = self.need(ARMS[arm].baseline, seed)["curve"][-1]["flops"]
        step = short["curve"][-1]["flops"] / short["steps"]
        return max(1, int((whole - short["start"]["flops"]) / step))

    def finish(self, record: dict) -> None:
        """Keeps what was done, and says it in a line."""
        self.keep(self.told)
        end = record["curve"][-1]
        said = f"ended at {end['loss']:.3f} after {end['flops']:.2e} FLOPs, {end['seconds']:.0f} s"
        if record["baseline"] and record["part"] != "rate":
            beside = self.found(record["baseline"], record["seed"], "whole")
            saved = compare(record, beside)["saved"]
            said += (
                f"; {saved['flops']:.0%} of the FLOPs saved"
                if saved
                else "; its baseline's loss was not reached"
            )
        part = f"{record['part']} {record['rate']:g}" if record["part"] == "rate" else record["part"]
        line = f"{self.name}: {record['arm']}, seed {record['seed']}, {part}: {said}"
        self.console.print(line, highlight=False, soft_wrap=True)
