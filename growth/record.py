"""growth.json: how a checkpoint came to be, and from what."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth import __version__
from growth.errors import refuse
from growth.jsonfile import read_object
from growth.plan import Plan

if TYPE_CHECKING:
    from growth.checkpoint import Checkpoint

RECORD = "growth.json"
# What is read again of a record, and of each tensor's row in it.
TYPES = {"verb": str, "method": str, "lossless": bool, "fingerprint": str, "lineage": list, "tensors": list}
ROW = {"name": str, "sources": list, "freeze": bool}


def new_record(
    verb: str, method: str, source: "Checkpoint", lossless: bool, plan: Plan, **settings: Any
) -> dict:
    """The record of one call: the plan, the source's fingerprint, and the records that the source had.

    lineage: of the source and of what that was made of, the oldest first, without their plans.
    """
    before = source.record()
    lineage = before.pop("lineage", [])
    if before:
        lineage = [*lineage, {key: x for key, x in before.items() if key not in ("tensors", "dropped")}]
    return {
        "growth": __version__,
        "verb": verb,
        "method": method,
        "source": source.name,
        "fingerprint": source.fingerprint(),
        "lossless": lossless,
        **settings,
        "lineage": lineage,
        **plan.json(),
    }


def read_record(folder: Path) -> dict:
    """What growth wrote about the checkpoint in `folder`, {} where it came from elsewhere."""
    path = folder / RECORD
    if not os.path.lexists(path):
        return {}
    record = read_object(path, *TYPES)
    fits = (
        record["verb"] in ("grow", "shrink", "transfer")
        and _typed(record, TYPES)
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


def _typed(found: dict, types: dict[str, type]) -> bool:
    return all(isinstance(found.get(key), kind) for key, kind in types.items())
