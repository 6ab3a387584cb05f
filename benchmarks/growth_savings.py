"""What does growing save? The demo's source, grown by every method, and one baseline, on several seeds:

    python -m benchmarks.growth_savings [--seeds 0 1 2] [--arms lemon ligo lemon-early] [--tuning]

A seed draws the source, every fresh weight and the order of the text. Saved are FLOPs until the arm has the
loss that its baseline ends with, all that growing and learning took counted: net with it, gross without.
--tuning measures on windows that the demo does not, to choose settings by.
"""

import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console

from benchmarks.seeds import line, tabulate
from growth.demo.budgets import FULL, Job
from growth.demo.saving import compare
from growth.demo.text import Texts
from growth.methods import METHODS

HEAD = ("arm", "seed", "source", "baseline", "arm at start", "at end", "making it", "saved, gross", "net")


def row(source: dict, baseline: dict, arm: dict, seed: int) -> tuple[str, ...]:
    """Losses at the ends, and FLOPs as shares of the baseline's."""
    first, *_, last = arm["curve"]
    ends = (made["curve"][-1] for made in (source, baseline))
    losses = (f"{point['loss']:.3f}" for point in (*ends, first, last))
    cost = arm["start"]["flops"] / baseline["curve"][-1]["flops"]
    gross = compare(arm | {"start": {"flops": 0, "seconds": 0.0}}, baseline)
    saved = (f"{of['saved']['flops']:.1%}" if of["saved"] else "not reached" for of in (gross, arm))
    return arm["name"], str(seed), *losses, f"{cost:.1%}", *saved


ARMS = (*METHODS, *FULL.text.carrying)


def measure(job: Job, seed: int, arms: list[str], tuning: bool) -> None:
    """Train a source and a baseline, once, and print a row for each arm that can be made."""
    with tempfile.TemporaryDirectory() as scratch:
        texts = Texts(job.text, Path(scratch), Console(file=StringIO()), seed, tuning)
        source = texts.source()
        baseline = texts.scratch("scratch", texts.neox(job.text.target), job.text.growing)
        left_out = texts.left_out("source")
        for name in (name for name in arms if name not in left_out):
            carries = name in job.text.carrying
            arm = texts.carried(name, baseline) if carries else texts.grown("source", [name], baseline)[0]
            print(line(row(arm.get("source", source), baseline, arm, seed)), flush=True)


if __name__ == "__main__":
    tabulate(__doc__, HEAD, ARMS, measure)
