"""The seconds that a dry run tells, beside those that the job took, by the clock and of a processor:

    python tests/large_checkpoint.py SRC --gigabytes 0.1 --hidden-size 384 --vocab-size 32000
    python -m benchmarks.seconds SRC

grows, shrinks and transfers SRC on one thread. Where others use the machine too, the clock says how busy it
is; the seconds of a processor hardly do.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import torch
from transformers import AutoConfig

import growth
from benchmarks.markdown import grid
from growth.report import Report

COLUMNS = (
    "job",
    "read",
    "written",
    "told",
    "of it planning",
    "by the clock",
    "of a processor",
    "told / processor",
)


def row(name: str, verb: Callable[..., Report], src: str, **options) -> list[str]:
    verb(src, dry_run=True, **options)  # imports
    costs = verb(src, dry_run=True, **options).costs
    told = costs.seconds
    with tempfile.TemporaryDirectory(dir=Path(src).absolute().parent) as folder:
        clock, processor = perf_counter(), process_time()
        verb(src, Path(folder, "made"), **options)
        clock, processor = perf_counter() - clock, process_time() - processor
    sizes = [f"{size / 1e9:.2f} GB" for size in (costs.job.reads, costs.job.writes)]
    seconds = [f"{x:.2f} s" for x in (told, costs.planning, clock, processor)]
    return [name, *sizes, *seconds, f"{told / processor:.2f}"]


def main(src: str) -> None:
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(src)
    rows = [
        row("twice as wide", growth.grow, src, hidden_size=2 * config.hidden_size),
        row("a half deeper", growth.grow, src, num_layers=config.num_hidden_layers * 3 // 2),
        row("half the neurons", growth.shrink, src, ffn_size=config.intermediate_size // 2),
        row("to retention", growth.transfer, src),
        row("to Mamba-2", growth.transfer, src, mixers="mamba2"),
    ]
    print(*grid(COLUMNS, rows), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
