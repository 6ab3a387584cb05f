"""What the methods were to save, and whether they did."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from growth.demo.summary import Arm, ranked, summaries
from growth.demo.words import difference, listed, percent, saved, spoken

GROWTH, TRANSFER = 0.45, 0.60  # of the FLOPs: the papers' 45 % of LiGO, 2.5 times less of XATL
TRANSFERRED = ("hybrid", "retnet")  # the transfers that the goal is for, by the first word of their arms


@dataclass(frozen=True)
class Goal:
    """family: its name; what was asked for; figure: what came out; met: was it reached."""

    family: str
    what: str
    figure: str
    met: bool


def goal(arm: Arm) -> float | None:
    """The share of the FLOPs that an arm of this kind is to save, where one was set."""
    if arm.group == "growth":
        return GROWTH
    return TRANSFER if kind(arm) in TRANSFERRED else None


def kind(arm: Arm) -> str:
    """The method or the mixer: the first word of its name."""
    return re.match(r"\w+", arm.name)[0]


def goals(report: dict) -> list[Goal]:
    """Of every family those that can be judged by the runs that are there."""
    out = []
    for family in report["families"]:
        grown, moved = summaries(family, "growth"), summaries(family, "transfer")
        if grown:
            out.append(_saving(family, f"growth saves {percent(GROWTH)} of the FLOPs", grown, GROWTH))
        for name in TRANSFERRED:
            if arms := [arm for arm in moved if kind(arm) == name]:
                what = f"a transfer to a {spoken(name)} saves {percent(TRANSFER)}"
                out.append(_saving(family, what, arms, TRANSFER))
        kept = [arm for arm in grown + moved if arm.lossless]
        if any(arm.ended.values for arm in kept):
            out.append(_lossless(family, kept))
    return out


def best(arms: Collection[Arm]) -> Arm | None:
    """The one that saved most, of those with the most seeds: of fewer it may be luck."""
    most = max((arm.seeds for arm in arms), default=0)
    return next(iter(ranked(arm for arm in arms if arm.seeds == most)), None)


def _saving(family: dict, what: str, arms: list[Arm], least: float) -> Goal:
    top = best(arms)
    met = top.flops.median is not None and top.flops.median >= least
    return Goal(family["name"], what, f"{spoken(top.name)}: {saved(top)}", met)


def _lossless(family: dict, arms: list[Arm]) -> Goal:
    """Of those that have such a run the arm that ended highest decides."""
    run = [arm for arm in arms if arm.ended.values]
    worst = max(run, key=lambda arm: arm.ended.mean)
    below = sum(arm.ended.mean < 0 for arm in run)
    figure = f"{below} of {len(run)} do; the highest, {spoken(worst.name)}: {difference(worst)}"
    if left := [spoken(arm.name) for arm in arms if arm not in run]:
        figure += f"; not run: {listed(left)}"
    return Goal(
        family["name"],
        "every lossless arm ends below its baseline at equal compute",
        figure,
        below == len(run),
    )
