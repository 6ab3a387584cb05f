"""Plots of a run, as SVG beside RESULTS.md: time over the size that grows in a table, and over threads. Bars
of what reusing a model saved."""

from itertools import groupby
from pathlib import Path

PLOTS = Path(__file__).with_name("plots")
Line = tuple[str, list[tuple[float, float]]]  # its name, and (x, seconds)
Bar = tuple[
    str, str, float | None, tuple[float, float] | None, float | None
]  # name, group, median, ends, goal
GROUPS = {"growth": "#1a5fb4", "transfer": "#b3430c"}
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


def draw(name: str, run: dict, folder: Path = PLOTS) -> list[Path]:
    """Of the run in `name`.json: a plot for each table in which a size grows, and one over threads."""
    rows, files = [one["extra_info"] for one in run["benchmarks"]], []
    growing = [row for row in rows if row.get("axis")]
    for (op, axis, shape), group in groupby(growing, key=lambda row: (row["op"], row["axis"], row["shape"])):
        files.append(plot(folder / f"{name}.{op}-{axis}.svg", f"{op}, {shape}", axis, curves(list(group))))
    if lines := over_threads(rows, run["machine_info"].get("threads", 1)):
        files.append(plot(folder / f"{name}.threads.svg", "every op at its first shape", "threads", lines))
    return files


def curves(rows: list[dict]) -> list[Line]:
    """Ours, the rival where there is one, and the floor, in each mode."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        times = {row["ours"]: row["seconds"], row["rival"]: row["rival_seconds"], "floor": row["floor"]}
        for who in filter(None, times):
            found.setdefault(f"{who}, {row['pass']}", []).append((row["value"], times[who]))
    return list(found.items())


def over_threads(rows: list[dict], threads: int) -> list[Line]:
    """From one thread to all, of the rows that compare them."""
    return [
        (f"{row['op']}, {row['mode']}", [(1, row["rival_seconds"]), (threads, row["seconds"])])
        for row in {(row["op"], row["mode"]): row for row in reversed(rows) if row.get("threads")}.values()
    ]


def plot(file: Path, title: str, axis: str, lines: list[Line]) -> Path:
    """Both axes logarithmic; a floor is dashed. The same bytes for the same numbers."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": file.name, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name, points in lines:
            x, seconds = zip(*sorted(points))
            style = {"linestyle": "--", "linewidth": 1} if name.startswith("floor") else {"marker": "o"}
            axes.plot(x, [1e3 * y for y in seconds], label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms", title=title)
        ticks = sorted({x for _, points in lines for x, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file, metadata={"Date": None, "Creator": None})
    return file


def bars(files: list[Path], panels: list[tuple[str, list[Bar]]]) -> None:
    """A panel a family, on white: bars to the median, lines from the least to the most, the goals dashed.
    Where the median never arrived, that stands there."""
    import matplotlib
    from matplotlib.figure import Figure

    heights = [len(rows) + 1.6 for _, rows in panels]
    with matplotlib.rc_context({"svg.hashsalt": "savings", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 0.24 * sum(heights) + 0.3), layout="constrained", facecolor="white")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
        for axis, (title, rows) in zip(axes, panels):
            for y, row in enumerate(rows):
                _bar(axis, y, *row)
            axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            axis.set_yticks(range(len(rows)), [name for name, *_ in rows])
            axis.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -0.6))
            axis.tick_params(length=0)
            axis.spines[["top", "right", "bottom"]].set_visible(False)
        said = "% of training's FLOPs saved: blue by growth, orange by transfer; dashed: the goal"
        axes[-1].set_xlabel(said)
        for file in files:
            nothing = {"Software": None} if file.suffix == ".png" else {"Date": None, "Creator": None}
            figure.savefig(file, dpi=160, metadata=nothing)


def _bar(axis, y: int, name: str, group: str, median: float | None, ends, goal: float | None) -> None:
    if goal:
        axis.plot(
            [100 * goal] * 2, [y - 0.5, y + 0.5], color="#777777", linestyle="--", linewidth=0.8, zorder=3
        )
    if median is None:
        axis.text(1, y, "not reached", va="center", color="#a8361a", fontsize=8)
        return
    axis.barh(y, 100 * max(0, median), height=0.62, color=GROUPS[group], alpha=0.85)
    axis.plot([100 * x for x in ends], [y, y], color="black", linewidth=1.2, zorder=4)
    axis.text(100 * max(0, *ends) + 1, y, f"{100 * median:.0f} %", va="center", fontsize=8, bbox=PAPER)
