"""The runs of a family over seeds: what each arm saved, and where it ended beside its baseline.

Every figure compares an arm with its baseline of the same seed; a seed that has no baseline yet is not
counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median

from growth.demo.saving import COSTS, compare

SAVING = ("short", "whole", "equal")  # of these the first that arrives has the savings
EQUAL = ("equal", "whole")  # those that end at as much compute as their baseline
GROUPS = ("growth", "transfer")


@dataclass(frozen=True)
class Spread:
    """A figure of each seed that has it, and how many have none, for the arm never arrived there."""

    values: tuple[float, ...]
    missing: int = 0

    def __len__(self) -> int:
        return len(self.values)

    @property
    def median(self) -> float | None:
        """A seed without the figure is the worst; None where the middle is one. Larger is better."""
        ranked = sorted(self.values, reverse=True) + [None] * self.missing
        middle = ranked[(len(ranked) - 1) // 2 : len(ranked) // 2 + 1]
        return None if None in middle or not middle else median(middle)

    @property
    def mean(self) -> float | None:
        return fmean(self.values) if self.values else None

    @property
    def ends(self) -> tuple[float, float]:
        return min(self.values), max(self.values)


@dataclass(frozen=True)
class Arm:
    """One arm over its seeds.

    flops, seconds: the shares saved. above: of the seeds that never arrived, the last loss less the
    baseline's. start: the loss right after growth; jump: that less the source's own last loss. ended: at
    equal compute, the last loss less the baseline's; error: of that difference, over held-out windows. far:
    the difference on text of another domain. accuracy: of images; gained: that less the baseline's.
    """

    name: str
    baseline: str
    group: str
    lossless: bool | None
    flops: Spread
    seconds: Spread
    above: Spread
    start: Spread
    jump: Spread
    ended: Spread
    error: float | None
    far: Spread
    accuracy: Spread
    gained: Spread

    @property
    def seeds(self) -> int:
        return len(self.flops) + self.flops.missing


def summaries(family: dict, group: str | None = None) -> list[Arm]:
    """Every arm that has a baseline of one seed at least, of one group or of all, in the report's order."""
    names = dict.fromkeys(run["arm"] for run in family["runs"] if run["baseline"])
    arms = [arm for name in names if (arm := _summary(family, name))]
    return [arm for arm in arms if group in (None, arm.group)]


def ranked(arms: Iterable[Arm]) -> list[Arm]:
    """The one that saved most first; those that never arrived last, the one that ended lowest first."""
    return sorted(arms, key=lambda arm: (arm.flops.median is None, -(arm.flops.median or 0), _end(arm)))


def picked(family: dict, arm: str, parts: Iterable[str] = ("whole",)) -> dict[int, dict]:
    """A run of the arm for each seed: of the first of `parts` that it has."""
    found = {}
    for part in reversed(tuple(parts)):
        found |= {run["seed"]: run for run in family["runs"] if (run["arm"], run["part"]) == (arm, part)}
    return dict(sorted(found.items()))


def sources(family: dict, name: str = "source") -> dict[int, dict]:
    """The source's run of each seed."""
    return {run["seed"]: run for run in family["runs"] if run["group"] == "source" and run["arm"] == name}


def baselines(family: dict) -> list[str]:
    return list(
        dict.fromkeys(
            run["arm"] for run in family["runs"] if not run["baseline"] and run["group"] != "source"
        )
    )


def seeds(family: dict) -> list[int]:
    """Those of the arms that are compared."""
    return sorted({run["seed"] for run in family["runs"] if run["baseline"]})


def last(run: dict) -> float:
    return run["curve"][-1]["loss"]


def margins(family: dict) -> dict[str, float]:
    """How far each baseline ended below the source of its seed, at the least: at 0 copying it is as good."""
    of = sources(family)
    return {
        name: min(last(_beside(of, seed)) - last(run) for seed, run in picked(family, name).items())
        for name in baselines(family)
        if of
    }


def _summary(family: dict, name: str) -> Arm | None:
    one = next(run for run in family["runs"] if run["arm"] == name)
    against, source = picked(family, one["baseline"]), sources(family, one.get("source", "source"))
    read, equal = (
        {seed: run for seed, run in picked(family, name, parts).items() if seed in against}
        for parts in (SAVING, EQUAL)
    )
    if not read:
        return None
    saved = {seed: _saved(family, name, seed, against[seed]) for seed in read}
    never = [seed for seed in saved if not saved[seed]]
    shares = (Spread(tuple(x[cost] for x in saved.values() if x), len(never)) for cost in COSTS)
    noise = [run["noise"] for run in equal.values() if run.get("noise") is not None]
    return Arm(
        name,
        one["baseline"],
        one["group"],
        one["lossless"],
        *shares,
        above=Spread(tuple(last(equal.get(seed, read[seed])) - last(against[seed]) for seed in never)),
        start=Spread(tuple(run["curve"][0]["loss"] for run in read.values())),
        jump=Spread(
            tuple(
                run["curve"][0]["loss"] - last(_beside(source, seed)) for seed, run in read.items() if source
            )
        ),
        ended=Spread(tuple(last(run) - last(against[seed]) for seed, run in equal.items())),
        error=fmean(noise) if noise else None,
        far=_apart(equal, against, "far"),
        accuracy=Spread(tuple(run["accuracy"] for run in equal.values() if "accuracy" in run)),
        gained=_apart(equal, against, "accuracy"),
    )


def _saved(family: dict, name: str, seed: int, baseline: dict) -> dict | None:
    """The shares saved by the first of the parts that arrives: a short run may end above."""
    for part in SAVING:
        for run in picked(family, name, (part,)).values():
            if run["seed"] == seed and (saved := compare(run, baseline)["saved"]):
                return saved
    return None


def _beside(runs: dict[int, dict], seed: int) -> dict:
    """The run of that seed; where all seeds share one, that."""
    return runs.get(seed) or next(iter(runs.values()))


def _apart(runs: dict[int, dict], against: dict[int, dict], what: str) -> Spread:
    pairs = [(run.get(what), against[seed].get(what)) for seed, run in runs.items()]
    return Spread(tuple(x - y for x, y in pairs if x is not None and y is not None))


def _end(arm: Arm) -> float:
    return arm.ended.mean if arm.ended.values else (arm.above.mean or 0.0)
