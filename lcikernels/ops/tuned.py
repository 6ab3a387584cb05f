"""Tables of the tiles that were fastest on a GPU: `python -m benchmarks.tune` writes them there, by op."""

import json
from functools import cache
from pathlib import Path


def table(op: str, gpu: str) -> Path:
    """For a GPU of this name."""
    return Path(__file__).parent / op / "tuned" / f"{gpu.replace(' ', '_')}.json"


@cache
def measured(op: str, gpu: str) -> dict[str, list[int]]:
    """By what the op's `key` calls a problem, the fastest tile there; empty where nothing was measured."""
    file = table(op, gpu)
    return json.loads(file.read_text()) if file.exists() else {}
