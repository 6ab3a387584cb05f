"""Tables with a row for each seed and arm, printed as they are measured."""

import argparse
from collections.abc import Callable, Collection

import torch

from growth.demo.budgets import FULL, QUICK, Job


def line(cells: tuple[str, ...]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


def tabulate(
    doc: str,
    head: tuple[str, ...],
    arms: Collection[str],
    measure: Callable[[Job, int, list[str], bool], None],
    quick: bool = False,
) -> None:
    """Read --seeds, --arms and --tuning, print the head, and let `measure` print the rows of each seed.

    quick: offer the demo's quick job too.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", choices=arms, nargs="+", default=list(arms))
    parser.add_argument("--tuning", action="store_true")
    if quick:
        parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(FULL.threads)
    print(line(head))
    print("|---|" + "---|" * (len(head) - 1))
    for seed in options.seeds:
        job = QUICK if quick and options.quick else FULL
        measure(job, seed, options.arms, options.tuning)
