"""What a method can be told: fields of its dataclass, from which the command line's flags follow."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from growth.errors import refuse

KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a word", tuple: "a list"}
KINDS[Mapping] = "a mapping"


def option(default: Any, help: str, kind: type | None = None, usual: str | None = None) -> Any:
    """A field of a method, with the line that `growth grow --help` prints; kind: its type there, if not the
    field's own; usual: what is said of its default there, if not the default itself."""
    return field(default=default, metadata={"help": help, "kind": kind, "usual": usual})


def refuse_other_types(options: Any) -> None:
    """Raises Refusal where a field of a dataclass holds what is not of its type; what text stands for as well
    (`kind`) is refused where it is read."""
    for x in fields(options):
        if not x.metadata.get("kind"):
            refuse_other_type(x.name.replace("_", "-"), x.type, getattr(options, x.name))


def refuse_other_type(name: str, annotation: Any, got: Any) -> None:
    """Raises Refusal where `got` is of another type of KINDS; tuples may be lists, whole numbers floats."""
    union = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kinds = [get_origin(kind) or kind for kind in union]
    if set(kinds) <= {*KINDS, NoneType} and not any(_is_a(kind, got) for kind in kinds):
        expected = " or ".join(KINDS[kind] for kind in kinds if kind is not NoneType)
        raise refuse(name, expected, repr(got), "choose one")


def _is_a(kind: type, got: Any) -> bool:
    if kind in (int, float) and isinstance(got, bool):
        return False
    if kind is tuple:
        return isinstance(got, Sequence) and not isinstance(got, str)
    return isinstance(got, int | float if kind is float else kind)


def refuse_below(name: str, got: float | None, least: float) -> None:
    """Raises Refusal where a number is too small, not finite, or none; not whole where `least` is."""
    whole = isinstance(least, int)
    if got is not None and (isinstance(got, bool) or not isinstance(got, int if whole else int | float)):
        raise refuse(name, "a whole number" if whole else "a number", repr(got), "choose one")
    if got is not None and not least <= got < math.inf:
        finite = ", and finite" if isinstance(least, float) else ""
        raise refuse(name, f"at least {least}{finite}", got, "choose a larger number")


def refuse_other(name: str, got: str | None, known: tuple[str, ...]) -> None:
    """Raises Refusal where a word is none of those that are known."""
    if got not in (None, *known):
        raise refuse(name, f"one of {', '.join(known)}", got, "choose one of these")
