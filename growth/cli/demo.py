"""growth demo."""

from typing import Annotated

import typer


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run, about a minute.")] = False,
    scale: Annotated[
        str | None,
        typer.Option(help="laptop | gpu: larger models, on several seeds, for hours; the same call goes on."),
    ] = None,
    folder: Annotated[
        str, typer.Option("--out", help="New folder for the checkpoints and the report.")
    ] = "growth-demo",
) -> None:
    """The main job, end to end: the text of Python's standard library, and handwritten digits."""
    from growth.demo import run  # late, for `growth --help` does not wait for torch

    run(folder, quick=quick, scale=scale)
