"""The recipe that made a checkpoint: the one that was recorded, or the calls that growth.json tells of."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.jsonfile import read_object
from growth.methods.upcycle import Upcycle
from growth.recipes.commands import Commands
from growth.recipes.recipe import Recipe, Step, read_recipe
from growth.record import TRAINING, history
from growth.training.dropping import DROPPING, asked_of, dropping

ELSEWHERE = {"data": "data_name", "validation": "validation_name", "teacher": "teacher_name"}
ALWAYS = ("method", "seed")  # said also where they are the default, which another version may have changed


def recipe_of(folder: str | Path) -> Recipe:
    """The recipe that made the checkpoint in `folder`, to be run again or kept (`.yaml()`).

    It is the one that run_recipe recorded; else it is put together from what growth.json and training.json
    tell of every call since the first source, with the sizes, options and seeds of each. Raises Refusal where
    they tell of none, or where a call took what only Python can give, such as Windows or rates.
    """
    checkpoint = Checkpoint(folder)
    if recorded := _recorded(checkpoint):
        return read_recipe(recorded)
    calls, commands = history(checkpoint), Commands()
    if not calls:
        remedy = "name what growth grow, transfer or train wrote"
        raise refuse(str(folder), "a checkpoint that growth made", "no record of how", remedy)
    first = calls[0]
    source = first.get("model" if first["verb"] == "train" else "source")
    return Recipe(source, tuple(_step(i, call, commands) for i, call in enumerate(calls, 1)))


def _recorded(checkpoint: Checkpoint) -> dict[str, Any] | None:
    if record := checkpoint.record():
        return record.get("recipe")
    path = checkpoint.path / TRAINING
    return read_object(path).get("recipe") if path.exists() else None


def _sizes(call: dict[str, Any]) -> dict[str, Any]:
    """What was asked of sizes: all, where others would follow from those that changed, else these. Experts
    are a size of shrink alone; those of upcycle, all that it changes, are its options."""
    if call["method"] == Upcycle.name:
        return {}
    before, after = call.get("from", {}), call.get("to", {})
    if call["verb"] == "grow":
        after = {name: x for name, x in after.items() if name != "experts"}
    changed = {name: x for name, x in after.items() if x != before.get(name)}
    return after if {"hidden_size", "num_heads"} & set(changed) else changed


def _dropped(where: str, callbacks: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The flags whose callbacks these are, with their shares. Raises Refusal where some are another's."""
    found = {}
    for callback in callbacks:
        for flag, kind in DROPPING.items():
            if callback["name"] == kind.__name__:
                found[flag] = next(iter(callback["args"].values()))
    if [asked_of(callback) for callback in dropping(found)] != [*callbacks]:
        names = " and ".join(callback["name"] for callback in callbacks)
        remedy = "make this step in Python"
        raise refuse(where, "what the command line has too", f"callbacks {names}", remedy)
    return found


def _step(number: int, call: dict[str, Any], commands: Commands) -> Step:
    """A call as a step: of each flag of its verb, what the record has, where that is not the default."""
    where, verb = f"step {number}, {call['verb']}", call["verb"]
    if verb not in commands.known:
        raise refuse(where, f"one of {', '.join(commands.known)}", verb, "make this step by hand")
    if rates := call.get("rates"):
        raise refuse(where, "what the command line has too", f"rates {rates}", "make this step in Python")
    said = call | call.get("asked", {}) | _sizes(call) | {"resume": bool(call.get("moments"))}
    said |= _dropped(where, call.get("callbacks", ()))
    options = {}
    for name, flag in commands.options(verb).items():
        key = ELSEWHERE.get(flag.name, flag.name)
        value = said.get(key)
        if key != flag.name and value is None and said.get(flag.name) is not None:
            remedy = "make this step in Python"
            raise refuse(f"{where}: {name}", "the name of a file or folder", "objects of Python", remedy)
        if value in (None, [], "") or value == flag.default and flag.name not in ALWAYS:
            continue
        options[name] = "$model" if name == "optimizer" and value == call.get("source") else value
    return Step(verb, options)
