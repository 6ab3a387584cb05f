"""A step as the command line has it: its options are the flags of its verb, and are read as these are."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typer import BadParameter
from typer.main import get_command

from growth.cli.app import app
from growth.errors import refuse
from growth.recipes.recipe import Step, Value

MAKING = ("grow", "shrink", "transfer", "train")  # checkpoints; check makes none
VERBS = (*MAKING, "check")
# What a recipe says itself: where to read and write, and how the call runs.
OWN = ("src", "dst", "model", "folder", "recipe", "dry_run", "as_json")
READ = ("data", "validation", "text", "optimizer")  # options that name a file or folder
STANDING = {"$source": "source", "$model": "model"}
UsageError = BadParameter.__base__


class Commands:
    """The verbs of the command line."""

    def __init__(self):
        self.known = {name: x for name, x in get_command(app).commands.items() if name in VERBS}

    def options(self, verb: str) -> dict[str, Any]:
        """The flags that a step of this verb may have, by their names with hyphens."""
        params = self.known[verb].params
        said = (x for x in params if x.name not in OWN and x.param_type_name == "option")
        return {spoken(x): x for x in said}

    def run(self, step: Step, at: "Places", settings: Mapping[str, bool]) -> Any:
        """Does what the command does. settings: switches that the run adds, of the verbs that have them."""
        parsed = self.parsed(step.verb, step, at)
        known = {name: value or parsed[name] for name, value in settings.items() if name in parsed}
        return self.known[step.verb].callback(**parsed | known)

    def parsed(self, where: str, step: Step, at: "Places") -> dict[str, Any]:
        """The command's arguments, by their names in Python.

        Raises Refusal where the verb or an option is not known, a value is of another type, or a file is not
        there.
        """
        if step.verb not in self.known:
            raise refuse(where, f"one of {', '.join(self.known)}", step.verb, "choose one of these")
        words, known = [], self.options(step.verb)
        for name, value in step.options.items():
            if name not in known:
                expected = f"an option of growth {step.verb}"
                raise refuse(f"{where}: {name}", expected, "none", f"it has {', '.join(known)}")
            words += _words(f"{where}: {name}", known[name], at.named(value))
            if (
                name in READ
                and isinstance(value, str)
                and value not in STANDING
                and not os.path.exists(value)
            ):
                got = f"{value}, where nothing is"
                raise refuse(f"{where}: {name}", "a file or a folder", got, "name another")
        if step.verb == "train":
            words += ["--out", at.out]
        try:
            return self.known[step.verb].make_context(step.verb, [*words, "--", *at.given(step.verb)]).params
        except UsageError as error:
            said = " ".join(error.format_message().split()).rstrip(".")
            remedy = f"see growth {step.verb} --help"
            raise refuse(where, f"what growth {step.verb} takes", said, remedy) from error


@dataclass(frozen=True)
class Places:
    """The folders of a step: the recipe's source, what it reads and writes, what that was made of."""

    source: str
    model: str
    out: str
    before: str

    def given(self, verb: str) -> tuple[str, ...]:
        """The arguments of the command."""
        return {"check": (self.before, self.model), "train": (self.model,)}.get(verb, (self.model, self.out))

    def named(self, value: Value) -> Value:
        """What $source and $model stand for, where they are a value or in a list."""
        if isinstance(value, list):
            return [self.named(part) for part in value]
        return getattr(self, STANDING[value]) if isinstance(value, str) and value in STANDING else value


def _words(where: str, flag: Any, value: Value) -> list[str]:
    """As they would be typed."""
    if value is None:
        return []
    if flag.is_flag:
        if not isinstance(value, bool):
            raise refuse(where, "true or false", repr(value), "it is a switch")
        return [flag.opts[0]] if value else flag.secondary_opts[:1]
    parts = value if isinstance(value, list) else [value]
    if not parts or any(isinstance(part, bool | dict | list | None) for part in parts):
        raise refuse(
            where, "a word or a number, or a list of them", repr(value), "write it as on the command line"
        )
    if flag.multiple:
        return [f"{flag.opts[0]}={part}" for part in parts]
    return [f"{flag.opts[0]}={','.join(map(str, parts))}"]


def spoken(flag: Any) -> str:
    """The name of a flag, as it is typed behind two hyphens."""
    return flag.opts[0].removeprefix("--")
