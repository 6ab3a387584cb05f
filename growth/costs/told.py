"""What a dry run tells of costs: of the job on this machine, and of training what it makes on GPUs."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

import torch

from growth.costs.job import Job, job_of
from growth.costs.machines import H200, UTILISATION, Gpu, Machine, here
from growth.errors import Refusal
from growth.families.table import Model
from growth.plan import Plan, Source
from growth.writing import SHARD_BYTES

if TYPE_CHECKING:
    from growth.costs.aligning import Aligned
    from growth.costs.learning import Lesson
    from growth.costs.training import Training

GPUS = (1, 8, 64)
LENGTH = 2048  # tokens of a window, as `growth train` takes them, or the model's positions


@dataclass(frozen=True)
class Costs:
    """What is asked is worked out then. planning: seconds that the dry run took. place: what is written
    goes to its disk. gpu: of training. target: what is trained. learns: what is learned before."""

    job: Job
    planning: float
    place: Path
    gpu: Gpu
    target: Model
    learns: "Callable[[], Lesson | Aligned | None] | None" = None

    @cached_property
    def machine(self) -> Machine:
        return here(self.place)

    @property
    def seconds(self) -> float:
        return self.planning + self.job.seconds(self.machine)

    @cached_property
    def lesson(self) -> "Lesson | Aligned | None":
        return self.learns() if self.learns else None

    @cached_property
    def trainings(self) -> "tuple[Training, ...]":
        """On each number of GPUs, a window each at a time; none where nothing is learned from."""
        from growth.costs.training import Steps, training_of  # torch without numbers: seconds to import

        family, length = self.target.family, 1
        if family.probe != "images":
            length = min(LENGTH, family.positions(self.target.config) or LENGTH)
        with suppress(Refusal):  # it has no head that learns
            steps = Steps(self.target, 1, length)
            return tuple(training_of(steps, self.gpu, number) for number in GPUS)
        return ()

    def json(self) -> dict[str, Any]:
        told = {
            **asdict(self.job),
            "reads": self.job.reads,
            "seconds": self.seconds,
            "planning": self.planning,
            "machine": asdict(self.machine),
            "gpu": asdict(self.gpu),
            "utilisation": UTILISATION,
            "training": [asdict(x) for x in self.trainings],
        }
        if self.lesson:
            told["learning"] = asdict(self.lesson)
        return told

    def lines(self) -> Iterator[str]:
        job = self.job
        yield (
            f"costs: reads {gb(job.reads)}, writes {gb(job.writes)}, holds {gb(job.memory)} of memory, "
            f"about {self.seconds:,.1f} s here" + (f"; {job.uncounted} is not in it" if job.uncounted else "")
        )
        if self.lesson:
            held = f"{job.uncounted}: {self.lesson}; holds {gb(self.lesson.memory)} of memory"
            least = self.lesson.flops / self.machine.products
            yield held if torch.accelerator.is_available() else f"{held}, at least {least:,.1f} s here"
        if not self.trainings:
            return
        each, images = self.trainings[0], self.target.family.probe == "images"
        unit = "an image" if images else f"a token, windows of {each.tokens}"
        yield (
            f"training it: {each.flops / each.tokens:.3g} FLOP {unit}, each on a {self.gpu.name} "
            f"of {gb(self.gpu.memory)} at {UTILISATION:.0%} of its peak:"
        )
        for x in self.trainings:
            again = ", layers computed again" if x.checkpointing else ""
            found = (
                f"{x.tokens / x.seconds:,.0f} {'images' if images else 'tokens'}/s{again}"
                if x.fits
                else "does not fit"
            )
            yield f"  on {x.gpus} GPU{'s' * (x.gpus > 1)}: {gb(x.memory)} on each, {found}"


def costs_of(
    source: Source,
    target: Model,
    plan: Plan,
    dst: str | Path | None,
    planning: float,
    shard_bytes: int = SHARD_BYTES,
    *,
    uncounted: str = "",
    learns: "Callable[[], Lesson | Aligned | None] | None" = None,
) -> Costs:
    """What carrying out the plan takes, as job_of has it, and training the target after it. planning: seconds
    so far. uncounted: what it takes besides; learns: works out that, where it is learning."""
    place = Path(gettempdir() if dst is None else dst)
    return Costs(job_of(source, plan, shard_bytes, uncounted), planning, place, H200, target, learns)


def gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
