"""growth inspect."""

import json
from typing import Annotated

import typer

import growth
from growth.cli.arguments import Cache, Json, Length, Src, TextField, Windows
from growth.cli.printing import out, say
from growth.errors import refuse


def inspect(
    src: Src,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print the recipe that made it, as grow --recipe takes it.")
    ] = False,
    redundancy: Annotated[
        bool, typer.Option("--redundancy", help="How alike layers and their units are on --data.")
    ] = False,
    data: Annotated[str | None, typer.Option(help="Text, as train reads it.")] = None,
    windows: Windows = 32,
    sequence_length: Length = None,
    text_field: TextField = "text",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Wires, sizes and tensors of a checkpoint, and what can be done with it."""
    if data is not None and not redundancy:
        raise refuse("data", "none without --redundancy", data, "leave it out, or add that")
    if recipe and redundancy:
        raise refuse("recipe, redundancy", "one of them", "both", "ask for one at a time")
    if recipe:
        made = growth.recipe_of(src)
        say(json.dumps(made.json()) if as_json else made.yaml().rstrip())
        return
    if not redundancy:
        from growth import inspection  # each verb imports what it needs when it runs

        found = inspection.inspect(src)
        for line in [json.dumps(found.json())] if as_json else found.lines():
            say(line)
        return
    from growth.shrinking.redundancy import redundancy as measured

    how = {"windows": windows, "sequence_length": sequence_length, "text_field": text_field, "cache": cache}
    told = measured(src, data, **how)
    if as_json:
        say(json.dumps(told.json()))
        return
    out.print(told.table())
    for line in told.lines():
        say(line)
