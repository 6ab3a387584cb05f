"""At what share of the rate a grown weight learns as its original does, under Adam.

A copy's gradient is gamma times the original's, and Adam, m / sqrt(v), does not see gamma: every entry moves
by as much as its original would. What is stored of it is another number,

    W'[i, j] = c W[s(i), s(j)]     c = write's scale . read's share . what the model no longer multiplies by

and has to move by c times as much: readers of k copies have c = 1 / k, and at the full rate the function
moves k times as fast along them. With c as its share of the rate, and the decay of a step kept (AdamW's
decay is a share of the weight itself), a step of the grown model is the small model's step, grown: for
Net2Net and LEMON without noise, where the width grows by a whole factor and clipping does not set in, as long
as Adam's eps does not show. Without, each reader's effective change is k times the small model's.
This is muP's rule for the rates of hidden matrices (Yang and Hu 2021), applied to what changed alone.
"""

import re
from collections import defaultdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from growth.architecture import Weight
from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.families.table import Model
from growth.maps import Copies, Maps
from growth.record import RECORD


def shares(old: Model, new: Model, maps: Maps) -> dict[str, float]:
    """Of every tensor of the target whose share is not 1, by patterns of names: c above, the mean of its
    entries that are copies. Units that are mixes of others, not copies, count as copies of share 1."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, (entry, layer) in new.table().items():
        each = [_share(old, weight, maps, layer) for weight in entry.weights if weight.name not in maps.drawn]
        if not each:
            continue
        pattern = name if layer is None else re.sub(rf"(?<=\.){layer}(?=\.)", "*", name, count=1)
        found[pattern][name] = round(sum(each) / len(each), 12)
    out: dict[str, float] = {}
    for pattern, of in found.items():
        alike = len(set(of.values())) == 1
        out |= {pattern: next(iter(of.values()))} if alike else of
    return {name: share for name, share in out.items() if share != 1.0}


def _share(old: Model, weight: Weight, maps: Maps, layer: int | None) -> float:
    share = old.architecture.scale(maps.source(weight.name)) / weight.scale
    for axis, wire in enumerate(weight.wires):
        of = maps.of(wire, layer)
        if isinstance(of, Copies):
            share *= _mean(of, weight.reads and axis == len(weight.wires) - 1)
    return share


def _mean(of: Copies, is_read: bool) -> float:
    scales = of.scale if isinstance(of.scale, tuple) else (of.scale,) * len(of.index)
    each = [x for x, s in zip(of.share if is_read else scales, of.index, strict=True) if s >= 0]
    return sum(each) / len(each)


def recorded_shares(folder: str | Path) -> dict[str, float]:
    """The same of the tensors of a checkpoint, as its growth.json has them, each by its name.

    Raises Refusal where that tells none.
    """
    checkpoint = Checkpoint(folder)
    patterns: Any = checkpoint.record().get("shares")
    if not isinstance(patterns, dict) or not all(isinstance(x, float) and x > 0 for x in patterns.values()):
        expected = f"a checkpoint with shares in its {RECORD}, as growth grow writes it"
        raise refuse(f"scaled-rates {folder}", expected, "none", "train without --scaled-rates")
    names = [row["name"] for row in checkpoint.record()["tensors"]]
    return {
        name: share for pattern, share in patterns.items() for name in names if fnmatchcase(name, pattern)
    }
