"""What a run shows while it works: a live line on a terminal, a line for every evaluation elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class RunProgress:
    """The `steps` of the run called `name`, on standard error; nothing where `silent`. A context manager."""

    def __init__(self, name: str, steps: int, silent: bool = False):
        self.name, self.steps, self.silent, self.done = name, steps, silent, 0
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        live = sys.stderr.isatty() and not silent
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True) if live else None

    def __enter__(self) -> "RunProgress":
        if self._bar:
            self._bar.start()
            self._bar.add_task(self.name, total=self.steps)
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int) -> None:
        self.done = step
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def advance(self) -> None:
        """One step more."""
        self.step(self.done + 1)

    def loss(self, step: int, loss: float, seconds: float, of: str = "validation") -> None:
        self.say(f"step {step} of {self.steps}, {of} loss {loss:.3f}, {seconds:.0f} s")

    def say(self, text: str) -> None:
        """The line's text on a terminal, a line of its own elsewhere."""
        text = f"{self.name}: {text}"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=text)
        elif not self.silent:
            print(text, file=sys.stderr, flush=True)


class ShowSteps(TrainerCallback):
    """Shows the steps, and the training loss where it is logged, of a Trainer that measures nothing else."""

    def __init__(self, progress: RunProgress):
        self.progress = progress

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.step(state.global_step)

    def on_log(self, args, state, control, *, logs, **kwargs):
        if "loss" in logs:
            seconds = time.perf_counter() - self.began
            self.progress.loss(state.global_step, logs["loss"], seconds, "training")
