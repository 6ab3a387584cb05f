"""The neurons of a network's feed-forward blocks, and the entries of its parameters that are theirs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from growth.architecture import Weight
from growth.errors import refuse
from growth.families.stored import Entry
from growth.training.layers import seen_in

Role = Literal["writes", "reads", "both"]  # what writes a neuron, what reads it


@dataclass(frozen=True)
class Part:
    """A parameter with entries of the neurons of `wire`; shapes: of the weights that it holds."""

    parameter: nn.Parameter
    entry: Entry
    shapes: tuple[tuple[int, ...], ...]
    wire: str

    def axis(self, weight: Weight, role: Role) -> int | None:
        """Of the neurons, in a weight that plays the role."""
        if self.wire not in weight.wires:
            return None
        axis = weight.wires.index(self.wire)
        reads = weight.reads and axis == len(weight.wires) - 1
        return axis if role in ("both", "reads" if reads else "writes") else None

    def theirs(self, units: Iterable[int], role: Role = "both") -> Tensor:
        """Which entries of the parameter are those of these neurons: a mask."""
        masks, index = [], torch.tensor([*units], dtype=torch.long)
        for weight, shape in zip(self.entry.weights, self.shapes):
            masks.append(torch.zeros(shape, dtype=torch.bool))
            if (axis := self.axis(weight, role)) is not None:
                masks[-1].index_fill_(axis, index, True)
        return self.entry.to_disk(masks).to(self.parameter.device)

    def squares(self, values: Tensor, role: Role) -> Iterator[Tensor]:
        """The sums of squares over each neuron's entries of a tensor like the parameter."""
        for weight, x in zip(self.entry.weights, self.entry.from_disk(values)):
            if (axis := self.axis(weight, role)) is not None:
                yield (
                    x.double().square().movedim(axis, 0).flatten(1).sum(1) if x.dim() > 1 else x.double() ** 2
                )


@dataclass(frozen=True)
class Neurons:
    """Those of one feed-forward block."""

    units: int
    parts: tuple[Part, ...]

    def magnitudes(self) -> Tensor:
        """|w_in| |w_out| of each neuron, [units]: 0 where it is taken out."""
        return torch.sqrt(
            sum(x for part in self.parts for x in part.squares(part.parameter.detach(), "writes"))
            * sum(x for part in self.parts for x in part.squares(part.parameter.detach(), "reads"))
        ).cpu()

    def gradients(self) -> Tensor:
        """The norms of the gradients of what reads each neuron, [units]."""
        grads = [(part, part.parameter.grad) for part in self.parts if part.parameter.grad is not None]
        found = [x for part, grad in grads for x in part.squares(grad, "reads")]
        return torch.sqrt(sum(found)).cpu() if found else torch.zeros(self.units)


def neurons_of(network: nn.Module, what: str) -> dict[str, Neurons]:
    """Of each feed-forward block, by the name of its wire: "ffn.0", "encoder.ffn.1".

    Raises Refusal in the name of `what` where no family knows the network, where its weights are not whole or
    not apart in memory (experts), and where it has no such block.
    """
    seen, names = seen_in(network, what)
    parameters = {seen.named(name): network.get_parameter(name) for name in names}
    model, found = seen.architecture, {}
    for name, (entry, layer) in seen.table().items():
        for wire in sorted({w for weight in entry.weights for w in weight.wires if _is_ffn(w)}):
            entry = replace(entry, offset=0.0)
            parameter = parameters.get(name)
            if parameter is None or hasattr(parameter, "to_local") or parameter.shape != entry.shape(model):
                got = f"{seen.family.model_type}'s {name}, which is shared out or one with others"
                raise refuse(what, "neurons whose weights are whole in memory", got, "leave it out")
            shapes = tuple(model.shape(weight) for weight in entry.weights)
            found.setdefault(wire.format(layer), []).append(Part(parameter, entry, shapes, wire))
            units = model.wires[wire].units
    if not found:
        raise refuse(what, "feed-forward blocks", f"a {seen.family.model_type} without", "leave it out")
    return {name: Neurons(units, tuple(parts)) for name, parts in found.items()}


def taken_out(network: nn.Module) -> dict[str, list[int]]:
    """The neurons that are zero, of each block that has some: what `growth shrink` removes at no cost."""
    zeros = {
        name: (neurons.magnitudes() == 0).nonzero().flatten().tolist()
        for name, neurons in neurons_of(network, "taken_out").items()
    }
    return {name: units for name, units in zeros.items() if units}


def _is_ffn(wire: str) -> bool:
    return wire.split(".")[-2:] == ["ffn", "{}"]
