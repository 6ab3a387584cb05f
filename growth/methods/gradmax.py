"""GradMax: new neurons that the loss pulls at hardest.  Evci et al., ICLR 2022 (arXiv 2201.05125).

    new neurons    read nothing, W_in = 0 and bias 0, and write along  U = top_k of  M = E[x gᵀ]
    x, g           what the block reads; the loss's gradient by what it writes
    norm           each column of U as long as the old neurons' outgoing weights in the mean, or at most

The gradient of W_in is act'(0) M U, whose norm is largest where U are M's first k right singular vectors, k
of them orthogonal and of one length. Beyond M's D vectors the rest point anywhere. A gated block,
act(G x) * (W_in x), has new gates G as in a new model; neuron i then has a matrix of its own,
M_i = E[act(G_i x) x gᵀ], and writes along the first singular vector of that, found by iteration.

Preserves the function wherever the activation is 0 at 0, or the block is gated; others are refused. It grows
neurons alone: chain it with lemon for other sizes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from growth.architecture import Architecture
from growth.depth import rows
from growth.errors import refuse
from growth.maps import Maps, copies
from growth.methods.copying import per_layer
from growth.methods.learning import refuse_experts
from growth.methods.method import Learner
from growth.methods.option import option, refuse_below, refuse_other
from growth.methods.ordered import Ordered

if TYPE_CHECKING:
    from growth.growing import Growth
    from growth.training.data import Data

LENGTHS = ("mean", "max")


@dataclass(frozen=True)
class GradMax(Ordered):
    """New neurons that read nothing yet and write where the gradient asks for it.  Evci et al., ICLR 2022.

    data: files, folders, or Windows; for an image classifier Images. The whole source is in memory, in
    float32, for the gradients of `batches` batches.
    """

    data: "Data | None" = option(None, "a text file, or a folder of them, to learn from", str)
    batches: int = option(2, "batches whose gradients are asked for")
    batch_size: int = option(16, "windows or images a step")
    sequence_length: int | None = option(None, "tokens a window; default: 512, or the model's positions")
    outgoing: str = option("mean", "length of new outgoing weights: mean | max of the old ones'")

    name: ClassVar[str] = "gradmax"
    lossless: ClassVar[bool] = True
    learned: ClassVar[bool] = True
    grows: ClassVar[frozenset[str]] = frozenset({"ffn-size"})

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("batches", 1), ("batch_size", 1), ("sequence_length", 2)):
            refuse_below(name.replace("_", "-"), getattr(self, name), least)
        refuse_other("outgoing", self.outgoing, LENGTHS)
        if self.order is not None:
            raise refuse("order", "none, for gradmax adds no layers", self.order, "leave it out")

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """New neurons that read nothing and that nobody reads; `learner` says what is read of them."""
        refuse_experts(self.name, old)
        wires = {}
        for name, wire in old.growing.items():
            if (more := new.wires[name].units - wire.units) > 0:
                wires[name] = copies((*range(wire.units), *(-1,) * more), wire)
        depth = {name: rows(tuple(range(old.stack_of(name)[1].layers))) for name in old.layered}
        return Maps(per_layer(new, wires), depth)

    def learner(self, growth: "Growth") -> Learner:
        """What takes the gradients. Raises Refusal where the data do not fit."""
        from growth.learned.gradients import Outgoing  # torch, which --help does not wait for

        return Outgoing(growth)
