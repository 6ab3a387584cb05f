"""What all methods that learn can be told."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from growth.architecture import Architecture, Experts
from growth.errors import refuse
from growth.methods.method import Learner
from growth.methods.option import option, refuse_below, refuse_other
from growth.methods.ordered import Ordered

if TYPE_CHECKING:
    from growth.growing import Growth
    from growth.training.data import Data

RATE = 0.006  # over the source's width: few steps at ten times that raised the loss of the demo's model
REMAKE = ("auto", "always", "never")


@dataclass(frozen=True)
class Learning(Ordered):
    """data: files, folders, or Windows; for an image classifier Images. learning_rate: RATE / the source's
    width unless given, for a new unit sums over as many old ones."""

    data: "Data | None" = option(None, "a text file, or a folder of them, to learn from", str)
    steps: int = option(5, "learning steps")
    batch_size: int = option(16, "windows or images a step")
    sequence_length: int | None = option(None, "tokens a window; default: 512, or the model's positions")
    learning_rate: float | None = option(None, "the highest learning rate; default: 0.006 / the width")
    remake: str = option("auto", "make blocks again for the backward: auto, by memory | always | never")

    learned: ClassVar[bool] = True
    least_steps: ClassVar[int] = 1

    @property
    def needs_head(self) -> bool:
        return self.steps > 0

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("steps", self.least_steps), ("batch_size", 1), ("sequence_length", 2)):
            refuse_below(name.replace("_", "-"), getattr(self, name), least)
        refuse_other("remake", self.remake, REMAKE)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise refuse("learning-rate", "more than 0, and finite", self.learning_rate, "leave it out")

    def told(self, old: Architecture) -> Self:
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=RATE / old.wires["residual"].size)

    def learner(self, growth: "Growth") -> Learner:
        """What learns, and what it learns from. Raises Refusal where the data do not fit."""
        from growth.learned.fit import Learned  # and the trainer, which takes a second to import

        return Learned(growth)


def refuse_experts(method: str, old: Architecture) -> None:
    """Raises Refusal where layers have experts, of a method that needs each as a module in memory."""
    if any(isinstance(op, Experts) for op in old.all_ops):
        expected = "layers without experts, which are joined in memory"
        raise refuse(method, expected, "a mixture of experts", "choose method lemon")


def refuse_several_kinds(method: str, old: Architecture) -> None:
    """Raises Refusal where layers that are not alike would be mixed, and where they have experts."""
    refuse_experts(method, old)
    kinds = {kind for stack in old.stacks.values() for kind in stack.blocks}
    if len(old.stacks) > 1 or len(kinds) > 1:
        got = "several stacks" if len(old.stacks) > 1 else f"layers of kinds {', '.join(sorted(kinds))}"
        raise refuse(method, "layers of one kind, for it mixes them", got, "choose method lemon")
