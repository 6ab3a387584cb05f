"""What a report's figures do not say by themselves: for the terminal, the page and REUSE.md."""

from statistics import fmean

from growth.demo.goals import best, goals
from growth.demo.saving import whole
from growth.demo.summary import GROUPS, last, margins, picked, seeds, sources, summaries
from growth.demo.words import capital, listed, percent, saved, spoken


def remarks(report: dict) -> list[str]:
    """Goals, then of every family what follows, then what was left out."""
    judged = [
        f"{goal.family}: {goal.what}: {'met' if goal.met else 'not met'}. {capital(goal.figure)}."
        for goal in goals(report)
    ]
    of = [f"{family['name']}: {line}" for family in report["families"] for line in about(family)]
    return [*judged, *of, *report["skipped"]]


def about(family: dict) -> list[str]:
    """The arms that never arrived, and how much the comparisons are worth."""
    return [*unreached(family), *caveats(family)]


def caveats(family: dict) -> list[str]:
    return [*with_source(family), *fairness(family), *at_the_edge(family), *left_out(family)]


def unreached(family: dict) -> list[str]:
    return [f"{spoken(arm.name)}: {saved(arm)}." for arm in summaries(family) if arm.flops.missing]


def fairness(family: dict) -> list[str]:
    """How many seeds there are, and whether the baselines ended below the source."""
    arms, done, source = summaries(family), seeds(family), sources(family)
    if not arms:
        return ["no arm can be compared with a baseline yet."]
    out = [f"seed{'s' * (len(done) > 1)} {listed([str(seed) for seed in done])}."]
    fewer = [f"{spoken(arm.name)} ({arm.seeds})" for arm in arms if arm.seeds < len(done)]
    if fewer:
        out.append(f"with fewer seeds: {listed(fewer)}.")
    if not source:
        return [*out, "the source's own loss is missing."]
    losses = sorted({f"{last(run):.3f}" for run in source.values()})
    said = losses[0] if len(losses) == 1 else f"{losses[0]} to {losses[-1]}"
    below = margins(family)
    if above := [name for name, margin in below.items() if margin <= 0]:
        return [*out, f"not a fair test, for {listed(above)} did not get below the source's {said}."]
    margin = f"by {min(below.values()):.3f} at the least"
    return [*out, f"every baseline ended below the source's {said}, {margin}: none was beaten by copying it."]


def at_the_edge(family: dict) -> list[str]:
    """Of which models the grid may end before the best rate."""
    found = []
    for name in dict.fromkeys(one["arm"] for one in family["tried"]):
        losses = {one["rate"]: one["loss"] for one in family["tried"] if one["arm"] == name}
        if len(losses) > 1 and min(losses, key=losses.get) in (min(losses), max(losses)):
            found.append(spoken(name))
    return [f"the best rate is the first or last of those tried for {listed(found)}."] if found else []


def with_source(family: dict) -> list[str]:
    """What the best arms save where their source's training is counted too."""
    out = []
    for group in GROUPS:
        top = best(summaries(family, group))
        if top is None or top.flops.median is None:
            continue
        name = next(run for run in family["runs"] if run["arm"] == top.name).get("source", "source")
        of, against = sources(family, name), picked(family, top.baseline)
        if shares := [
            whole(of[seed])["flops"] / whole(against[seed])["flops"] for seed in against if seed in of
        ]:
            rest = percent(top.flops.median - fmean(shares))
            out.append(f"{spoken(top.name)} saves {rest} where its source's training is counted too.")
    return out


def left_out(family: dict) -> list[str]:
    found = family.get("left_out", {}).items()
    return [f"{spoken(name)} left out: {why.removeprefix(f'{name}: ')}" for name, why in found]
