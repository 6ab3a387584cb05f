"""The report's curves: validation loss against FLOPs and against seconds, as SVG that stands in a page."""

import io
import itertools

import matplotlib
from matplotlib.figure import Figure

AXES = {"flops": "FLOPs", "seconds": "seconds"}


def charts(arms: list[dict], source: float, unit: str) -> str:
    """The arms of one group; baselines are dashed, the dotted line is the source model's loss, in `unit`."""
    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, cost in ((left, "flops"), (right, "seconds")):
        for arm, colour in zip(arms, _colours(arms)):
            x = [point[cost] + arm["start"][cost] for point in arm["curve"]]
            y = [point["loss"] for point in arm["curve"]]
            axis.plot(x, y, color=colour, linestyle="-" if arm["baseline"] else "--", label=arm["name"])
        axis.axhline(source, color="black", linestyle=":", label="the source model")
        axis.set(xlabel=AXES[cost], xlim=(0, None))
        axis.grid(color="#dddddd")
    # The first losses, of 5 nats and more, would press all that matters into the last tenth of the picture.
    ends = [arm["curve"][-1]["loss"] for arm in arms]
    low = min(source, *(point["loss"] for arm in arms for point in arm["curve"]))
    left.set(ylabel=f"validation loss, {unit}", ylim=(low - 0.02, low + 4 * (max(ends) - low + 0.1)))
    left.legend(frameon=False, ncols=2)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue()[text.getvalue().index("<svg") :]


def _colours(arms: list[dict]) -> list[str]:
    """A colour an arm; a baseline of one arm has that arm's, a baseline of many is grey."""
    names = [arm["name"] for arm in arms if arm["baseline"]]
    palette = matplotlib.color_sequences["tab10" if len(names) <= 10 else "tab20"]
    colours = dict(zip(names, itertools.cycle(palette)))
    for arm in arms:
        if arm["baseline"] is None:
            against = [other["name"] for other in arms if other["baseline"] == arm["name"]]
            colours[arm["name"]] = colours[against[0]] if len(against) == 1 else "dimgrey"
    return [colours[arm["name"]] for arm in arms]
