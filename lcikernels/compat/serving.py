"""Which arguments of another library's functions are served: said once, kept at every call, printed."""

import inspect
from collections.abc import Callable
from functools import wraps

import torch

from lcikernels.ops import checks

# package -> function -> argument -> "served", "served: which values", "any value: why", "refused: why"
TABLE: dict[str, dict[str, dict[str, str]]] = {}

LEGEND = (
    "* served: every value that is published for it, or those that are said",
    "* any value: taken, and without effect on the result",
    "* refused: any other value than the default is a ValueError that names function, argument and reason",
)
NUMBERS = (bool, int, float, str)  # what a default may equal without being the same object


def serves(
    *,
    refused: dict[str, str] | None = None,
    free: dict[str, str] | None = None,
    partly: dict[str, str] | None = None,
) -> Callable[[Callable], Callable]:
    """Say which arguments of a function are not simply served, each with the reason.

    refused: any other value than the default is a ValueError that names function, argument and reason.
    free: every value is taken, because the result does not depend on it.
    partly: some values are served, which the reason lists; the function itself refuses the others.

    The function keeps its signature. Raises TypeError where an argument is not one of the function's, is
    named twice, or is refused without having a default.
    """
    words = {"refused": refused or {}, "any value": free or {}, "served": partly or {}}

    def decorate(function: Callable) -> Callable:
        name, parameters = function.__name__, inspect.signature(function).parameters
        rows = dict.fromkeys(parameters, "served")
        for word, reasons in words.items():
            for argument, why in reasons.items():
                if rows.get(argument) != "served":
                    raise TypeError(f"{name}: {argument} is no argument of it, or is named twice")
                rows[argument] = f"{word}: {why}"
        guarded = []
        for argument in words["refused"]:
            parameter = parameters[argument]
            if parameter.default is parameter.empty:
                raise TypeError(f"{name}: {argument} has no default to insist on")
            by_position = parameter.kind is not parameter.KEYWORD_ONLY
            place = list(parameters).index(argument) if by_position else len(parameters)
            guarded.append((place, argument, parameter.default))
        package = function.__module__.removeprefix("lcikernels.compat.").split(".")[0]
        TABLE.setdefault(package, {})[name] = rows
        if not guarded:
            return function

        @wraps(function)
        def serve(*args, **kwargs):
            for place, argument, default in guarded:
                value = args[place] if place < len(args) else kwargs.get(argument, default)
                if value is not default and not (isinstance(value, NUMBERS) and value == default):
                    why = words["refused"][argument]
                    checks.refuse(name, argument, f"{default!r} ({why})", shown(value))
            return function(*args, **kwargs)

        return serve

    return decorate


def shown(value: object) -> str:
    """A value as a refusal shows it: not the numbers of a tensor."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def table() -> str:
    """What every decorated function serves, as Markdown: a table each, a line an argument."""
    lines = ["# What is served", "", "Written by `python -m lcikernels.compat`.", "", *LEGEND]
    for package, functions in sorted(TABLE.items()):
        lines += ["", f"## {package}", "", f"`from lcikernels.compat.{package} import ..`"]
        for name, rows in sorted(functions.items()):
            lines += ["", f"### {name}", "", "| argument | |", "|---|---|"]
            lines += [f"| `{argument}` | {said} |" for argument, said in rows.items()]
    return "\n".join(lines) + "\n"
