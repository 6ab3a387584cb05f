"""What does each of the demo's arms save on other seeds, and what do training's callbacks?

    python -m growth.demo.seeds [--seeds 0 1 2] [--arms lemon ligo lemon-early retnet dropping] [--tuning]

A seed draws the source, every fresh weight and the order of the text. Saved are FLOPs until the arm has the
loss that its baseline ends with: net of all that growing, transferring and learning took, gross without.
--tuning measures on windows that the demo does not, to choose settings by. Arms are the demo's, and LEMON's
trained on under a callback:

gradient, random    PruneAndRegrow: 30 % of the neurons are out until the rate has fallen half way, regrown by
                    their gradients or at random; none is out at the end
pruned              the same by gradients, until the rate is at its floor; 30 % are out at the end
dropping, tokens    LayerDropping(0.1), TokenDropping(0.15)
submodels           SubmodelStage: the bottom one to four layers in turn, for a twentieth of the steps
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainerCallback

from growth.demo.budgets import FULL, QUICK, TRANSFERS, Budget, Job
from growth.demo.saving import compare
from growth.demo.text import Texts
from growth.methods import METHODS
from growth.training.callbacks import LayerDropping, PruneAndRegrow, SubmodelStage, TokenDropping

HEAD = (
    "arm",
    "seed",
    "source",
    "baseline",
    "arm at start",
    "at end",
    "making it",
    "FLOPs",
    "saved, gross",
    "net",
)


def swapping(budget: Budget, part: float, **how) -> list[TrainerCallback]:
    """PruneAndRegrow in ten turns, until a part of the rate's fall."""
    until = round(part * budget.decay * budget.steps)
    return [PruneAndRegrow(max(1, until // 10), until=until, **how)]


CALLBACKS: dict[str, Callable[[Budget], list[TrainerCallback]]] = {
    "gradient": lambda budget: swapping(budget, 0.5),
    "random": lambda budget: swapping(budget, 0.5, regrow="random"),
    "pruned": lambda budget: swapping(budget, 1.0, end="pruned"),
    "dropping": lambda budget: [LayerDropping(0.1)],
    "tokens": lambda budget: [TokenDropping(0.15)],
    "submodels": lambda budget: [SubmodelStage(1, steps=budget.steps // 20)],
}
ARMS = (*METHODS, *FULL.text.carrying, *TRANSFERS, *CALLBACKS)


def measured(job: Job, seed: int, wanted: list[str], tuning: bool) -> Iterator[tuple[str, ...]]:
    """Train a source, and a baseline where arms share it; a row for each arm that can be made."""
    with tempfile.TemporaryDirectory() as scratch:
        texts = Texts(job.text, Path(scratch), Console(file=StringIO()), seed, tuning)
        source, left_out, budget = texts.source(), texts.left_out("source"), job.text.growing
        if set(wanted) - set(TRANSFERS):
            baseline = texts.scratch("scratch", texts.neox(job.text.target), budget)
        for name in (name for name in wanted if name not in left_out):
            if name in TRANSFERS:
                yield row(source, *texts.transferred(name), seed)
                continue
            if name in job.text.carrying:
                arm = texts.carried(name, baseline)
            elif name in CALLBACKS:
                made = texts.grow("source", "lemon", texts.start(name))
                arm = texts.arm(name, made, baseline, budget, callbacks=CALLBACKS[name](budget))
            else:
                arm = texts.grown("source", [name], baseline)[0]
            yield row(arm.get("source", source), baseline, arm, seed)


def row(source: dict, baseline: dict, arm: dict, seed: int) -> tuple[str, ...]:
    """Losses at the ends, and FLOPs as shares of the baseline's."""
    first, *_, last = arm["curve"]
    ends = (made["curve"][-1] for made in (source, baseline))
    losses = (f"{point['loss']:.3f}" for point in (*ends, first, last))
    whole = baseline["curve"][-1]["flops"]
    shares = (f"{arm['start']['flops'] / whole:.1%}", f"{last['flops'] / whole:.1%}")
    gross = compare(arm | {"start": {"flops": 0, "seconds": 0.0}}, baseline)
    saved = (f"{of['saved']['flops']:.1%}" if of["saved"] else "not reached" for of in (gross, arm))
    return arm["name"], str(seed), *losses, *shares, *saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=["lemon", *TRANSFERS])
    parser.add_argument("--tuning", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the demo's quick job: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(FULL.threads)
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for seed in options.seeds:
        job = QUICK if options.quick else FULL
        for cells in measured(job, seed, options.arms, options.tuning):
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
