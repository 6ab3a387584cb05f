"""The report in a terminal: the table, and what it does not say."""

from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.table import Table

from growth.demo.goals import goals
from growth.demo.saving import COSTS, whole
from growth.demo.summary import (
    GROUPS,
    Arm,
    Spread,
    baselines,
    last,
    picked,
    ranked,
    seeds,
    sources,
    summaries,
    unfair,
)
from growth.demo.words import capital, listed, percent, saved, signed, spoken

COLUMNS = ("arm", "at start", "FLOPs saved", "time saved", "at the end", "seeds")


def table(report: dict) -> Table:
    """A row an arm, in 80 columns. At the end: its last loss less its baseline's at equal compute. Seeds:
    those that arrived, of how many."""
    out = Table(
        title="What reusing a model saved, against training from scratch to the same validation loss",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for i, name in enumerate(COLUMNS):
        out.add_column(name, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for family in report["families"]:
        out.add_row(f"[bold]{family['name']}[/]", *[""] * (len(COLUMNS) - 1))
        arms = summaries(family)
        for arm in arms:
            out.add_row(*cells(arm), end_section=arm is arms[-1])
    return out


def cells(arm: Arm) -> tuple[str, ...]:
    """Name, loss right after growth, the shares saved, the difference at the end, seeds that arrived."""
    error = "" if arm.error is None else f" ± {arm.error:.3f}"
    ended = f"{signed(arm.ended.mean)}{error}" if arm.ended.values else ""
    shares = (_share(getattr(arm, cost)) for cost in COSTS)
    return arm.name, f"{arm.start.mean:.3f}", *shares, ended, f"{len(arm.flops)}/{arm.seeds}"


def remarks(report: dict) -> list[str]:
    """What the table does not say: goals, arms that never arrived, whether the comparisons are worth
    anything, and what was left out."""
    judged = [
        f"{goal.family}: {goal.what}: {'met' if goal.met else 'not met'}. {capital(goal.figure)}."
        for goal in goals(report)
    ]
    return [*judged, *(line for family in report["families"] for line in about(family)), *report["skipped"]]


def about(family: dict) -> list[str]:
    """Of one family."""
    return [
        f"{family['name']}: {line}"
        for line in (
            *unreached(family),
            *with_source(family),
            *fairness(family),
            *at_the_edge(family),
            *left_out(family),
        )
    ]


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
    if above := unfair(family):
        return [*out, f"not a fair test, for {listed(above)} did not get below the source's {said}."]
    return [*out, f"every baseline ended below the source's {said}: none was beaten by copying it."]


def at_the_edge(family: dict) -> list[str]:
    """Of which models that arms are measured against, or made of, the grid may end before the best rate."""
    found = []
    for name in ("source", *baselines(family)):
        losses = {one["rate"]: one["loss"] for one in family["tried"] if one["arm"] == name}
        if len(losses) > 1 and min(losses, key=losses.get) in (min(losses), max(losses)):
            found.append(name)
    return [f"the best rate is the first or last of those tried for {listed(found)}."] if found else []


def with_source(family: dict) -> list[str]:
    """What the best arms save where their source's training is counted too."""
    out = []
    for group in GROUPS:
        top = next(iter(ranked(summaries(family, group))), None)
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


def _share(spread: Spread) -> str:
    if spread.median is None:
        return "not reached"
    least, most = (percent(x)[:-2] for x in spread.ends)
    return percent(spread.median) + (f" ({least}..{most})" if len(spread) > 1 else "")
