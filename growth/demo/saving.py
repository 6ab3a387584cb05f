"""What an arm saves: the cost at which it has the loss that its baseline ends with.

An arm's curve is a list of {"step", "flops", "seconds", "loss"}; its own cost, of growing or transferring,
comes first:

    cost = start + curve at the first crossing of the baseline's last loss, linear between measurements
    saved = 1 - cost / (the baseline's whole cost)
"""

from rich.box import SIMPLE_HEAD
from rich.table import Table

COSTS = ("flops", "seconds")


def reach(curve: list[dict], loss: float) -> dict[str, float] | None:
    """FLOPs and seconds at which the curve first is at `loss` or below; None where it never is."""
    before = None
    for point in curve:
        if point["loss"] <= loss:
            if before is None:
                return {cost: point[cost] for cost in COSTS}
            x = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return {cost: before[cost] + x * (point[cost] - before[cost]) for cost in COSTS}
        before = point
    return None


def compare(arm: dict, baseline: dict) -> dict:
    """reached: FLOPs and seconds, the start's included; saved: shares of the baseline's. None if never."""
    last = baseline["curve"][-1]
    reached = reach(arm["curve"], last["loss"])
    if reached:
        reached = {cost: reached[cost] + arm["start"][cost] for cost in COSTS}
    saved = {cost: 1 - reached[cost] / last[cost] for cost in COSTS} if reached else None
    return {"reached": reached, "saved": saved}


def arms_of(report: dict) -> list[dict]:
    """The arms of all groups, each baseline before those that it is for."""
    return [arm for group in report["groups"] for arm in group["arms"]]


def rows(report: dict) -> list[tuple[str, ...]]:
    """The cells of the table: name, loss at the start and the end, FLOPs, saved, seconds, saved."""
    out = []
    for arm in arms_of(report):
        first, last = arm["curve"][0], arm["curve"][-1]
        cells = arm["name"], f"{first['loss']:.3f}", f"{last['loss']:.3f}"
        if arm["baseline"] is None:
            out.append((*cells, f"{last['flops']:.2e}", "", f"{last['seconds']:.1f}", ""))
        elif arm["reached"]:
            flops, seconds = (f"{arm['saved'][cost]:.0%}" for cost in COSTS)
            out.append(
                (*cells, f"{arm['reached']['flops']:.2e}", flops, f"{arm['reached']['seconds']:.1f}", seconds)
            )
        else:
            out.append((*cells, "not reached", "", "-", ""))
    return out


COLUMNS = ("arm", "at start", "at end", "FLOPs", "saved", "seconds", "saved")


def table(report: dict) -> Table:
    """The rows for a terminal; a line between groups."""
    out = Table(
        title="Validation loss, and the cost until it is that of training from scratch",
        title_justify="left",
        box=SIMPLE_HEAD,  # 80 columns hold it
        pad_edge=False,
        show_edge=False,
    )
    for i, name in enumerate(COLUMNS):
        out.add_column(name, justify="right" if i else "left", no_wrap=True)
    arms = arms_of(report)
    ends = [after["baseline"] is None for after in arms[1:]] + [True]
    for row, end in zip(rows(report), ends):
        out.add_row(*row, end_section=end)
    return out


def remarks(report: dict) -> list[str]:
    """What the table does not say: arms that never arrived, whether the comparisons are worth anything, and
    what was left out."""
    return [line for group in report["groups"] for line in _remarks(group)] + report["skipped"]


def _remarks(group: dict) -> list[str]:
    arms, out = {arm["name"]: arm for arm in group["arms"]}, []
    for arm in group["arms"]:
        if arm["baseline"] and not arm["reached"]:
            goal = arms[arm["baseline"]]["curve"][-1]["loss"]
            out.append(
                f"{arm['name']}: not reached: ended at {arm['curve'][-1]['loss']:.3f} against {goal:.3f}."
            )
        if own := arm.get("source"):
            out.append(
                f"{arm['name']}: of a source of its own, which ended at {own['curve'][-1]['loss']:.3f}."
            )
    source = group["source"]["curve"][-1]["loss"]
    above = [
        name for name in arms if arms[name]["baseline"] is None and arms[name]["curve"][-1]["loss"] >= source
    ]
    if above:
        said = f"not a fair test, for {', '.join(above)} did not get below the source's {source:.3f}."
    else:
        said = f"every baseline ended below the source model's {source:.3f}: none was beaten by copying it."
    left_out = [f"{name}: left out: {why}" for name, why in group.get("left_out", {}).items()]
    return [*out, *left_out, f"{group['name']}: {said}"]
