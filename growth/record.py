"""growth.json: how a checkpoint came to be, and from what."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth import __version__
from growth.errors import Refusal, refuse
from growth.jsonfile import read_object, rewrite
from growth.plan import Plan

if TYPE_CHECKING:
    from growth.checkpoint import Checkpoint

RECORD = "growth.json"
TRAINING = "training.json"  # how a checkpoint was trained
BEGUN = "recipe.json"  # in the folder of a recipe's steps: what was begun
# What is read again of a record, and of each tensor's row in it.
TYPES = {"verb": str, "method": str, "lossless": bool, "fingerprint": str, "lineage": list, "tensors": list}
ROW = {"name": str, "sources": list, "freeze": bool}


def new_record(
    verb: str, method: str, source: "Checkpoint", lossless: bool, plan: Plan, **settings: Any
) -> dict:
    """The record of one call: the plan, the source's fingerprint, and the records that the source had.

    lineage: of the source and of what that was made of, the oldest first, without their plans; training too.
    """
    return {
        "growth": __version__,
        "verb": verb,
        "method": method,
        "source": source.name,
        "fingerprint": source.fingerprint(),
        "lossless": lossless,
        **settings,
        "lineage": history(source),
        **plan.json(),
    }


def history(checkpoint: "Checkpoint") -> list[dict]:
    """What a checkpoint was made by, the oldest first: the records of growth.json, and those of training."""
    before = checkpoint.record()
    made = before.pop("lineage", [])
    if before:
        made = [*made, {key: x for key, x in before.items() if key not in ("tensors", "dropped", "recipe")}]
    return made + [{"verb": "train", "method": x["schedule"], **x} for x in trainings(checkpoint.path)]


def trainings(folder: Path) -> list[dict]:
    """The settings of every `growth train` since growth.json was written, the oldest first."""
    try:
        found = read_object(folder / TRAINING, "settings")
    except Refusal:  # none, or somebody else's
        return []
    before = found.get("before", [])
    made = [*(before if isinstance(before, list) else []), found["settings"]]
    return [x for x in made if isinstance(x, dict) and isinstance(x.get("schedule"), str)]


def begun(folder: Path) -> dict:
    """What was begun where this folder is one of a recipe's steps, {} elsewhere: its source and output."""
    path = folder.parent / BEGUN
    return read_object(path, "source", "output") if path.is_file() else {}


def named(data: object) -> str | None:
    """The name under which data can be read again, None where they are objects of Python."""
    return str(data) if isinstance(data, str | Path) else None


def enter_recipe(folder: Path, recipe: dict) -> None:
    """Record the recipe that made the checkpoint in `folder`: in growth.json, or where training alone made it
    in training.json. A process that is killed leaves nothing else in it, for it is published as it is."""
    path = folder / (RECORD if (folder / RECORD).exists() else TRAINING)
    rewrite(path, read_object(path) | {"recipe": recipe}, beside=folder.parent)


def read_record(folder: Path) -> dict:
    """What growth wrote about the checkpoint in `folder`, {} where it came from elsewhere."""
    path = folder / RECORD
    if not os.path.lexists(path):
        return {}
    record = read_object(path, *TYPES)
    fits = (
        record["verb"] in ("grow", "shrink", "transfer")
        and _typed(record, TYPES)
        and ("closed" not in record or _typed_closed(record["closed"]))
        and isinstance(record.get("lost", []), list)
        and all(isinstance(x, str) for x in record.get("lost", []))
        and all(isinstance(x, dict) and {"verb", "method"} <= set(x) for x in record["lineage"])
        and all(isinstance(row, dict) and _typed(row, ROW) for row in record["tensors"])
        and all(isinstance(name, str) for row in record["tensors"] for name in row["sources"])
    )
    if not fits:
        remedy = "copy it there again, or remove it"
        raise refuse(str(path), "what growth wrote", "values of other types", remedy)
    return record


def refuse_closed(source: "Checkpoint") -> None:
    """Raises Refusal where masks of method msg are to open first, without which it is not its own source."""
    if source.record().get("closed"):
        got, remedy = "one whose masks never opened", "train it first: growth train opens them"
        raise refuse(str(source.path), "a source that was trained since method msg made it", got, remedy)


def _typed_closed(found: Any) -> bool:
    """As growth.fresh.closed has it?"""
    if not isinstance(found, dict) or not _typed(found, {"wires": dict, "layers": dict}):
        return False
    runs = [run for wire in found["wires"].values() for run in (wire if isinstance(wire, list) else [None])]
    numbers = [x for run in runs for x in (run if isinstance(run, list) and len(run) == 3 else [None])]
    layers = [x for stack in found["layers"].values() for x in (stack if isinstance(stack, list) else [None])]
    return all(type(x) in (int, float) for x in numbers) and all(type(x) is int for x in layers)


def _typed(found: dict, types: dict[str, type]) -> bool:
    return all(isinstance(found.get(key), kind) for key, kind in types.items())
