"""A model as growth sees it: wires, the ops between them, and the weights that the ops hold.

A wire is a named set of interchangeable units that carries values: the channels of the residual stream, the
heads of one layer's queries, the neurons of one feed-forward block. A name that holds `{}` exists once per
layer. An op reads wires and writes wires; several ops that write one wire are added up there. What an op can
and cannot stand when its wires grow is the business of growth.lossless; what a weight becomes then follows
from its wires alone.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

STREAM = "residual"  # the wire that every layer adds to


class Wire(NamedTuple):
    """`units` interchangeable units of `width` entries each: 7 heads of 24, or 168 channels of 1.

    fixed: growth leaves the number of units alone: words, positions, classes, pixels, the dims of a head.
    """

    units: int
    width: int = 1
    fixed: bool = False

    @property
    def size(self) -> int:
        return self.units * self.width


@dataclass(frozen=True)
class Weight:
    """One tensor; `wires` names its axes. Each is written along, but where it `reads` the last one: a matrix
    is [written, read], a table [row, written], a vector [written].

    scale: the model multiplies the tensor by it.
    """

    name: str
    wires: tuple[str, ...]
    reads: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Linear:
    """writes += scale (W reads + b)."""

    name: str
    reads: str
    writes: str
    bias: bool = False
    scale: float = 1.0

    def weights(self) -> Iterator[Weight]:
        yield Weight(f"{self.name}.weight", (self.writes, self.reads), reads=True, scale=self.scale)
        if self.bias:
            yield Weight(f"{self.name}.bias", (self.writes,), scale=self.scale)


@dataclass(frozen=True)
class Tied:
    """writes += scale E reads + b, where E is the table of that name: a head that is the embedding."""

    name: str
    table: str
    reads: str
    writes: str
    bias: bool = False
    scale: float = 1.0

    def weights(self) -> Iterator[Weight]:
        if self.bias:
            yield Weight(f"{self.name}.bias", (self.writes,))


@dataclass(frozen=True)
class Table:
    """writes += scale E[i]: embeddings of words or positions."""

    name: str
    rows: str
    writes: str
    scale: float = 1.0

    def weights(self) -> Iterator[Weight]:
        yield Weight(f"{self.name}.weight", (self.rows, self.writes), scale=self.scale)


@dataclass(frozen=True)
class Vector:
    """writes += v, at some position: a class token."""

    name: str
    writes: str

    def weights(self) -> Iterator[Weight]:
        yield Weight(f"{self.name}.weight", (self.writes,))


@dataclass(frozen=True)
class Norm:
    """writes = gain * normal(reads) + bias.

    layer   (x - mean x) / sqrt(var x + eps)        rms   x / sqrt(mean x^2 + eps)

    The mean is over the whole wire, or over each unit of it (`per`). eps is the field of the configuration
    that holds it, which several norms may share. gain: the wire of the gains, "" where there are none; those
    of a norm per unit are shared by the units. Where a norm writes what it reads, it stands after the sum of
    a block and the stream; where it writes another wire that others write too, its output is added there.
    """

    name: str
    reads: str
    writes: str
    gain: str
    kind: Literal["layer", "rms"]
    eps: str
    bias: bool = False
    per: Literal["wire", "unit"] = "wire"

    def weights(self) -> Iterator[Weight]:
        if self.gain:
            yield Weight(f"{self.name}.weight", (self.gain,))
        if self.bias:
            yield Weight(f"{self.name}.bias", (self.writes,))


@dataclass(frozen=True)
class Pointwise:
    """Each unit by itself, on wires that go together: an activation, a gate, a scan's channels.

    zero: units that are zero everywhere stay zero. own: weights of each unit, such as a depthwise
    convolution's.
    """

    wires: tuple[str, ...]
    zero: bool = True
    own: tuple[Weight, ...] = ()

    def weights(self) -> Iterator[Weight]:
        yield from self.own


@dataclass(frozen=True)
class Attention:
    """mixed = A(query, key) value, one head by itself: softmax, a retention, or a scan of heads.

    Units are heads. With fewer heads in key and value, each serves as many of query in a row (grouped-query
    attention). along: wires whose units go with the heads of query, such as biases by distance. in_turn:
    what goes with them stands in the configuration, for heads that are copied as by growth.maps.grouped.
    """

    query: str
    key: str
    value: str
    mixed: str
    along: tuple[str, ...] = ()
    in_turn: bool = False

    def weights(self) -> Iterator[Weight]:
        yield from ()


@dataclass(frozen=True)
class Experts:
    """Of the experts that write the same wire a token's `top_k` count, each times its weight.

    weight = softmax(logits), over all experts; normalised: divided by the sum of those that count. neurons:
    the wires of the experts' neurons, in the order of the logits; the matrices of expert E are NAME.E.gate,
    up and down. Linear in what the experts give.
    """

    name: str
    logits: str
    neurons: tuple[str, ...]
    top_k: int
    normalised: bool

    def weights(self) -> Iterator[Weight]:
        yield from ()


@dataclass(frozen=True)
class Output:
    """The model gives this wire to its user."""

    reads: str

    def weights(self) -> Iterator[Weight]:
        yield from ()


Op = Linear | Tied | Table | Vector | Norm | Pointwise | Attention | Experts | Output

# normal: as a matrix; own: what each unit has of its own, steps or taps, for which no start fits all.
Start = Literal["normal", "zero", "one", "own"]
START: dict[type, Start] = {Norm: "one", Pointwise: "own"}


@dataclass(frozen=True)
class Stack:
    """Layers of the same stream. kinds: of each layer; blocks: the ops of each kind of layer."""

    kinds: tuple[str, ...]
    blocks: Mapping[str, tuple[Op, ...]]

    @property
    def layers(self) -> int:
        return len(self.kinds)

    def adds(self, op: Op) -> bool:
        """Does this op write the stream?"""
        return isinstance(op, Linear | Norm) and op.writes == STREAM

    def after_sum(self, kind: str) -> list[Norm]:
        """The norms of the stream itself, in the order in which it meets them."""
        return [op for op in self.blocks[kind] if isinstance(op, Norm) and op.reads == op.writes == STREAM]

    @cached_property
    def weights(self) -> dict[str, tuple[Weight, ...]]:
        """Of each kind of layer."""
        return {kind: tuple(w for op in ops for w in op.weights()) for kind, ops in self.blocks.items()}


@dataclass(frozen=True)
class Architecture:
    """All that an operator may look at: wires, ops, depth, and how a fresh model starts.

    ops: those outside the layers. stacks: by the prefix of their names, "" where there is but one stack;
    their weights are called PREFIXlayers.{}.NAME and their wires PREFIXNAME.{}. eps: of each field that norms
    name.
    init_std: the standard deviation of a freshly initialised matrix.
    """

    wires: Mapping[str, Wire]
    ops: tuple[Op, ...]
    stacks: Mapping[str, Stack]
    eps: Mapping[str, float] = field(default_factory=dict)
    init_std: float = 0.02

    @cached_property
    def all_ops(self) -> tuple[Op, ...]:
        """Each once, those of layers after those outside."""
        inside = (op for stack in self.stacks.values() for ops in stack.blocks.values() for op in ops)
        return (*self.ops, *inside)

    @cached_property
    def outside(self) -> tuple[Weight, ...]:
        return tuple(weight for op in self.ops for weight in op.weights())

    @cached_property
    def layered(self) -> dict[str, Weight]:
        """The weights of layers, by name; of kinds of layers that have the same name, the first one's."""
        found: dict[str, Weight] = {}
        for stack in self.stacks.values():
            for weights in stack.weights.values():
                for weight in weights:
                    found.setdefault(weight.name, weight)
        return found

    @cached_property
    def starts(self) -> dict[str, Start]:
        """How each weight of a new model starts, by name: see Start."""
        found: dict[str, Start] = {}
        for op in self.all_ops:
            for weight in op.weights():
                bias = weight.name.endswith(".bias") and not isinstance(op, Pointwise)
                found[weight.name] = "zero" if bias else START.get(type(op), "normal")
        return found

    @cached_property
    def norms(self) -> tuple[Norm, ...]:
        return tuple(op for op in self.all_ops if isinstance(op, Norm))

    @cached_property
    def growing(self) -> dict[str, Wire]:
        """The wires that growth may widen."""
        return {name: wire for name, wire in self.wires.items() if not wire.fixed}

    def table(self, name: str) -> Table:
        """The table that a tied head shares."""
        return next(op for op in self.ops if isinstance(op, Table) and op.name == name)

    def scale(self, name: str) -> float:
        """What the model multiplies the weight of that name with."""
        return self.weight(name).scale

    def weight(self, name: str) -> Weight:
        return self.layered[name] if "{}" in name else next(x for x in self.outside if x.name == name)

    @property
    def layers(self) -> int:
        """Of the first stack."""
        return next(iter(self.stacks.values())).layers

    def stack_of(self, name: str) -> tuple[str, Stack]:
        """The stack that a layered wire or weight belongs to, and its prefix."""
        return next((prefix, stack) for prefix, stack in self.stacks.items() if name.startswith(prefix))

    def at(self, prefix: str, layer: int) -> tuple[Weight, ...]:
        """The weights of one layer."""
        stack = self.stacks[prefix]
        return stack.weights[stack.kinds[layer]]

    def shape(self, weight: Weight) -> tuple[int, ...]:
        return tuple(self.wires[wire].size for wire in weight.wires)

    @property
    def parameters(self) -> int:
        inside = (self.at(prefix, i) for prefix, stack in self.stacks.items() for i in range(stack.layers))
        return sum(math.prod(self.shape(weight)) for weights in (self.outside, *inside) for weight in weights)
