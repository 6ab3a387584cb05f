"""What a run shows while it works: a live line on a terminal, a line for every evaluation elsewhere."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """`steps` of the run called `name`, on standard error. Use as a context manager."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps = name, steps
        self._bar = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.steps)
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def loss(self, step: int, loss: float, seconds: float) -> None:
        text = f"{self.name}: step {step} of {self.steps}, validation loss {loss:.3f}, {seconds:.0f} s"
        if self._bar:
            self._bar.update(self._task, description=text)
        else:
            print(text, file=sys.stderr, flush=True)
