"""A recipe: verbs and their options, one after another.

    source: DIR
    steps:
      - grow: {method: lemon, hidden-size: 768}
      - train: {data: text, steps: 1000, schedule: constant, teacher: $source}
      - check: {}

Options are those of the command line, with hyphens or underscores; a list is what a flag takes between
commas, or several times. Every step reads what the one before it made, the first the source; `check` compares
the two last. $source and $model, in an option, are the source of the recipe and what the step reads. A run
that was interrupted goes on by itself; `resume: true` begins with the optimizer's state that `grow` carried.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from growth.errors import reason, refuse

Value = str | int | float | bool | list | None
REMEDY = "write it as growth inspect --recipe prints one"


@dataclass(frozen=True)
class Step:
    """options: by their names on the command line, with hyphens."""

    verb: str
    options: Mapping[str, Value]


@dataclass(frozen=True)
class Recipe:
    """source: None where the call names it."""

    source: str | None
    steps: tuple[Step, ...]

    def json(self) -> dict[str, Any]:
        """As the file has it."""
        steps = [{step.verb: dict(step.options)} for step in self.steps]
        return ({} if self.source is None else {"source": self.source}) | {"steps": steps}

    def yaml(self) -> str:
        """What read_recipe takes."""
        return yaml.safe_dump(self.json(), sort_keys=False, default_flow_style=None, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML in which nothing is said twice: the first would be lost without a word."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key) for key, _ in node.value]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise yaml.YAMLError(f"{twice[0]} twice, in line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def read_recipe(given: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """The recipe in a file of YAML, or in what such a file holds; one that is read already.

    Raises Refusal where it is none: what it has to be stands at the top of growth.recipes.recipe.
    """
    if isinstance(given, Recipe):
        return given
    where = "recipe" if isinstance(given, Mapping) else str(given)
    found = given if isinstance(given, Mapping) else _loaded(Path(given))
    if not isinstance(found, Mapping) or not set(found) <= {"source", "steps"}:
        got = (
            f"also {_listed(set(found) - {'source', 'steps'})}"
            if isinstance(found, Mapping)
            else _kind(found)
        )
        raise refuse(where, "steps, and a source or none", got, REMEDY)
    source, steps = found.get("source"), found.get("steps")
    if not isinstance(source, str | None):
        raise refuse(f"{where}: source", "the name of a checkpoint", repr(source), "name a folder")
    if not isinstance(steps, list) or not steps:
        raise refuse(f"{where}: steps", "a list of verbs with their options", _kind(steps), REMEDY)
    return Recipe(source, tuple(_step(f"step {i}", step) for i, step in enumerate(steps, 1)))


def _loaded(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise refuse(str(path), "a recipe in YAML", error.strerror, "name its file") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # a key may be no name at all
        raise refuse(str(path), "YAML", reason(error), REMEDY) from error


def _step(where: str, given: Any) -> Step:
    if isinstance(given, str):
        given = {given: None}
    if not isinstance(given, Mapping) or len(given) != 1 or not all(isinstance(verb, str) for verb in given):
        got = _listed(given) if isinstance(given, Mapping) else _kind(given)
        raise refuse(where, "one verb with its options", got, "begin a line with - for each")
    ((verb, options),) = given.items()
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise refuse(f"{where}, {verb}", "options and their values", _kind(options), REMEDY)
    named: dict[str, Value] = {}
    for name, value in options.items():
        spoken = str(name).replace("_", "-")
        if spoken in named:
            raise refuse(f"{where}, {verb}: {spoken}", "one value", "two", "leave one out")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise refuse(
                f"{where}, {verb}: {spoken}", "words and numbers", repr(value), "quote it"
            ) from error
        named[spoken] = value
    return Step(verb, named)


def _kind(found: Any) -> str:
    return "nothing" if found in (None, [], "") else type(found).__name__


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
