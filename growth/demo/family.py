"""One family of the report: what its arms saved, curves and figures, what they were measured against."""

from collections.abc import Iterable
from html import escape

from growth.demo.charts import Line, chart, points
from growth.demo.goals import best, goal
from growth.demo.html import details, items, paragraph, scrolling, small, text
from growth.demo.remarks import caveats
from growth.demo.saving import compare, whole
from growth.demo.style import COLOURS
from growth.demo.summary import (
    EQUAL,
    GROUPS,
    SAVING,
    Arm,
    Spread,
    baselines,
    last,
    picked,
    ranked,
    sources,
    summaries,
)
from growth.demo.words import (
    between,
    capital,
    duration,
    percent,
    percents,
    saved,
    scaled,
    seeds_of,
    signed,
    spoken,
)

NEVER = "<span class='missed'>not reached</span>"


def section(family: dict) -> str:
    """Title, what was done, growth, transfer, what they were measured against, what the models write."""
    parts = [f"<section><h2>{text(family['title'])}</h2>", paragraph(family["said"])]
    for group in GROUPS:
        if arms := ranked(summaries(family, group)):
            parts += [f"<h3>{text(heading(group, arms))}</h3>", *_group(family, arms)]
    parts += [
        items(map(capital, caveats(family))),
        details("What they were measured against", _against(family)),
        details("The learning rates that were tried", _tried(family)),
        details("What the models write", _samples(family)),
        "</section>",
    ]
    return "\n".join(filter(None, parts))


def heading(group: str, arms: list[Arm]) -> str:
    """The result: the arm that saved most, and how many never arrived."""
    top, never = best(arms), sum(arm.flops.median is None for arm in arms)
    if never == len(arms):
        who = f"none of {never} arms" if never > 1 else f"{spoken(top.name)} never"
        return capital(f"{who} reached its baseline's loss by {group}")
    said = (
        f"{spoken(top.name)} reached its baseline's loss with {percent(top.flops.median)} of its FLOPs saved"
    )
    return capital(said + (f"; {never} of {len(arms)} arms did not reach theirs" if never else ""))


def _group(family: dict, arms: list[Arm]) -> list[str]:
    """The curves beside the bars, which are their legend; the figures; every arm by itself."""
    colours = {arm.name: f"c{i + 1}" if i < COLOURS else "c0" for i, arm in enumerate(arms)}
    return [
        f"<div class='pair'>{_overview(family, arms, colours)}{_bars(arms, colours)}</div>",
        _figures(arms, family["unit"]),
        details(f"Every arm beside its baseline ({len(arms)})", _panels(family, arms)),
    ]


def _overview(family: dict, arms: list[Arm], colours: dict[str, str]) -> str:
    """All arms, those that saved most in colours, on top; a baseline in the colour of its best arm."""
    lines, against = [], {arm.baseline: colours[arm.name] for arm in reversed(arms)}
    if len(against) == 1:
        against = dict.fromkeys(against, "c0")
    for arm in reversed(arms):
        kind = colours[arm.name] + (" thin" if colours[arm.name] == "c0" else "")
        lines += _curves(read_in(family, arm).values(), kind)
    lines += [Line(points(picked(family, name).values()), f"{of} dashed") for name, of in against.items()]
    title = f"{family['title']}: validation loss against FLOPs"
    said = "; ".join(f"{arm.name}: {saved(arm)}" for arm in arms)
    caption = (
        "Validation loss against FLOPs, the start's included: the mean over seeds, on a band from the least"
    )
    caption += " to the most. Dashed: from scratch. Dotted: the source."
    picture = chart(lines, _source(family), family["unit"], title, f"FLOPs saved. {said}.")
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _bars(arms: list[Arm], colours: dict[str, str]) -> str:
    """A bar an arm: the median, a line from the least to the most; dashed, the goal."""
    rows = []
    for arm in arms:
        key = f"<span class='key {colours[arm.name]}' aria-hidden='true'></span>"
        amount = NEVER if arm.flops.median is None else f"<b>{percent(arm.flops.median)}</b>"
        under = "" if arm.flops.median is None else _under(arm.flops)
        bar = f"<span class='bar {colours[arm.name]}' aria-hidden='true'>{_marks(arm)}</span>"
        rows.append(
            f"<tr><th scope='row'>{key}{text(arm.name)}</th><td>{bar}</td>"
            f"<td class='amount'>{amount}{small(under)}</td></tr>"
        )
    wanted, most = {x for arm in arms if (x := goal(arm))}, max(arm.seeds for arm in arms)
    caption = f"FLOPs saved, the median of {seeds_of(most)}" if most > 1 else "FLOPs saved"
    caption += f"; dashed: the goal, {percent(max(wanted))}" if wanted else ""
    return f"<table class='bars'><caption>{text(caption)}</caption><tbody>{''.join(rows)}</tbody></table>"


def _marks(arm: Arm) -> str:
    spread, out = arm.flops, ""
    if spread.median is not None and spread.median > 0:
        out += f"<i style='width:{100 * min(1, spread.median):.1f}%'></i>"
    if len(spread) > 1:
        least, most = (100 * min(1, max(0, x)) for x in spread.ends)
        out += f"<u style='left:{least:.1f}%;width:{most - least:.1f}%'></u>"
    if wanted := goal(arm):
        out += f"<s style='left:{100 * wanted:.0f}%'></s>"
    return out


def _figures(arms: list[Arm], unit: str) -> str:
    """The table of all arms, the one that saved most first."""
    images, far = any(arm.accuracy.values for arm in arms), any(arm.far.values for arm in arms)
    columns = ["arm", "FLOPs saved", "time saved", "loss at the start", "at the end less the baseline's"]
    columns += ["on other text, likewise"] * far + ["named rightly"] * images
    rows = []
    for arm in arms:
        cells = [text(arm.name) + small("lossless" if arm.lossless else "")]
        cells += [_saved(arm, "flops"), _saved(arm, "seconds")]
        cells.append(f"{arm.start.mean:.3f}{small(_jump(arm))}")
        cells.append(_ended(arm))
        cells += [f"{signed(arm.far.mean)}{_spread(arm.far)}" if arm.far.values else ""] * far
        if images:
            named = f"{100 * arm.accuracy.mean:.1f} %" if arm.accuracy.values else ""
            gained = f"{signed(100 * arm.gained.mean, 1)} points" if arm.gained.values else ""
            cells.append(named + small(gained))
        rows.append(cells)
    return scrolling(f"Figures of every arm; losses in {unit}", columns, rows)


def _saved(arm: Arm, cost: str) -> str:
    spread: Spread = getattr(arm, cost)
    if spread.median is None:
        some = f" in {spread.missing} of {arm.seeds}" if spread.values else ""
        return NEVER + small(f"ended {arm.above.mean:.3f} above{some}" if cost == "flops" else "")
    return percent(spread.median) + small(_under(spread))


def _under(spread: Spread) -> str:
    """Least and most, and how many seeds arrived where not all did."""
    count = len(spread) + spread.missing
    some = f"{len(spread)} of {seeds_of(count)}" if spread.missing else ""
    return ", ".join(filter(None, (percents(spread), some)))


def _jump(arm: Arm) -> str:
    return f"source's {signed(arm.jump.mean)}" if arm.jump.values else ""


def _ended(arm: Arm) -> str:
    """The difference and its error, coloured by whether the arm ended below."""
    if not arm.ended.values:
        return "<span class='quiet'>not run</span>"
    error = "" if arm.error is None else f" ± {arm.error:.3f}"
    kind = "met" if arm.ended.mean < 0 else "missed"
    return f"<span class='{kind}'>{signed(arm.ended.mean)}{error}</span>{_spread(arm.ended)}"


def _spread(spread: Spread) -> str:
    return small(between(spread).strip(" ()"))


def _panels(family: dict, arms: list[Arm]) -> str:
    """A picture an arm: its baseline dashed, what it saved between its arrival and its baseline's end."""
    out = []
    for arm in arms:
        against = picked(family, arm.baseline)
        read, equal = read_in(family, arm), picked(family, arm.name, EQUAL)
        others = [run for seed, run in equal.items() if seed in read and run is not read[seed]]
        lines = [*_curves(against.values(), "c0 dashed"), *_curves(others, "c1 thin")]
        lines += _curves(read.values(), "c1")
        result = f"FLOPs saved: {saved(arm)}"
        picture = chart(
            lines,
            _source(family),
            family["unit"],
            f"{arm.name} beside {arm.baseline}",
            f"{result}.",
            _crossing(read, against),
        )
        out.append(
            f"<figure>{picture}<figcaption><b>{text(arm.name)}</b> {text(result)}</figcaption></figure>"
        )
    note = (
        "Thick: the run in which savings are read. Thin: the one of equal compute. The circle is the arrival"
    )
    note += " at the baseline's last loss, the line from it what was saved. Means over seeds."
    return f"{paragraph(note, 'quiet')}<div class='grid'>{''.join(out)}</div>"


def read_in(family: dict, arm: Arm) -> dict[int, dict]:
    """Of each seed that has a baseline, the run in which savings are read: the first that arrives, else the
    first."""
    against = picked(family, arm.baseline)
    found = {seed: run for seed, run in picked(family, arm.name, SAVING).items() if seed in against}
    for part in reversed(SAVING):
        for seed, run in picked(family, arm.name, (part,)).items():
            if seed in found and compare(run, against[seed])["reached"]:
                found[seed] = run
    return found


def _curves(runs: Iterable[dict], kind: str) -> list[Line]:
    """Means over seeds, of each part by itself: parts are measured at other steps."""
    parts: dict[str, list[dict]] = {}
    for run in runs:
        parts.setdefault(run["part"], []).append(run)
    return [Line(points(of), kind) for of in parts.values()]


def _crossing(read: dict[int, dict], against: dict[int, dict]) -> tuple | None:
    """Means over the seeds that arrived."""
    found = [
        (reached["flops"], whole(against[seed])["flops"], last(against[seed]))
        for seed, run in read.items()
        if (reached := compare(run, against[seed])["reached"])
    ]
    return tuple(sum(x) / len(x) for x in zip(*found)) if found else None


def _source(family: dict) -> float | None:
    losses = [last(run) for run in sources(family).values()]
    return sum(losses) / len(losses) if losses else None


def _against(family: dict) -> str:
    """The source and the baselines: what they took, and where they ended."""
    rows = []
    for name in [*(["source"] if sources(family) else []), *baselines(family)]:
        runs = list((sources(family) if name == "source" else picked(family, name)).values())
        ends, far = Spread(tuple(map(last, runs))), [run["far"] for run in runs if run.get("far") is not None]
        named = [run["accuracy"] for run in runs if "accuracy" in run]
        cost = {of: sum(whole(run)[of] for run in runs) / len(runs) for of in ("flops", "seconds")}
        one = runs[0]
        rows.append(
            [
                text(name),
                f"{ends.mean:.3f}" + small(_from(ends)),
                f"{sum(far) / len(far):.3f}" if far else "",
                f"{100 * sum(named) / len(named):.1f} %" if named else "",
                scaled(cost["flops"]),
                duration(cost["seconds"]),
                scaled(one["parameters"]),
                str(one["steps"]),
                f"{one['rate']:g}",
            ]
        )
    columns = [
        "model",
        "last loss",
        "on other text",
        "named rightly",
        "FLOPs",
        "time",
        "parameters",
        "steps",
        "rate",
    ]
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]
    cut = [[row[i] for i in kept] for row in rows]
    return scrolling(f"Losses in {family['unit']}", [columns[i] for i in kept], cut) if rows else ""


def _from(spread: Spread) -> str:
    return f"{min(spread.values):.3f} to {max(spread.values):.3f}" if len(spread) > 1 else ""


def _tried(family: dict) -> str:
    """An arm a row, a rate a column, the lowest loss in bold."""
    found: dict[str, dict[float, float]] = {}
    for one in family["tried"]:
        found.setdefault(one["arm"], {})[one["rate"]] = one["loss"]
    rates = sorted({rate for of in found.values() for rate in of})
    rows = []
    for arm, of in found.items():
        cells = [f"{of[rate]:.3f}" if rate in of else "" for rate in rates]
        lowest = min(of, key=of.get)
        rows.append([text(arm), *(f"<b>{x}</b>" if rate == lowest else x for rate, x in zip(rates, cells))])
    caption = f"Losses at the end of shortened runs, {family['unit']}"
    return scrolling(caption, ["arm", *(f"{rate:g}" for rate in rates)], rows) if rows else ""


def _samples(family: dict) -> str:
    """Of each arm the words of one run, the source's first."""
    said = {}
    for run in family["runs"]:
        if run.get("sample"):
            said.setdefault(run["arm"], run["sample"])
    parts = (f"<div><b>{text(arm)}</b><pre>{escape(words)}</pre></div>" for arm, words in said.items())
    return f"<div class='grid'>{''.join(parts)}</div>" if said else ""
