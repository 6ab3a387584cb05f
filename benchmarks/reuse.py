"""What reuse saves, at sizes that count: the families of `growth demo --scale`, on several seeds.

    python -m benchmarks.reuse [--scale laptop|gpu] [--family text masked images] [--for MINUTES]

A family's results are in results/reuse/FAMILY.json, written anew after every run: what is there is not done
again, so that the same call goes on, today or on another day. --for: no run is begun after that.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch
from rich.console import Console

from growth.demo.job import machine
from growth.demo.scales import SCALES
from growth.demo.study import Study, kept_in

RESULTS = Path(__file__).parent / "results" / "reuse"


class TimeIsUp(Exception):
    """No further run is to begin."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="laptop")
    parser.add_argument("--family", nargs="+")
    parser.add_argument("--work", type=Path, default=Path("reuse"), help="where the trained sources are kept")
    parser.add_argument("--for", dest="minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    scale, end = SCALES[options.scale], time.monotonic() + 60 * options.minutes
    torch.set_num_threads(scale.threads)
    RESULTS.mkdir(exist_ok=True)
    commit = subprocess.check_output(["git", "rev-parse", "--short=10", "HEAD"], text=True).strip()
    for name in options.family or scale.families:
        file = RESULTS / f"{name}.json"
        report = json.loads(file.read_text()) if file.exists() else None
        told = report["families"][0] if report else None
        keep = kept_in(file, {"scale": scale.name, "machine": machine(), "commit": commit})

        def kept(told: dict, keep=keep) -> None:
            keep(told)
            if time.monotonic() > end:
                raise TimeIsUp

        try:
            Study(scale, name, options.work, told, kept, Console()).carry_out()
        except TimeIsUp:
            return


if __name__ == "__main__":
    main()
