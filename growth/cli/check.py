"""growth check."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

import growth
from growth.cli.arguments import Json, Src
from growth.cli.printing import say


def check(
    src: Src,
    dst: Annotated[
        str, typer.Argument(metavar="DST", help="What was made of it, or another.", show_default=False)
    ],
    text: Annotated[str | None, typer.Option(help="A file whose text they read, not random input.")] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Also how far their greedy continuations agree.")
    ] = False,
    as_json: Json = False,
) -> Any:
    """Compare what two models compute; exit code 1 when an equality that growth promised fails."""
    from growth.generating import TOKENS

    agreement = growth.check(src, dst, text=text, generate=TOKENS if generate else 0)
    say(json.dumps(asdict(agreement) | {"kept": agreement.kept}) if as_json else str(agreement))
    return agreement
