"""What all methods that learn can be told."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from growth.architecture import Architecture, Experts
from growth.errors import refuse
from growth.methods.option import option, refuse_below
from growth.methods.ordered import Ordered

if TYPE_CHECKING:
    from growth.training.data import Data

RATE = 0.5  # over the source's width: at 96 it learns more than 0.2 does, and no less than 1


@dataclass(frozen=True)
class Learning(Ordered):
    """data: files, folders, or Windows; for an image classifier Images. learning_rate: RATE / the source's
    width unless given, for a new unit sums over as many old ones."""

    data: "Data | None" = option(None, "a text file, or a folder of them, to learn from", str)
    steps: int = option(100, "learning steps")
    batch_size: int = option(16, "windows or images a step")
    sequence_length: int | None = option(None, "tokens a window; default: 512, or the model's positions")
    learning_rate: float | None = option(None, "the highest learning rate; default: 0.5 / the source's width")

    learned: ClassVar[bool] = True
    lossless: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("steps", 1), ("batch_size", 1), ("sequence_length", 2)):
            refuse_below(name.replace("_", "-"), getattr(self, name), least)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise refuse("learning-rate", "more than 0, and finite", self.learning_rate, "leave it out")


def refuse_several_kinds(method: str, old: Architecture) -> None:
    """Raises Refusal where layers that are not alike would be mixed, and where they have experts."""
    if any(isinstance(op, Experts) for op in old.all_ops):
        expected = "layers without experts, which are joined in memory"
        raise refuse(method, expected, "a mixture of experts", "choose method lemon")
    kinds = {kind for stack in old.stacks.values() for kind in stack.blocks}
    if len(old.stacks) > 1 or len(kinds) > 1:
        got = "several stacks" if len(old.stacks) > 1 else f"layers of kinds {', '.join(sorted(kinds))}"
        raise refuse(method, "layers of one kind, for it mixes them", got, "choose method lemon")
