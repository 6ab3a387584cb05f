"""LiGO: learn how to grow.  Wang et al., ICLR 2023 (arXiv 2303.00980).

    new[i] = B (sum_j w[i, j] W[j]) Aᵀ          B = [I; C] writes, A = [k; C'] reads, w = depth, mixed first

The units of the source stay, new ones are mixes of them: C, C' and w are trained for a few steps on the large
model's own loss, the source's weights stay as they are, and so does k, the share that readers keep of a unit
with copies. Queries, keys, values and neurons have a map per target layer, each weight has its own depth
coefficients; what does not grow has nothing to learn. What LEMON scales, gains, is written by a scaled B.

Of each kind of weight, all layers and all entries as one vector, that is

    vec(new) = blockdiag(B[1] (x) A[1], .., B[L'] (x) A[L']) (w (x) I) vec(old)

and w (x) I = Q blockdiag(w, .., w) P, with permutations P, Q between layers first and entries first: a
product of block-diagonal factors and permutations, as Monarch matrices are (Dao et al., ICML 2022). From L
layers of m x n to L' of M x N the factors hold L' M N m n + L L' m n numbers instead of L L' M N m n. The
paper, with maps for each old layer, widens first: (w (x) I) blockdiag(A[1] (x) B[1], ..).

    starts   lossless    LEMON's model, with its noise in what readers do not see: step 0 computes what the
                         source does, then the maps go where the loss leads
             net2net     the same from Net2Net's maps: close to the source where lossless is impossible
             published   rows of C random with sum 1; depth: stacking plus noise, rows with sum 1
    ties     published   A = B of the producer, one for all of the residual stream. Preserves nothing: readers
                         see each channel more than once.
             untied      A and B apart, for every wire

A step costs what a training step of the large model does, of as many examples, where memory holds what it
makes (`remake`), else more. Of a run of 400 steps, GPT-NeoX 3 x 64 to 4 x 96, five steps cost 1.3 %
and save 56 to 60 % with that, LEMON without a step 52 to 61 (benchmarks/LOG.md).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from growth.architecture import Architecture
from growth.depth import stacked, with_identities
from growth.errors import refuse
from growth.maps import Maps
from growth.methods.learning import Learning, refuse_several_kinds
from growth.methods.lemon import Lemon
from growth.methods.net2net import Net2Net
from growth.methods.option import option, refuse_below, refuse_other

if TYPE_CHECKING:
    from growth.learned.operator import Operator
    from growth.plan import Source

PRESERVING = {"lossless": Lemon, "net2net": Net2Net}
STARTS = (*PRESERVING, "published")
TIES = ("published", "untied")


@dataclass(frozen=True)
class Ligo(Learning):
    """New units and layers as mixes of the old ones, learned from data.  Wang et al., ICLR 2023.

    learn: patterns of the maps that learn, write.WIRE, read.WIRE, depth.WEIGHT, such as read.ffn.*; WIRE in a
    layer has its number, ffn.3; WEIGHT is a name of `growth inspect`.
    """

    start: str = option("lossless", "where learning starts: lossless | net2net | published")
    ties: str | None = option(
        None, "readers and producers: published (one map) | untied; default: as the start needs"
    )
    learn: tuple[str, ...] = option(("*",), "maps that learn, such as depth.*; may be repeated")
    noise: float = option(1.0, "how far copies differ, in units of a fresh matrix")

    name: ClassVar[str] = "ligo"

    def __post_init__(self):
        super().__post_init__()
        refuse_below("noise", self.noise, 0.0)
        refuse_other("start", self.start, STARTS)
        refuse_other("ties", self.ties, TIES)
        if not self.learn or not all(isinstance(x, str) for x in self.learn):
            got = ", ".join(map(str, self.learn)) or "none"
            raise refuse("learn", "maps that learn", got, "leave it out for all of them")

    def __str__(self) -> str:
        return f"{self.name} from its {self.start} start"

    @property
    def tied(self) -> bool:
        """Are readers tied to producers?"""
        return (self.ties or ("published" if self.start == "published" else "untied")) == "published"

    def arranged(self, old: int, new: int) -> tuple[int, ...]:
        """The old layer that each of `new` layers has most of at the start."""
        return stacked(old, new) if self.start == "published" else with_identities(old, new)

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps that learning starts from.

        Raises Refusal where preserving maps are to be tied, for readers of a unit and of its copies see it
        twice, where none is lossless and that is asked for, and where `learn` fits nothing.
        """
        refuse_several_kinds(self.name, old)
        from growth.learned import starts  # torch, which the command line's --help does not wait for

        if self.start == "published":
            return starts.published(old, new, self.layers, self.tied, self.learn, seed)
        maps = PRESERVING[self.start](noise=self.noise, order=self.order).maps(old, new)
        if self.tied and maps.wires:
            got = "published, and a width that grows"
            raise refuse(
                "ties", f"untied in the {self.start} start", got, "choose start published, or untied"
            )
        return starts.preserving(old, new, maps, self.learn, seed, must=self.start == "lossless")

    def operator(
        self, source: "Source", old: Architecture, new: Architecture, maps: Maps, seed: int
    ) -> "Operator":
        """What learns."""
        from growth.learned.maps import LearnedMaps

        return LearnedMaps(maps, source, self.learn, seed)
