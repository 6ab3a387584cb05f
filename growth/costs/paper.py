"""A training step on paper: the model's own forward and backward, on tensors that have no numbers.

    stem  layer 0 .. layer L-1  head  |  head  layer L-1 .. layer 0  stem

Of layers that compute alike one runs, so that 80 cost what one does. What is fused on a GPU alone is counted
as torch computes it on a CPU, attention as flash attention.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, masking_utils

from growth.costs.tape import Cuts, Segment, Tape
from growth.errors import Refusal
from growth.families.table import Model
from growth.loading import on_meta, quiet
from growth.probes import image_shape
from growth.sizes import Sizes, resized
from growth.training.layers import layers_of
from growth.training.task import refuse_headless

# float32: as here. autocast: as on a GPU, where float32 weights have copies in 16 bits.
Precision = Literal["float32", "autocast"]


@dataclass(frozen=True)
class Step:
    """One forward and backward of B windows of T tokens, or B images.

    layers: in the order in which they run. inputs: bytes of the batch. buffers: of the model, in bytes.
    """

    B: int
    T: int
    stem: Segment
    layers: tuple[Segment, ...]
    head: Segment
    inputs: int
    buffers: int

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.stem, *self.layers, self.head

    @property
    def flops(self) -> int:
        return sum(x.flops for x in self.segments)

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def kept(self) -> int:
        """Bytes that live between forward and backward, besides weights and batch."""
        return sum(x.kept for x in self.segments)

    def most(self, gradient: float, gathered: Callable[[int | None], float] = lambda layer: 0.0) -> float:
        """The most bytes that live at a time, besides weights and an optimizer's state.

        gradient: bytes that a parameter's takes once its segment is over. gathered: what else lives at a
        layer, by its number, or outside them all (None).
        """
        below = [self.stem.kept]
        for layer in self.layers:
            below.append(below[-1] + layer.kept)
        outside = gathered(None)
        peaks = [self.stem.forward + outside]
        peaks += [below[i] + layer.forward + gathered(i) for i, layer in enumerate(self.layers)]
        peaks += [below[-1] + max(self.head.forward, self.head.backward) + outside]
        done = gradient * self.head.parameters
        for i in reversed(range(len(self.layers))):
            peaks.append(below[i] + self.layers[i].backward + gathered(i) + done)
            done += gradient * self.layers[i].parameters
        return self.inputs + self.buffers + max(*peaks, self.stem.backward + outside + done)


def step_of(
    model: Model, B: int, T: int, *, checkpointing: bool = False, precision: Precision = "float32"
) -> Step:
    """What a step of training that model takes. T: tokens of a window, as far as it has positions.

    Raises Refusal where it has no head that learns.
    """
    if not issubclass(model.auto, AutoModelForSeq2SeqLM):
        refuse_headless(model)
    small, alike = of_each_kind(model)
    network = on_meta(small)
    with FakeTensorMode():
        off_meta(network)
        if checkpointing:
            network.activation_checkpointing_enable({"use_reentrant": False})
        batch = examples(small, B, T)
        segments = segments_of(network.train(), batch, gpu=precision == "autocast")
    layers = tuple(segments[1 + i] for i in alike)
    inputs, buffers = (sum(x.nbytes for x in held) for held in (batch.values(), network.buffers()))
    return Step(B, T if "labels" in batch else 1, segments[0], layers, segments[-1], inputs, buffers)


def of_each_kind(model: Model) -> tuple[Model, list[int]]:
    """A model with one of all layers that compute alike, and which of its layers each layer is like.

    The model itself where it has several stacks, or cannot have fewer layers.
    """
    stacks, family, config = model.architecture.stacks, model.family, model.config
    itself = model, [*range(sum(stack.layers for stack in stacks.values()))]
    if len(stacks) > 1:
        return itself
    (stack,) = stacks.values()
    lists = [x for name in family.lists if (x := getattr(config, name)) is not None]
    numbers = [x for name in family.layer_numbers if (x := getattr(config, name)) is not None]
    kinds = [
        (kind, *(str(x[i]) for x in lists), *(i in x for x in numbers)) for i, kind in enumerate(stack.kinds)
    ]
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    with suppress(Refusal):
        fewer = resized(model, Sizes(layers=len(first)), lambda old, new: tuple(first), "shrink")
        return family.model(fewer, model.parts), [first.index(kinds.index(kind)) for kind in kinds]
    return itself


def off_meta(network: PreTrainedModel) -> None:
    """Under a FakeTensorMode: parameters, in float32, and buffers on the CPU, without numbers."""
    made: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, x in module._parameters.items():
            if x is not None:
                module._parameters[name] = made.setdefault(id(x), nn.Parameter(torch.empty(x.shape)))
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = torch.empty(x.shape, dtype=x.dtype)
    network.config.use_cache = False


def examples(model: Model, B: int, T: int) -> dict[str, Tensor]:
    """A batch as training hands it to a model of that kind."""
    if model.family.probe == "images":
        return {
            "pixel_values": torch.zeros(B, *image_shape(model.config)),
            "labels": torch.zeros(B, dtype=torch.long),
        }
    return {name: torch.zeros(B, T, dtype=torch.long) for name in ("input_ids", "labels")}


def segments_of(network: PreTrainedModel, batch: dict[str, Tensor], gpu: bool) -> list[Segment]:
    """Stem, layers and head of a forward and a backward, under a FakeTensorMode. gpu: as on one."""
    held = [*network.parameters(), *network.buffers(), *batch.values()]
    layers = [x for stack in layers_of(network, "costs").values() for x in stack.values()]
    with Tape(held) as tape, quiet(), unpacked(), undropped() if gpu else nullcontext():
        cuts = Cuts(tape, network, layers)
        with torch.autocast("cpu", torch.bfloat16) if gpu else nullcontext():
            loss = network(**batch).loss
        cuts.backward()
        loss.backward()
        return cuts.done()


@contextmanager
def undropped() -> Iterator[None]:
    """Attention drops nothing out: with dropout a CPU has no flash attention, and a GPU has. Also where it is
    computed again, in the backward, which modes of torch do not see."""
    attention = F.scaled_dot_product_attention

    def without(*given, dropout_p: float = 0.0, **named):
        return attention(*given, **named)

    F.scaled_dot_product_attention = without
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


@contextmanager
def unpacked() -> Iterator[None]:
    """No row holds several sequences: transformers would ask positions, which have no numbers."""
    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks
