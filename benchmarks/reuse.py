"""What reuse saves, at sizes that count: the families of `growth demo --scale`, on several seeds.

    python -m benchmarks.reuse [--scale laptop|gpu] [--family text masked images] [--for MINUTES]

A family's results are in results/reuse/FAMILY.json, written anew after every run: what is there is not done
again, so that the same call goes on, today or on another day. --for: no run is begun after that.
"""

import argparse
import subprocess
import time
from pathlib import Path

import torch
from rich.console import Console

from growth.demo.job import carried_out
from growth.demo.scales import LARGER

RESULTS = Path(__file__).parent / "results" / "reuse"


class TimeIsUp(Exception):
    """No further run is to begin."""


class Until(Console):
    """Is told of every run that has ended; raises TimeIsUp after `end`, in seconds of time.monotonic()."""

    def __init__(self, end: float):
        super().__init__()
        self.end = end

    def print(self, *said, **how) -> None:
        super().print(*said, **how)
        if time.monotonic() > self.end:
            raise TimeIsUp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", choices=LARGER, default="laptop")
    parser.add_argument("--family", nargs="+")
    parser.add_argument("--work", type=Path, default=Path("reuse"), help="where the trained sources are kept")
    parser.add_argument("--for", dest="minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    if odd := {*(options.family or ())} - LARGER[options.scale].families.keys():
        known = ", ".join(LARGER[options.scale].families)
        parser.error(f"--family: expected any of {known}, got {', '.join(sorted(odd))}")
    scale, console = LARGER[options.scale], Until(time.monotonic() + 60 * options.minutes)
    torch.set_num_threads(scale.threads)
    RESULTS.mkdir(exist_ok=True)
    commit = subprocess.check_output(["git", "rev-parse", "--short=10", "HEAD"], text=True).strip()
    try:
        for name in options.family or scale.families:
            carried_out(scale, name, options.work, RESULTS / f"{name}.json", console, commit)
    except TimeIsUp:
        console.end = float("inf")
        console.print("time is up: the same call goes on")


if __name__ == "__main__":
    main()
