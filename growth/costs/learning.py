"""Learning on paper: a step of what a method trains, on tensors that have no numbers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from growth.costs.paper import examples, unpacked
from growth.costs.tape import Tape
from growth.learned.expansion import Expansion
from growth.learned.fit import LENGTH
from growth.learned.memory import free
from growth.loading import quiet
from growth.methods.learning import Learning
from growth.plan import Source
from growth.training.data import window_length

if TYPE_CHECKING:
    from growth.growing import Growth

MOMENTS = 2  # of Adam, each as large as what learns


@dataclass(frozen=True)
class Lesson:
    """flops: of all steps. memory: the most bytes that they hold, the source's weights and Adam's moments
    among them. remakes: are blocks made again for the backward, as the method asks or memory here has it?"""

    steps: int
    B: int
    T: int
    flops: int
    memory: int
    remakes: bool

    def __str__(self) -> str:
        each = f"{self.B} windows of {self.T} tokens" if self.T > 1 else f"{self.B} images"
        again = ", blocks made again" if self.remakes else ""
        return f"{self.flops:.3g} FLOP in {self.steps} steps of {each}{again}"


class Hollow(Source):
    """A source whose weights have shapes and no numbers, under a FakeTensorMode."""

    def __init__(self, source: Source):
        self.__dict__ |= source.__dict__

    def raw(self, weight: str, layer: int | None) -> Tensor:
        return self.zeros(weight, layer)


def lesson_of(growth: "Growth") -> Lesson | None:
    """None where the method learns otherwise than by steps."""
    method = growth.method
    if not isinstance(method, Learning) or not method.steps:
        return None
    for remakes in (False, True) if method.remake == "auto" else (method.remake == "always",):
        flops, kept, memory, T = _step(growth, remakes)
        if method.remake != "auto" or kept <= free(torch.device("cpu")) // 2:
            break
    return Lesson(method.steps, method.batch_size, T, method.steps * flops, memory, remakes)


def _step(growth: "Growth", remakes: bool) -> tuple[int, int, int, int]:
    """Operations, bytes between forward and backward, the most bytes, tokens of a window."""
    method, config = growth.method, growth.source.config
    T = window_length(config, method.data, None, method.sequence_length, usual=LENGTH) or 1
    with FakeTensorMode(allow_non_fake_inputs=True), quiet(), unpacked():
        operator = method.operator(Hollow(growth.source), *growth.models, growth.maps, growth.seed)
        expansion = Expansion(operator, growth.source, growth.target).train()
        expansion.remakes = remakes
        batch = examples(growth.target, method.batch_size, T)
        held = [*expansion.parameters(), *expansion.buffers(), *expansion.large[0].buffers(), *batch.values()]
        with Tape(held) as tape:
            loss = expansion(**batch).loss
            kept = tape.live
            loss.backward()
    always = sum(x.nbytes for x in held) + MOMENTS * sum(x.nbytes for x in expansion.parameters())
    return tape.flops, kept, always + tape.most, T if "input_ids" in batch else 1
