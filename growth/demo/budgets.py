"""Every number of the demo: sizes, steps and rates, which were chosen in trials."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    heads: int


@dataclass(frozen=True)
class Budget:
    """What arms and their baseline get: steps, peak learning rate; the arms' warm-up and the share of decay.

    A baseline warms up over a twentieth of the steps and decays over all of them. peak: the arms' own rate,
    where the baseline ends lower with another.
    """

    steps: int
    rate: float
    warmup: int
    decay: float
    peak: float | None = None


@dataclass(frozen=True)
class Transfer:
    """An arm of a linear cost: what `growth.transfer` is told, and the budget of it and its baseline.

    align: steps, of one window each, in which the new mixers are fitted to the source's attention on
    `windows` distinct ones. copied: the share of the rate for what was copied.
    """

    settings: dict[str, Any]
    budget: Budget
    align: int
    windows: int
    copied: float = 0.3


@dataclass(frozen=True)
class Carried:
    """An arm of lemon that goes on with its source's optimizer.

    annealed: had the source's rate fallen to its end? Else it stayed where it was, for as many steps. noise:
    lemon's.
    """

    annealed: bool
    budget: Budget
    noise: float = 2.0


@dataclass(frozen=True)
class Lesson:
    """What methods that learn get; rate: None for the methods' own. A step costs what one of training does,
    with as many examples."""

    steps: int
    batch_size: int
    rate: float | None = None


@dataclass(frozen=True)
class Group:
    """A source, and the larger model that it is grown to. The loss is measured `evaluations` times, on
    `held_out` examples."""

    source: Size
    target: Size
    training: Budget
    growing: Budget
    learning: Lesson
    batch_size: int
    held_out: int
    evaluations: int


@dataclass(frozen=True)
class Text(Group):
    """Windows are `length` bytes. carrying, transferring: arms by their names; text: bytes; words: bytes that
    each model writes."""

    carrying: dict[str, Carried]
    transferring: dict[str, Transfer]
    length: int
    text: int
    words: int


@dataclass(frozen=True)
class Job:
    text: Text
    images: Group
    seed: int = 0
    # A second thread gains a quarter at these sizes; on a busy machine, waiting for it costs ten times that.
    threads: int = 1


TRANSFERS = {
    "retnet": {"mixers": "retention"},
    "retnet-learned": {"mixers": "retention", "decays": "learned"},
    "mamba": {"mixers": "mamba"},
    "mamba2": {"mixers": "mamba2"},
    "hybrid": {"mixers": "retention", "keep_attention": [1]},
}


def transfers(arms: Mapping[str, tuple[int, Budget]], windows: int = 64) -> dict[str, Transfer]:
    """An arm for each of TRANSFERS, which has its steps of aligning and its budget."""
    return {name: Transfer(TRANSFERS[name], budget, align, windows) for name, (align, budget) in arms.items()}


FULL = Job(
    text=Text(
        source=Size(3, 64, 2),
        target=Size(4, 96, 3),
        training=Budget(350, 8e-3, 0, 1.0),
        growing=Budget(400, 5e-3, 40, 0.43),
        carrying={
            "lemon-carried": Carried(True, Budget(400, 5e-3, 0, 0.43)),
            "lemon-early": Carried(False, Budget(400, 5e-3, 0, 0.3)),
        },
        transferring=transfers(
            {
                "retnet": (320, Budget(470, 1.5e-2, 10, 0.45, 1e-2)),
                "retnet-learned": (200, Budget(300, 2e-2, 10, 0.55, 1e-2)),
                "mamba": (160, Budget(130, 2e-2, 10, 0.6, 1.2e-2)),
                "mamba2": (160, Budget(115, 1.2e-2, 10, 0.7)),
                "hybrid": (200, Budget(360, 1.5e-2, 10, 0.35, 1e-2)),
            }
        ),
        learning=Lesson(5, 8),
        batch_size=8,
        length=128,
        held_out=128,
        evaluations=12,
        text=4_000_000,
        words=80,
    ),
    images=Group(
        source=Size(2, 32, 2),
        target=Size(3, 48, 3),
        training=Budget(600, 5e-3, 0, 1.0),
        growing=Budget(700, 5e-3, 70, 0.5),
        learning=Lesson(25, 32, 5e-3),
        batch_size=32,
        held_out=256,
        evaluations=10,
    ),
)
QUICK = Job(
    text=Text(
        source=Size(2, 32, 2),
        target=Size(3, 48, 3),
        training=Budget(60, 8e-3, 0, 1.0),
        growing=Budget(80, 8e-3, 8, 0.6),
        carrying={
            "lemon-carried": Carried(True, Budget(80, 8e-3, 0, 0.6)),
            "lemon-early": Carried(False, Budget(80, 8e-3, 0, 0.45)),
        },
        transferring=transfers(
            {
                "retnet": (40, Budget(100, 1.5e-2, 5, 0.6, 1e-2)),
                "retnet-learned": (40, Budget(100, 1.5e-2, 5, 0.6, 1e-2)),
                "mamba": (40, Budget(60, 1.5e-2, 5, 0.6, 1.2e-2)),
                "mamba2": (40, Budget(60, 1.2e-2, 5, 0.6)),
                "hybrid": (40, Budget(100, 1.5e-2, 5, 0.6, 1e-2)),
            },
            windows=16,
        ),
        learning=Lesson(5, 8),
        batch_size=8,
        length=128,
        held_out=64,
        evaluations=5,
        text=500_000,
        words=20,
    ),
    images=Group(
        source=Size(2, 32, 2),
        target=Size(3, 48, 3),
        training=Budget(200, 5e-3, 0, 1.0),
        growing=Budget(300, 5e-3, 30, 0.6),
        learning=Lesson(10, 32, 5e-3),
        batch_size=32,
        held_out=256,
        evaluations=5,
    ),
)
