"""What does a transfer save? The demo's transfers and their baselines, on several seeds:

    python -m benchmarks.transfer_savings [--seeds 0 1 2] [--arms mamba mamba2] [--tuning]

A seed draws the source, every fresh weight and the order of the text. Saved are FLOPs until the arm has the
loss that its baseline ends with, all that transferring took counted. --tuning measures on windows that the
demo does not, to choose settings by.
"""

import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console

from benchmarks.seeds import line, tabulate
from growth.demo.budgets import TRANSFERS, Job
from growth.demo.text import Texts

HEAD = ("arm", "seed", "source", "baseline", "arm at start", "at end", "making it", "saved")


def row(source: dict, baseline: dict, arm: dict, seed: int) -> tuple[str, ...]:
    """Losses at the ends, and FLOPs as shares of the baseline's."""
    first, *_, last = arm["curve"]
    ends = (made["curve"][-1] for made in (source, baseline))
    cost = arm["start"]["flops"] / baseline["curve"][-1]["flops"]
    saved = f"{arm['saved']['flops']:.1%}" if arm["saved"] else "not reached"
    losses = (f"{point['loss']:.3f}" for point in (*ends, first, last))
    return arm["name"], str(seed), *losses, f"{cost:.1%}", saved


def compare(job: Job, seed: int, arms: list[str], tuning: bool) -> None:
    """Train a source and print a row for each arm."""
    with tempfile.TemporaryDirectory() as scratch:
        texts = Texts(job.text, Path(scratch), Console(file=StringIO()), seed, tuning)
        source = texts.source()
        for name in arms:
            print(line(row(source, *texts.transferred(name), seed)), flush=True)


if __name__ == "__main__":
    tabulate(__doc__, HEAD, TRANSFERS, compare)
