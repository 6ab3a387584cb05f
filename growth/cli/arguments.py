"""Arguments that verbs share, and how what is typed is read."""

from typing import Annotated

import typer

from growth.errors import refuse

Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="A checkpoint: a folder, or the Hub's owner/name.", show_default=False
    ),
]
Dst = Annotated[str | None, typer.Argument(metavar="DST", help="New folder; may be left out of a dry run.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print where every tensor would come from; write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TextField = Annotated[str, typer.Option(help="Of rows, the field that holds the text.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Windows = Annotated[int, typer.Option(help="Windows of the data that the model runs on.")]
Length = Annotated[int | None, typer.Option(help="Tokens a window; default: 512, or the model's positions.")]
Cache = Annotated[
    str | None, typer.Option(help="Folder that keeps what the run finds; default: the user's cache.")
]
Dtype = Annotated[str | None, typer.Option(help="Of the result, such as bfloat16; default: the source's.")]
ShardSize = Annotated[float, typer.Option(help="Largest file, in GB.")]
HiddenSize = Annotated[int | None, typer.Option(help="Width; default: the source's.")]
NumHeads = Annotated[int | None, typer.Option(help="Heads; default: in proportion to the width.")]
NumKVHeads = Annotated[
    int | None, typer.Option(help="Heads of keys and values; default: in proportion to the heads.")
]
FFNSize = Annotated[
    int | None, typer.Option(help="Neurons of a feed-forward block; default: in proportion to the width.")
]


def shard_bytes(gigabytes: float) -> int:
    """Raises Refusal where it is no size."""
    if not 0 < gigabytes < float("inf"):
        raise refuse("shard-size", "more than 0 GB, and finite", gigabytes, "choose a larger number")
    return max(1, int(gigabytes * 10**9))


def whole_numbers(flag: str, text: str) -> list[int]:
    """As typed with commas between them. Raises Refusal where these are none."""
    try:
        return [int(layer) for layer in text.split(",") if layer.strip()]
    except ValueError as error:
        raise refuse(flag, "layer numbers such as 1,11", repr(text), "separate them by commas") from error
