"""The report in a terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from growth.demo.saving import COSTS
from growth.demo.summary import Arm, Spread, summaries
from growth.demo.words import percent, signed

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


def _share(spread: Spread) -> str:
    if spread.median is None:
        return "not reached"
    least, most = (percent(x)[:-2] for x in spread.ends)
    return percent(spread.median) + (f" ({least}..{most})" if len(spread) > 1 else "")
