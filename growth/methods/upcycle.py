"""Sparse upcycling: a mixture of experts out of a trained model.  Komatsuzaki et al., ICLR 2023 (2212.05055).

    expert e       the feed-forward block, whole; with a granularity G (He et al. 2024, 2410.07524) its shard
                   e mod G of F / G neurons: `experts` x G experts stand there, of which `top_k` x G count
    router         rows of N(0, router_std^2), each G times in a row: the shards of a block count together
    down           times G, for each shard of a block counts for a G-th of its weight
    all else       copied; with `every` above 1 only each so many-th layer becomes sparse

Weights that sum to one over the experts that count (Mixtral; norm_topk_prob in Qwen's, which is set) give the
dense model's output, whichever experts the router chooses. He et al. spread G as its cube root over gate, up
and down, which keeps the output to first order only, for silu is not homogeneous; all of it in down keeps it,
and a power of two rounds nothing. Qwen2-MoE has an expert that every token has: of one neuron here, the
fewest with which no tensor is empty, which writes zero at first.

Of a mixture of E experts it makes one of c E (orthogonal growth, for c = 2): expert e and its row of the
router copy those of e mod E. With c times as many that count, the copies of those that counted do, each at a
c-th of the weight: the output stays.

Not lossless with noise, which tells all but the first of the copies apart by so much of each matrix's
deviation (default: 0.01 for a mixture, none for a block, whose copies the router parts by itself), nor where
another share of a mixture's experts counts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from growth.architecture import Architecture, Experts
from growth.depth import rows
from growth.errors import refuse
from growth.maps import Copies, Drawn, Maps, copies
from growth.methods.method import Method
from growth.methods.option import option, refuse_below, refuse_other, refuse_other_types

FORMATS = ("mixtral", "qwen2_moe", "qwen3_moe")
PARTS = ("gate", "up", "down")
STD = 0.02


@dataclass(frozen=True)
class Upcycle(Method):
    """A mixture of experts out of a dense model, or one of more experts.  Komatsuzaki et al., ICLR 2023."""

    experts: int | None = option(None, "experts, each of a whole block; default: 8, or twice a mixture's")
    top_k: int | None = option(None, "experts that count for a token; default: 2, or a mixture's share")
    granularity: int = option(1, "shards that each block is cut into, every one an expert")
    router_std: float | None = option(None, f"deviation of a new router's rows; default: {STD}")
    format: str | None = option(None, " | ".join(FORMATS) + "; default: what the family becomes")
    noise: float | None = option(
        None, "how far copies differ, in deviations of what they copy", usual="0, a mixture's 0.01"
    )
    every: int = option(1, "one layer of so many becomes sparse")

    name: ClassVar[str] = "upcycle"
    sparse: ClassVar[bool] = True
    grows: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        for name in ("experts", "top_k", "granularity", "every"):
            flag, got = name.replace("_", "-"), getattr(self, name)
            if got is not None and type(got) is not int:
                raise refuse(flag, "a whole number", repr(got), "give it as an int")
            refuse_below(flag, got, 1)
        refuse_other_types(self)
        if self.router_std is not None and not 0 < self.router_std < math.inf:
            remedy = "rows of zero would send every token to the same experts"
            raise refuse("router-std", "more than 0, and finite", self.router_std, remedy)
        refuse_below("noise", self.noise, 0.0)
        refuse_other("format", self.format, FORMATS)

    def told(self, old: Architecture) -> "Upcycle":
        """With what follows from the source where it is not said.

        Raises Refusal where a mixture's experts are no multiple of the source's, or more count than there
        are.
        """
        was = mixture_of(old)
        if was is None:
            experts = self.experts or 8
            known = replace(
                self,
                experts=experts,
                top_k=self.top_k or min(2, experts),
                router_std=self.router_std or STD,
                noise=self.noise or 0.0,
            )
        else:
            E = len(was.neurons)
            for flag, got, usual in (("granularity", self.granularity, 1), ("every", self.every, 1)):
                if got != usual:
                    raise refuse(flag, f"{usual}, for the source has experts", got, "leave it out")
            if self.router_std is not None:
                remedy = "leave it out"
                raise refuse("router-std", "none, for the router is copied", self.router_std, remedy)
            experts = self.experts or 2 * E
            if experts % E or experts == E:
                raise refuse("experts", f"a multiple of the source's {E}", experts, f"choose {2 * E}")
            known = replace(
                self,
                experts=experts,
                top_k=self.top_k or was.top_k * experts // E,
                noise=0.01 if self.noise is None else self.noise,
            )
        if known.top_k > known.experts:
            raise refuse("top-k", f"at most the {known.experts} experts", known.top_k, "choose fewer")
        return known

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`, whose options are told."""
        mixture, was = mixture_of(new), mixture_of(old)
        made_of = dict(self._origins(mixture, was))
        wires = self._cut(old, new, mixture) if was is None else _routed(old, new, mixture, was)
        drawn = {} if was else self._drawn(old, new, made_of)
        copied = self.granularity if was is None else len(was.neurons)  # the first copy of each
        parted = {}
        if self.noise:
            for e in range(copied, len(mixture.neurons)):
                parted |= {f"{mixture.name}.{e}.{part}.weight": self.noise for part in PARTS}
        L = old.layers
        names = ({*old.layered} | {*new.layered}) - {*drawn}
        depth = {name: rows(self.layers(L, L)) for name in sorted(names)}
        return Maps(wires, depth, made_of=made_of, drawn=drawn, parted=parted)

    def _origins(self, mixture: Experts, was: Experts | None) -> Iterator[tuple[str, str]]:
        """Of each expert's matrices, those that they are made of."""
        block = mixture.name.removesuffix(".experts")
        for e in range(len(mixture.neurons)):
            origin = f"{was.name}.{e % len(was.neurons)}" if was else block
            for part in PARTS:
                yield f"{mixture.name}.{e}.{part}.weight", f"{origin}.{part}.weight"

    def _cut(self, old: Architecture, new: Architecture, mixture: Experts) -> dict[str, Copies]:
        """Each expert's neurons out of the block's."""
        G = self.granularity
        if G == 1:
            return {}
        F = old.wires["ffn.{}"].size
        shards = [
            Copies(tuple(range(g * F // G, (g + 1) * F // G)), (float(G),) * (F // G), F) for g in range(G)
        ]
        return {
            wire.format(i): shards[e % G] for e, wire in enumerate(mixture.neurons) for i in range(new.layers)
        }

    def _drawn(self, old: Architecture, new: Architecture, made_of: dict[str, str]) -> dict[str, Drawn]:
        """The router, and an expert of all tokens that says nothing yet."""
        fresh = [name for name in new.layered if name not in old.layered and name not in made_of]
        std = {name: Drawn(new.init_std) for name in fresh}
        std |= {name: Drawn(0.0) for name in fresh if name.endswith(".shared.down.weight")}
        router = {name: Drawn(self.router_std, self.granularity) for name in fresh if ".router." in name}
        return std | router

    def lines(self, old: Architecture, new: Architecture) -> tuple[str, ...]:
        """What a report says of it."""
        mixture = mixture_of(new)
        (stack,) = new.stacks.values()
        sparse = sum(any(isinstance(op, Experts) for op in stack.blocks[kind]) for kind in stack.kinds)
        experts, layers = f"{mixture.top_k} of {len(mixture.neurons)} experts", stack.layers
        told = f"{experts} count, in {sparse} of {layers} layers"
        if "shared.ffn.{}" not in new.wires.keys() - old.wires.keys():
            return (told,)
        return told, "the class has an expert of all tokens: it has one neuron, and writes zero at first"


def mixture_of(model: Architecture) -> Experts | None:
    """The experts of its layers, if there are any: those of all layers are alike."""
    return next((op for op in model.all_ops if isinstance(op, Experts)), None)


def _routed(old: Architecture, new: Architecture, mixture: Experts, was: Experts) -> dict[str, Copies]:
    """The router's rows: every expert in turn."""
    E = len(was.neurons)
    index = tuple(e % E for e in range(len(mixture.neurons)))
    of = copies(index, old.wires[was.logits])
    return {mixture.logits.format(i): of for i in range(new.layers)}
