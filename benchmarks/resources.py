"""What the Triton kernels take on each GPU, without one, and the times that this predicts: tests/resources.

    python -m benchmarks.resources           every configuration that the launchers choose, 5 minutes
    ... "N=16 bfloat16" all                  those in whose name these regular expressions are found
    ... --predicted [names]                  predicted times of calls, for an H200, in a minute
    ... --predicted --json                   ... into predicted.json, for a section of RESULTS.md
    ... --predicted --json --rivals          ... with rivals' kernels compiled anew, 15 minutes
    ... --rows                               either as lines of JSON

Kernels are compiled for AMD's GPU too. Predicted is not measured.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from resources import table

from benchmarks.report import PREDICTED, predicted_table


def proofs(names: list[str], whole: bool) -> Iterator[dict]:
    tasks = [(sm, launch, whole) for sm in (*table.NVIDIA, 0) for launch in table.launches(sm, names)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(table.proof, *zip(*tasks))


def predictions(names: list[str], anew: bool) -> list[dict]:
    """Ours; rivals' anew where that is asked for, else as they are written."""
    rows = list(table.predictions(names))
    if anew:
        from resources import rivals

        return rows + [*rivals.mamba_predictions(), *rivals.fla_predictions()]
    written = json.loads(PREDICTED.read_text()) if PREDICTED.exists() and not names else []
    return rows + [row for row in written if row["by"] != "ours"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*")
    for option in ("predicted", "json", "rivals", "rows"):
        parser.add_argument(f"--{option}", action="store_true")
    asked = parser.parse_args()
    rows = predictions(asked.names, asked.rivals) if asked.predicted else proofs(asked.names, not asked.rows)
    if asked.rows:
        for row in rows:
            print(json.dumps(row), flush=True)
    elif asked.predicted:
        print("\n".join(predicted_table(rows)))
        if asked.json:
            PREDICTED.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    else:
        print(table.HEAD)
        for row in rows:
            if row["sm"]:
                print(table.line(row), flush=True)


if __name__ == "__main__":
    main()
