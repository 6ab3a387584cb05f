"""Tables of the tiles that were fastest on a GPU: `python -m benchmarks.tune` writes them there, by op."""

import json
from functools import cache
from pathlib import Path
from typing import TypeVar

Tile = TypeVar("Tile", bound=tuple)


def table(op: str, gpu: str) -> Path:
    """For a GPU of this name."""
    return Path(__file__).parent / op / "tuned" / f"{gpu.replace(' ', '_')}.json"


@cache
def measured(op: str, gpu: str) -> dict[str, list[int]]:
    """By what the op's `key` calls a problem, the fastest tile there; empty where no table can be read."""
    try:
        tiles = json.loads(table(op, gpu).read_text())
    except (OSError, ValueError):  # none, or half written: the predicted best needs no table
        return {}
    return tiles if isinstance(tiles, dict) else {}


def fastest(op: str, gpu: str, key: str, candidates: list[Tile]) -> Tile:
    """The measured one if it still is a candidate, else the first, which is the predicted best."""
    best = measured(op, gpu).get(key)
    return next((tile for tile in candidates if list(tile) == best), candidates[0])
