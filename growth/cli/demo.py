"""growth demo."""

from typing import Annotated

import typer


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run, about a minute.")] = False,
    folder: Annotated[
        str, typer.Option("--out", help="New folder for the checkpoints and the report.")
    ] = "growth-demo",
) -> None:
    """The main job, end to end: the text of Python's standard library, and handwritten digits."""
    from growth.demo import run  # and matplotlib, a second that no other verb needs

    run(folder, quick=quick)
