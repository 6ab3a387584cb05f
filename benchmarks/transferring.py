"""Transferring a checkpoint that is larger than memory should be, beside copying as many bytes:

    python tests/large_checkpoint.py SRC --family gpt_neox
    python -m benchmarks.transferring SRC DST [--pattern ... | --mixers mamba2] [--copy all] [--out FILE]

A GPT-NeoX of 6.1 GB, 20 layers of 3072. The parts run in processes of their own and in turns, as
`benchmarks.growing` has them: the transfer, the copy, and randn for the numbers that start fresh. Memory is
the most that was resident, less what was after the imports; pages of SRC that are mapped count in it, and not
in the anonymous part.
"""

import argparse
import json
import os
import shutil
import statistics
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.growing import Part, alone, commit, copying, drawing, measured, met, size, weights
from benchmarks.measure import processor
from growth.transferring.xatl import transfer

MOST_GB = 1.5


def transferring(src: Path, dst: Path, how: dict[str, str]) -> Part:
    return measured(src, dst, partial(transfer, src, dst, **how))


def fresh(dst: Path) -> int:
    """The numbers of DST that no tensor of its source gave."""
    rows = json.loads((dst / "growth.json").read_text())["tensors"]
    return sum(torch.Size(row["shape"]).numel() for row in rows if not row["sources"])


def check(src: Path, dst: Path) -> None:
    """AssertionError unless the tensors that come from one alone of the same shape are the same numbers."""
    rows = json.loads((dst / "growth.json").read_text())["tensors"]
    pairs = [(row["name"], *row["sources"]) for row in rows if len(row["sources"]) == 1]
    old, new = (
        {name: file for file in map(str, weights(folder)) for name in safe_open(file, "pt").keys()}
        for folder in (src, dst)
    )
    same = 0
    for name, source in pairs:
        with safe_open(new[name], "pt") as got, safe_open(old[source], "pt") as given:
            x, y = got.get_slice(name), given.get_slice(source)
            if x.get_shape() == y.get_shape():
                assert torch.equal(x[:64], y[:64]), f"{name} is not {source}"
                same += 1
    assert same > len(pairs) // 2, f"{same} of {len(pairs)} tensors could be compared"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path, help="a new folder; the copy needs as much room beside it")
    parser.add_argument("--mixers", default="retention")
    parser.add_argument("--pattern")
    parser.add_argument("--copy", default="output")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file of the figures")
    options = parser.parse_args()
    src, dst, cores = options.src, options.dst, len(os.sched_getaffinity(0))
    how = {name: getattr(options, name) for name in ("mixers", "pattern", "copy")}

    rounds: dict[str, list[Part]] = {"transferred": [], "copied": [], "drawn": []}
    for left in reversed(range(options.rounds)):
        rounds["transferred"].append(alone(transferring, src, dst, how))
        rounds["copied"].append(alone(copying, src, dst.with_name(f"{dst.name}.copy"), size(dst)))
        rounds["drawn"].append(alone(drawing, fresh(dst), cores))
        if left:
            shutil.rmtree(dst)
    check(src, dst)
    made, copied, drawn = (
        Part(*(statistics.median(x) for x in zip(*parts, strict=True))) for parts in rounds.values()
    )
    ratio = made.seconds / (copied.seconds + drawn.seconds)
    figures = {
        "source_gb": size(src) / 1e9,
        "made_gb": size(dst) / 1e9,
        "machine": f"{processor()}, {cores} cores, torch {torch.__version__}",
        "commit": commit(),
        "how": how,
        "rounds": {name: [part.seconds for part in parts] for name, parts in rounds.items()},
        "ratio": ratio,
        "peak_gb": made.gb,
        "peak_anonymous_gb": made.anonymous_gb,
        "reached": {"peak_gb": made.gb <= MOST_GB},
    }
    print("| GB | transferred | s | copy | fresh numbers | ratio | peak GB | anonymous | goal |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {size(src) / 1e9:.2f} | {size(dst) / 1e9:.2f} | {made.seconds:.1f} | {copied.seconds:.1f}"
        f" | {drawn.seconds:.1f} | {ratio:.2f} | {made.gb:.2f} | {made.anonymous_gb:.2f}"
        f" | {met(made.gb, MOST_GB)} |"
    )
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
