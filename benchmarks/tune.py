"""Which of an op's tiles are fastest on this GPU: candidates are timed in the calls that bench_gpu.py times,
the best written to lcikernels/ops/<op>/tuned/<GPU>.json, which the op's `chosen` reads.

    python -m benchmarks.tune [SECONDS]         as `make gpu` does; no candidate is begun after that time
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from math import inf
from pathlib import Path
from time import time
from types import ModuleType

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import torch
from resources.launches import modules, replaced

from benchmarks import measure
from benchmarks.answers import OPS, drawn, prepared
from benchmarks.cases import BACKWARD, FORWARD, GPU, Case
from lcikernels.ops import tuned


def tiles_of(op: str) -> ModuleType | None:
    """Where an op's candidates are, if it has any."""
    name = f"lcikernels.ops.{op}.tiles"
    try:
        tiles = import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.rpartition(".")[0]):
            raise
        return None
    return tiles if hasattr(tiles, "candidates") else None


def cases(op: str) -> list[Case]:
    """Ours at each shape, once."""
    ours = [x for x in GPU if (x.op, x.ours) == (op, "ours") and x.mode in (FORWARD, BACKWARD)]
    return list({(x.mode, str(x.sizes)): x for x in ours}.values())


@contextmanager
def choosing(tiles: ModuleType, choose: Callable) -> Iterator[None]:
    """The op's launchers ask `choose` instead of `chosen`."""
    launchers = [x for x in modules(tiles.__package__) if x is not tiles]
    with replaced(launchers, lambda name, x: choose if name == "chosen" else x):
        yield


def asked(tiles: ModuleType, arguments: tuple, options: dict) -> tuple[str, list]:
    """What a call of `chosen` is about: its key and its candidates."""
    named = signature(tiles.chosen).bind(*arguments, **options).arguments
    key, candidates = (
        f(**{name: x for name, x in named.items() if name in signature(f).parameters})
        for f in (tiles.key, tiles.candidates)
    )
    return key, candidates


def tune(tiles: ModuleType, call: Callable[[], object], best: dict[str, list], until: float) -> None:
    """Enters in `best` what is fastest for each key that `call` asks for and `best` does not have."""
    found: dict[str, list] = {}

    def note(*arguments, **options):
        key, candidates = asked(tiles, arguments, options)
        found[key] = candidates
        return candidates[0]

    with choosing(tiles, note):
        call()
    for key, candidates in found.items():
        if key in best or len(candidates) == 1:
            continue
        seconds = {}
        for tile in candidates:
            if time() > until:
                return

            def choose(*arguments, tile=tile, key=key, **options):
                this, others = asked(tiles, arguments, options)
                return tile if this == key else type(tile)(*best[this]) if this in best else others[0]

            with choosing(tiles, choose):
                seconds[tile] = measure.gpu_seconds(call)
        best[key] = list(min(seconds, key=seconds.get))


def main(until: float = inf) -> None:
    for op in filter(tiles_of, OPS):
        tiles = tiles_of(op)
        best: dict[str, list] = {}
        for case in cases(op):
            side = OPS[op].on_gpu["ours"]
            tune(tiles, prepared(op, drawn(op, case.sizes, side), side, case.mode), best, until)
        table = tuned.table(op, torch.cuda.get_device_name())
        table.parent.mkdir(exist_ok=True)
        table.write_text(json.dumps(best, indent=1) + "\n")
        print(f"{op}: {len(best)} tiles in {table}")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
