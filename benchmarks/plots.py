"""Plots of a run, as SVG beside RESULTS.md: time over the size that grows in a table, and over threads."""

from itertools import groupby
from pathlib import Path

PLOTS = Path(__file__).with_name("plots")
Line = tuple[str, list[tuple[float, float]]]  # its name, and (x, seconds)


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
