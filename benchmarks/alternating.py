"""What do the training callbacks cost and gain? The demo's text model, grown by lemon, trained on under each:

    python -m benchmarks.alternating [--seeds 0 1 2] [--arms plain gradient] [--quick] [--tuning]

Every arm of a seed starts from one grown model and has the same steps, windows and rates: the demo's budget
of growing. A row tells the validation loss at the start and at the end, in nats a byte, the FLOPs as a share
of the plain arm's, and the loss less the plain arm's. --tuning measures on windows that the demo does not.

plain               nothing
gradient, random    PruneAndRegrow: 30 % of the neurons are out until the rate has fallen half way, regrown by
                    their gradients or at random; none is out at the end
pruned              the same by gradients, until the rate is at its floor; 30 % are out at the end
layers, tokens      LayerDropping(0.1), TokenDropping(0.15)
submodels           SubmodelStage: the bottom one to four layers in turn, for a twentieth of the steps
"""

import tempfile
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from rich.console import Console
from transformers import TrainerCallback

import growth
from benchmarks.seeds import line, tabulate
from growth.demo.budgets import Budget, Job
from growth.demo.text import Texts
from growth.training.callbacks import LayerDropping, PruneAndRegrow, SubmodelStage, TokenDropping
from growth.training.result import TrainReport

HEAD = ("arm", "seed", "at start", "at end", "FLOPs", "less plain's")


def swapping(budget: Budget, part: float, **how) -> list[TrainerCallback]:
    """PruneAndRegrow in ten turns, until a part of the rate's fall."""
    until = round(part * budget.decay * budget.steps)
    return [PruneAndRegrow(max(1, until // 10), until=until, **how)]


ARMS: dict[str, Callable[[Budget], list[TrainerCallback]]] = {
    "plain": lambda budget: [],
    "gradient": lambda budget: swapping(budget, 0.5),
    "random": lambda budget: swapping(budget, 0.5, regrow="random"),
    "pruned": lambda budget: swapping(budget, 1.0, end="pruned"),
    "layers": lambda budget: [LayerDropping(0.1)],
    "tokens": lambda budget: [TokenDropping(0.15)],
    "submodels": lambda budget: [SubmodelStage(1, steps=budget.steps // 20)],
}


def compare(job: Job, seed: int, arms: list[str], tuning: bool) -> None:
    """Train a source, grow it, and print a row for each arm."""
    numbers = job.text
    with tempfile.TemporaryDirectory() as scratch:
        texts = Texts(numbers, Path(scratch), Console(file=StringIO()), seed, tuning)
        texts.source()
        sizes = growth.Sizes(hidden=numbers.target.hidden, layers=numbers.target.layers)
        growth.grow(texts.trained("source"), texts.start("lemon"), sizes, seed=seed)
        plain = None
        for name in ("plain", *(arm for arm in arms if arm != "plain")):
            report = trained(texts, name)
            first, *_, last = report.curve
            plain = plain or last
            ends, share = (f"{first.loss:.3f}", f"{last.loss:.3f}"), last.flops / plain.flops
            cells = (name, str(seed), *ends, f"{share:.1%}", f"{last.loss - plain.loss:+.3f}")
            print(line(cells), flush=True)


def trained(texts: Texts, name: str) -> TrainReport:
    """The grown model, trained on under an arm's callbacks."""
    numbers, budget = texts.numbers, texts.numbers.growing
    return growth.train(
        texts.start("lemon"),
        texts.examples,
        texts.trained(name),
        steps=budget.steps,
        batch_size=numbers.batch_size,
        learning_rate=budget.rate,
        schedule="lemon",
        warmup=budget.warmup,
        decay=budget.decay,
        validation=texts.held_out,
        eval_every=budget.steps,
        save_every=0,
        callbacks=ARMS[name](budget),
        seed=texts.seed,
    )


if __name__ == "__main__":
    tabulate(__doc__, HEAD, ARMS, compare, quick=True)
