"""The README's tables of figures, between `<!-- savings -->` and `<!-- /savings -->` and the like."""

import json
import re
from pathlib import Path

from benchmarks import savings
from benchmarks.markdown import grid, number

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", Path(__file__).parent / "results"
RUNS = ("bench_cpu.py", "bench_gpu.py")  # the other results compare models with each other
NONE = "No results are here yet: `make bench` makes them, then `python -m benchmarks.report` this."
SAID = (
    "The fastest rival of each op at its first size, measured in turns. [All of them](benchmarks/RESULTS.md)."
)


def write(readme: Path = README) -> None:
    readme.write_text(filled(readme.read_text()))


def filled(readme: str, results: Path = RESULTS) -> str:
    """The README's text with its blocks as the results have them."""
    blocks = {"speeds": speeds(results), "savings": savings.headline(savings.read(results / "reuse"))}
    for name, inside in blocks.items():
        readme = _fill(readme, name, inside)
    return readme


def speeds(results: Path = RESULTS) -> str:
    """An op a row: forward and backward where that was measured, of several runs the last one's."""
    runs = [json.loads(path.read_text()) for path in results.glob("*.json")]
    ops = {}
    for run in sorted(runs, key=lambda run: run["datetime"]):
        where = _machine(run["machine_info"])
        ops |= {op: _row(op, rows, where) for op, rows in _measured(run).items()}
    if not ops:
        return NONE
    columns = ["op", "size", "pass", "ours, ms", "best rival", "its ms", "ratio", "on"]
    return "\n".join([*grid(columns, ops.values()), "", SAID])


def _measured(run: dict) -> dict[str, list[dict]]:
    """The rows of each op at its first size, beside rivals."""
    found: dict[str, list[dict]] = {}
    for one in run["benchmarks"]:
        row = one["extra_info"]
        if one["fullname"].split("::")[0].endswith(RUNS) and row["rival"] and not _ours(row["rival"]):
            found.setdefault(row["op"], []).append(row)
    return {op: [row for row in rows if row["shape"] == rows[0]["shape"]] for op, rows in found.items()}


def _row(op: str, rows: list[dict], where: str) -> list[str]:
    """The longest pass that was measured, beside the rival that is the fastest at it."""
    backward = [row for row in rows if row["mode"].startswith("forward + backward")]
    mode = (backward or rows)[0]["mode"]
    rivals = [row for row in rows if row["mode"] == mode]
    row = min(rivals, key=lambda row: row["rival_seconds"])
    ratio = "**red**" if row.get("red") else f"{number(row['rival_seconds'] / row['seconds'])}x"
    times = [number(1e3 * row[of]) for of in ("seconds", "rival_seconds")]
    return [op, row["shape"], mode, times[0], row["rival"], times[1], ratio, where]


def _ours(name: str) -> bool:
    """A variant of ours, which is no rival."""
    return name.split()[0].rstrip(",") == "ours"


def _machine(told: dict) -> str:
    return told["gpu"]["name"] if "gpu" in told else f"{told['cpu']['brand_raw']}, {told['threads']} threads"


def _fill(readme: str, name: str, inside: str) -> str:
    """Raises ValueError where the markers are not there once."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(
            f"README.md: expected {begin} and {end} once each; put them where the table is to stand"
        )
    return re.sub(
        f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{inside}\n{end}", readme, flags=re.S
    )
