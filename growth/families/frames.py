"""The transformer's frame, in the variants that families have of it: the ops of a layer and their wires."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from growth.architecture import (
    Architecture,
    Attention,
    Linear,
    Norm,
    Op,
    Pointwise,
    Stack,
    Table,
    Tied,
    Wire,
)


@dataclass(frozen=True)
class Frame:
    """What a layer is made of.

    norms   before: each block reads a norm of the stream      after: a norm stands after each sum
            around: before, and each block's output is normed before it is added
            inside: the same, but blocks read the stream itself
    qk_norm "" for none, "unit" for one per head, "wire" for one over all heads
    biases  of q, k, v / of the attention's output / of the feed-forward block
    prefix  of the names of a stack beside another one
    """

    hidden: int
    heads: int
    ffn: int
    kv_heads: int = 0
    head_dim: int = 0
    kind: Literal["layer", "rms"] = "rms"
    eps: str = "rms_norm_eps"
    norms: Literal["before", "after", "around", "inside"] = "before"
    gated: bool = True
    qk_norm: Literal["", "unit", "wire"] = ""
    biases: tuple[bool, bool, bool] = (False, False, False)
    prefix: str = ""

    def wires(self) -> dict[str, Wire]:
        """Every wire that a layer and what is around it may name."""
        stream = ("residual", "normed", "gain", "branch", "branch_gain", "final", "final_gain")
        size = self.head_dim or self.hidden // self.heads
        queries, keys = Wire(self.heads, size), Wire(self.kv_heads or self.heads, size)
        inner = dict.fromkeys(("query", "query_raw", "query_gain", "mixed"), queries)
        inner |= dict.fromkeys(("key", "key_raw", "key_gain", "value"), keys)
        inner |= {f"cross.{name}": wire for name, wire in inner.items()}
        inner["ffn"] = Wire(self.ffn)
        own = {f"{self.prefix}{name}.{{}}": wire for name, wire in inner.items()}
        return {name: Wire(self.hidden) for name in stream} | own | {"head": Wire(size, fixed=True)}

    def layer(self) -> tuple[Op, ...]:
        """The ops of one layer: attention, then the feed-forward block."""
        return (
            *self.block("mixer", self.attention()),
            *self.block("mlp", self.feed_forward()),
        )

    @property
    def reads(self) -> str:
        """The wire that a block reads."""
        return "normed" if self.norms in ("before", "around") else "residual"

    @property
    def writes(self) -> str:
        """The wire that a block writes."""
        return "branch" if self.norms in ("around", "inside") else "residual"

    def norm(self, name: str, reads: str, writes: str, gain: str) -> Norm:
        return Norm(name, reads, writes, gain, self.kind, self.eps, bias=self.kind == "layer")

    def block(self, name: str, ops: tuple[Op, ...]) -> tuple[Op, ...]:
        """With the norms around it."""
        module = self.module(name)
        before = self.norm(f"{module}_norm", "residual", self.reads, "gain")
        after = self.norm(f"{module}_norm", "residual", "residual", "gain")
        out = self.norm(f"{module}_out_norm", self.writes, "residual", "branch_gain")
        return {
            "before": (before, *ops),
            "after": (*ops, after),
            "around": (before, *ops, out),
            "inside": (*ops, out),
        }[self.norms]

    def module(self, name: str) -> str:
        """The name of a module of a layer."""
        return f"{self.prefix}layers.{{}}.{name}"

    def wire(self, name: str, mixer: str = "mixer") -> str:
        """The name of a wire inside a layer."""
        return f"{self.prefix}{'' if mixer == 'mixer' else f'{mixer}.'}{name}.{{}}"

    def attention(self, mixer: str = "mixer", keys: str = "", along: tuple[str, ...] = ()) -> tuple[Op, ...]:
        """mixer: its name, "cross" where keys and values read another wire than the queries do, namely
        `keys`; along: wires whose units go with the heads of query."""
        module, wire = self.module(mixer), partial(self.wire, mixer=mixer)
        return (
            *self.projections(mixer, mixer, keys),
            Attention(wire("query"), wire("key"), wire("value"), wire("mixed"), along),
            Linear(f"{module}.o", wire("mixed"), self.writes, self.biases[1]),
        )

    def projections(self, mixer: str, wires: str, keys: str = "") -> tuple[Op, ...]:
        """Queries, keys and values of a mixer, with their norms; wires: what stands before their names."""
        module, wire, bias = self.module(mixer), partial(self.wire, mixer=wires), self.biases[0]
        raw = "_raw" if self.qk_norm else ""
        return (
            Linear(f"{module}.q", self.reads, wire(f"query{raw}"), bias),
            Linear(f"{module}.k", keys or self.reads, wire(f"key{raw}"), bias),
            Linear(f"{module}.v", keys or self.reads, wire("value"), bias),
            *(self._head_norm(module, wires, part) for part in ("query", "key") if raw),
        )

    def _head_norm(self, module: str, wires: str, part: str) -> Norm:
        raw, out, gain = (self.wire(f"{part}{what}", wires) for what in ("_raw", "", "_gain"))
        if self.qk_norm == "unit":
            gain = "retention.head" if wires == "retention" else "head"
        return Norm(f"{module}.{part[0]}_norm", raw, out, gain, "rms", self.eps, per=self.qk_norm)

    def feed_forward(self, mlp: str = "mlp", wire: str = "ffn") -> tuple[Op, ...]:
        """mlp: its name; wire: that of its neurons."""
        module, ffn, bias = self.module(mlp), self.wire(wire), self.biases[2]
        gate = (Linear(f"{module}.gate", self.reads, ffn, bias),) if self.gated else ()
        return (
            *gate,
            Linear(f"{module}.up", self.reads, ffn, bias),
            Pointwise((ffn,)),
            Linear(f"{module}.down", ffn, self.writes, bias),
        )

    def head(self, tied: bool, bias: bool = False, scale: float = 1.0) -> tuple[Op, ...]:
        """The words' logits. scale: of a tied one."""
        if tied:
            return (Tied("head", "embed", "final", "vocab", bias, scale),)
        return (Linear("head", "final", "vocab", bias),)


def decoder(
    frame: Frame,
    *,
    vocab: int,
    layers: int,
    tied: bool,
    eps: float,
    init_std: float,
    positions: int = 0,
    embed_scale: float = 1.0,
) -> Architecture:
    """A language model: an embedding, layers, a last norm, a head."""
    ops = [Table("embed", "vocab", "residual", embed_scale)]
    if positions:
        ops.append(Table("positions", "positions", "residual"))
    ops += [frame.norm("norm", "residual", "final", "final_gain"), *frame.head(tied)]
    fixed = {"vocab": Wire(vocab, fixed=True), "positions": Wire(positions, fixed=True)}
    stacks = {"": Stack(("",) * layers, {"": frame.layer()})}
    return assembled(frame.wires() | fixed, ops, stacks, {frame.eps: eps}, init_std)


def assembled(
    wires: Mapping[str, Wire],
    ops: Iterable[Op],
    stacks: Mapping[str, Stack],
    eps: Mapping[str, float],
    init_std: float,
) -> Architecture:
    """With the wires that these ops name, and no others."""
    model = Architecture(wires, tuple(ops), stacks, eps, init_std)
    named = {wire for op in model.all_ops for wire in _wires(op)}
    return replace(model, wires={name: wire for name, wire in wires.items() if name in named})


def _wires(op: Op) -> Iterable[str]:
    for weight in op.weights():
        yield from weight.wires
    for role in ("reads", "writes", "query", "key", "value", "mixed", "logits"):
        yield getattr(op, role, "")
    yield from getattr(op, "wires", ())
    yield from getattr(op, "along", ())
