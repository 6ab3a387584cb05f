"""report.html: one page by itself, no script, nothing to load; a function of what report.json holds."""

from growth.demo.family import section
from growth.demo.goals import Goal, best, goals
from growth.demo.html import items, paragraph, text
from growth.demo.style import style
from growth.demo.summary import GROUPS, Spread, seeds, summaries
from growth.demo.words import duration, listed, percent, percents, seeds_of

COUNTING = """
Cost is read where an arm's curve first crosses the last loss of its baseline of the same seed, linear between
measurements. It includes what growing, aligning or learning cost. Training the source is not counted: it is
the model that one has already; of an early arm, a checkpoint with its optimizer whose rate has not fallen.

Savings are read in a run whose schedule is made to arrive early, where there is one that does, else in the
longer one. The final loss is that of a run that took as many FLOPs in all as its baseline, the start's
included.

FLOPs are counted on a real forward and backward pass, kernel by kernel, two for a multiply-add. Elementwise
work, the optimizer and measuring the loss are left out. Time is by the clock, without measuring the loss.

Of several seeds the median is what was saved, and a seed in which an arm never arrived is the worst; least
and most stand beside it. Differences in loss are means over seeds. What follows ± is the standard error of
the difference over the held-out windows, which are the same for all.
"""
QUICK = "A quick run, on a job too small to mean much: it shows that everything works, not what it saves."


def page(report: dict) -> str:
    """The report as HTML: what came out, every family with its curves and tables, how it was counted."""
    parts = [
        f"<header><h1>{text(headline(report))}</h1>",
        paragraph(_under(report), "quiet"),
        *([paragraph(QUICK)] if report["scale"] == "quick" else []),
        "</header>",
        _goals(goals(report)),
        *(section(family) for family in report["families"]),
        "<section><h2>How it was counted</h2>",
        items(COUNTING.split("\n\n")),
        *([f"<h3>What was left out</h3>{items(report['skipped'])}"] if report["skipped"] else []),
        "<h3>The machine</h3>",
        paragraph(_machine(report), "quiet"),
        "</section>",
    ]
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{text(headline(report))}</title><style>{style()}</style>"
    )
    inside = "\n".join(filter(None, parts))
    body = f"<body><main>\n{inside}\n</main></body>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head>\n{body}</html>\n"


def headline(report: dict) -> str:
    """What the best arm of every family saved, of growth and of transfer."""
    said = [told for group in GROUPS if (told := _saved(report, group))]
    if not said:
        return "Reusing a trained model: nothing can be compared yet"
    amounts = listed([f"{amount} by {group}" for amount, group in said])
    return f"Of training's FLOPs, reusing a trained model saved {amounts}"


def _saved(report: dict, group: str) -> tuple[str, str] | None:
    """From the least to the most of the families in which the best arm arrived, and how many those are."""
    tops = [best(arms) for family in report["families"] if (arms := summaries(family, group))]
    found = sorted(top.flops.median for top in tops if top.flops.median is not None)
    if not found:
        return ("nothing", group) if tops else None
    of = "" if len(found) == len(tops) else f" in {len(found)} of {len(tops)} families"
    return percents(Spread(tuple(found))) or percent(found[0]), group + of


def _under(report: dict) -> str:
    """Where the figures come from, in a line."""
    runs = [run for family in report["families"] for run in family["runs"]]
    most = max((len(seeds(family)) for family in report["families"]), default=0)
    return (
        f"growth demo, scale {report['scale']}: {len(runs)} runs, up to {seeds_of(most)}, "
        f"{when(report)}. Saved is what an arm did not need to reach the validation "
        "loss that training the same model from scratch ends with."
    )


def made(report: dict) -> list[dict]:
    """Machine, date and commit of every run, in the order of their dates; older results have one for all."""
    found = [run["made"] for family in report["families"] for run in family["runs"] if "made" in run]
    return sorted(found, key=lambda x: x["date"]) or [report["machine"] | {"commit": report["commit"]}]


def when(report: dict) -> str:
    """The date or the first and the last, the commit or all of them."""
    found = made(report)
    dates = dict.fromkeys((found[0]["date"], found[-1]["date"]))
    commits = [x[:10] for x in dict.fromkeys(x["commit"] for x in found) if x]
    said = f", commit{'s' * (len(commits) > 1)} {', '.join(commits)}" if commits else ""
    return " to ".join(dates) + said


def _goals(found: list[Goal]) -> str:
    if not found:
        return ""
    rows = "".join(
        f"<tr><th scope='row'>{text(goal.family)}: {text(goal.what)}</th><td>{text(goal.figure)}</td>"
        f"<td class='verdict {'met' if goal.met else 'missed'}'>{'met' if goal.met else 'not met'}</td></tr>"
        for goal in found
    )
    met = sum(goal.met for goal in found)
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("goal", "what came out", ""))
    return (
        f"<section><h2>{met} of {len(found)} goals met</h2>"
        f"<table class='goals'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _machine(report: dict) -> str:
    told = dict.fromkeys(
        f"{x['processor']}, {x['cores']} cores, {x['threads']} threads, {x['system']}; Python "
        f"{x['python']}, torch {x['torch']}, transformers {x['transformers']}, growth {x['growth']}"
        for x in made(report)
    )
    return f"{'; '.join(told)}; {duration(report['seconds'])} for all runs."
