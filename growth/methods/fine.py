"""FINE: factors that all layers share.  Xie et al., CVPR 2026 (arXiv 2409.19289).

    W[l] ~= U S[l] Vᵀ          new[i] = (write U) S'[i] (read V)ᵀ

Of each kind of matrix, such as the queries', U has the left singular vectors of all layers side by side,
[W[1] .. W[L]], V the right ones of all layers on top of each other, as many as `rank`; S[l] = Uᵀ W[l] V.
U and V are what layers have in common, S what each has of its own, r x r numbers. So a model of any depth and
width is U and V, widened by Net2Net's copies, and an S for each layer:

    added   idle      a layer beside the one whose S it has, but S = 0 where it writes the stream
            nearest   S of the layer at that height, 0 0 1 1 2 2
            linear    S in between those of the layers above and below

With `data`, S alone then learns for `steps` steps on the large model's own loss: copies stay copies, so that
what parts them (`noise`) stays unseen. The result is plain weights. What is no matrix of a layer, embeddings
and vectors, grows as in Net2Net.

Preserves the function where Net2Net does, at full rank, with idle layers and without learning. A lower rank
keeps as much of a kind as growth.json says: the error is that of all its layers, relative to their norm. The
paper trains the factors of one model for many; here they are taken from any that is trained. Of a run of 400
steps, GPT-NeoX 3 x 64 to 4 x 96, five steps at full rank cost 1.3 % and save 58 % with that
(benchmarks/LOG.md).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from growth.architecture import Architecture
from growth.depth import interpolated, with_identities
from growth.errors import refuse
from growth.maps import Maps, Row
from growth.methods.copying import per_layer, widened
from growth.methods.identities import identities, rearranged
from growth.methods.learning import Learning, refuse_several_kinds
from growth.methods.method import Learner
from growth.methods.option import option, refuse_below, refuse_other

if TYPE_CHECKING:
    from growth.growing import Growth
    from growth.learned.operator import Operator
    from growth.plan import Source

ADDED = ("idle", "nearest", "linear")


@dataclass(frozen=True)
class Fine(Learning):
    """Factors that all layers share, and one of each layer's own, which may learn.  Xie et al., CVPR 2026."""

    steps: int = option(0, "learning steps")
    rank: int | None = option(None, "columns of the shared factors", usual="all, which is exact")
    added: str = option("idle", "what added layers are: idle | nearest | linear")
    noise: float = option(1.0, "how far copies differ, in units of a fresh matrix")

    name: ClassVar[str] = "fine"
    least_steps: ClassVar[int] = 0

    def __post_init__(self):
        super().__post_init__()
        refuse_below("rank", self.rank, 1)
        refuse_below("noise", self.noise, 0.0)
        refuse_other("added", self.added, ADDED)
        if self.data is not None and not self.steps:
            raise refuse("steps", "at least 1 with data", self.steps, "say how many, or leave data out")
        if self.added == "linear" and self.order:
            raise refuse("order", "none, where added layers lie in between", self.order, "choose nearest")

    @property
    def learned(self) -> bool:
        """Is it anything but its maps? The product of all factors is the matrix that they are of."""
        return bool(self.steps or self.rank)

    def arranged(self, old: int, new: int) -> tuple[int, ...]:
        """The old layer of each new one, or the nearest."""
        return with_identities(old, new) if self.added == "idle" else interpolated(old, new)

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`. Raises Refusal where what is in between is of several kinds."""
        wires, constants = per_layer(new, widened(old, new, self.noise)), {}
        if self.added == "idle":
            depth, constants = identities(old, new, self.layers)
        else:
            depth = rearranged(old, new, self.layers)
        if self.added == "linear":
            refuse_several_kinds(self.name, old)
            (L,), (M,) = ([stack.layers for stack in model.stacks.values()] for model in (old, new))
            depth |= dict.fromkeys(matrices(old), between(L, M))
        maps = Maps(wires, depth, constants)
        return replace(maps, mixed=frozenset(matrices(old))) if self.learned else maps

    def learner(self, growth: "Growth") -> Learner:
        """The factors."""
        from growth.learned.factors import Factored

        return Factored(growth)

    def operator(
        self, source: "Source", old: Architecture, new: Architecture, maps: Maps, seed: int
    ) -> "Operator":
        """What learns. Raises Refusal where layers are not alike: they are not trained together."""
        refuse_several_kinds(self.name, old)
        from growth.learned.factors import Sigmas, factorised

        return Sigmas(maps, source, factorised(source, self.rank))


def matrices(model: Architecture) -> list[str]:
    """The matrices of layers."""
    return [name for name, weight in model.layered.items() if weight.reads]


def between(old: int, new: int) -> tuple[Row, ...]:
    """Row i is at i (old - 1) / (new - 1), between two old layers in proportion."""
    rows = []
    for i in range(new):
        j, rest = divmod(i * (old - 1), max(new - 1, 1))
        w = rest / max(new - 1, 1)
        rows.append(((j, 1.0),) if not rest else ((j, 1.0 - w), (j + 1, w)))
    return tuple(rows)
