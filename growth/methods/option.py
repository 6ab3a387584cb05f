"""What a method can be told: fields of its dataclass, from which the command line's flags follow."""

import math
from dataclasses import field
from typing import Any

from growth.errors import refuse


def option(default: Any, help: str, kind: type | None = None, usual: str | None = None) -> Any:
    """A field of a method, with the line that `growth grow --help` prints; kind: its type there, if not the
    field's own; usual: what is said of its default there, if not the default itself."""
    return field(default=default, metadata={"help": help, "kind": kind, "usual": usual})


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
