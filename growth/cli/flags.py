"""The flags of `growth grow` that follow from what the methods can be told."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_origin

import typer

from growth.errors import refuse
from growth.methods import METHODS, Method, method_of


def flags(methods: Iterable[type]) -> dict[str, tuple[type, str, list[str]]]:
    """Of every option that a method has: its type, what --help says, the methods that have it."""
    found: dict[str, dict[str, Field]] = {}
    for method in methods:
        for field in fields(method):
            found.setdefault(field.name, {})[method.name] = field
    return {name: (*_said(list(of.items())), list(of)) for name, of in found.items()}


def _said(options: list[tuple[str, Field]]) -> tuple[type, str]:
    """The type of one option and what --help says of it: its default, and that of methods with another; where
    they mean different things by it, what each does."""
    (_, first), defaults = options[0], [(name, _text(field)) for name, field in options]
    helps: dict[str, list[str]] = {}
    for name, field in options:
        helps.setdefault(field.metadata["help"], []).append(name)
    help = "; ".join(f"{', '.join(of)}: {x}" if len(helps) > 1 else x for x, of in helps.items())
    usual = Counter(text for _, text in defaults).most_common(1)[0][0]
    others = [f"{name}'s {text}" for name, text in defaults if text not in ("", usual)]
    told = f"; default: {', '.join([usual, *others])}" if usual else ""
    return first.metadata["kind"] or first.type, help + told


def _text(field: Field) -> str:
    default = field.metadata["usual"] or field.default
    return "" if default is None else " ".join(default) if isinstance(default, tuple) else str(default)


def told(methods: Iterable[type]) -> str:
    """Each with what it does, as the first sentence of its docstring has it; a paragraph each."""
    said = (f"{method.name}: {method.__doc__.partition('.')[0]}." for method in methods)
    return "\n\n".join(said)


def method_with(name: str, given: dict[str, Any]) -> Method:
    """The method of that name with these options; a refusal where it has no use for one."""
    kind = type(method_of(name))
    takes = flags([kind])
    for option, value in given.items():
        if option not in takes:
            takers = " or ".join(flags(METHODS.values())[option][2])
            got, remedy = "some" if option == "data" else value, f"leave it out, or choose method {takers}"
            raise refuse(option.replace("_", "-"), f"none, for {name} has no use for it", got, remedy)
    return kind(**{option: tuple(x) if isinstance(x, list) else x for option, x in given.items()})


def with_flags(command: Callable) -> Signature:
    """A command's signature, with a flag for each option of each method in the place of **options."""
    own = signature(command, eval_str=True)
    added = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _typed(kind),
                typer.Option(help=_sentence(help, takers), rich_help_panel=_panel(takers)),
            ],
        )
        for name, (kind, help, takers) in flags(METHODS.values()).items()
    ]
    kept = [x for x in own.parameters.values() if x.kind is not Parameter.VAR_KEYWORD]
    return own.replace(parameters=[*kept, *added])


def _sentence(help: str, takers: list[str]) -> str:
    """With a capital, but where a word to be typed comes first, or a method's name."""
    first = help.split()[0].rstrip(":,")
    typed = first in takers or re.match(r"[\w-]+(:| \|)", help)
    return (help if typed else help[0].upper() + help[1:]) + "."


def _panel(takers: list[str]) -> str:
    """The methods, or those that are not among them where these are fewer, for a title has one line."""
    others = [name for name in METHODS if name not in takers]
    if len(others) >= len(takers):
        return f"Options of {', '.join(takers)}"
    return f"Options of every method but {', '.join(others)}" if others else "Options of every method"


def _typed(kind: Any) -> Any:
    """What a flag of this type is read as: several words for a tuple, nothing where it is left out."""
    if get_origin(kind) is tuple:
        return list[str] | None
    return kind | None
