"""Mango: one multi-linear map for the matrices of all layers.  Pan et al., NeurIPS 2023 (arXiv 2310.10699).

Every block is cut into slots of D x D: queries, keys, values, outputs, and as many parts of each side of the
feed-forward block as it is times wider than the stream. A new slot is a mix of every slot of every layer,
widened on both sides; the map is a ring of four cores: layers, slots, what is read, what is written.

    new[l', b'] = sum_rst  O[s, t] (sum_lb K[t, r, l', b', l, b] W[l, b]) I[r, s]ᵀ
    K[t, r, l', b', l, b] = sum_u  L[t, u, l', l] B[u, r, b', b]

The two width cores serve all slots of all layers, so few numbers learn. At the start B keeps each slot, O
copies units as Net2Net does, I reads the originals, and added layers write nothing: the function is preserved
where Net2Net preserves it, where the width grows by a whole factor. That added layers have an inside and yet
write nothing takes two terms between L and B; elsewhere the ring has `rank` terms, 1 in the paper. What is no
slot: O[0, 0] writes vectors and embeddings, I[0, 0] reads for an untied head and writes the last norm of a
tied one; the vectors of each kind have a depth matrix of their own.

Of a run of 400 steps, GPT-NeoX 3 x 64 to 4 x 96, five steps cost 1.4 % and save 54 % with that, Net2Net
without a step 56 (benchmarks/LOG.md).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from growth.architecture import Architecture
from growth.errors import refuse
from growth.maps import Maps, copies, round_robin
from growth.methods.copying import per_layer
from growth.methods.learning import Learning, refuse_several_kinds
from growth.methods.net2net import Net2Net
from growth.methods.option import option, refuse_below

if TYPE_CHECKING:
    from growth.learned.operator import Operator
    from growth.plan import Source


@dataclass(frozen=True)
class Mango(Learning):
    """One map for all layers' matrices, a ring of cores, learned from data.  Pan et al., NeurIPS 2023."""

    rank: int = option(1, "terms of the ring")
    noise: float = option(1.0, "how far copies differ, in units of the weights that read them")

    name: ClassVar[str] = "mango"

    def __post_init__(self):
        super().__post_init__()
        refuse_below("rank", self.rank, 1)
        refuse_below("noise", self.noise, 0.0)

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """What is made of what: every new unit is a mix of all old ones, every new layer of all old layers.

        Raises Refusal where a matrix of a layer is not a whole number of streams wide, the same before and
        after, and where layers or stacks of several kinds would be mixed.
        """
        refuse_several_kinds(self.name, old)
        D, T = (model.wires["residual"].size for model in (old, new))
        for name, weight in old.layered.items():
            if not weight.reads:
                continue
            for wire in weight.wires:
                F, G = old.wires[wire].size, new.wires[wire].size
                if F % D or F * T != G * D:
                    what = "ffn-size" if "ffn" in wire else name.replace("{}", "*")
                    raise refuse(
                        what,
                        f"the same whole multiple of the hidden size, {D} and {T}, before and after",
                        f"{F} and {G}",
                        "choose method ligo" if F % D else "leave ffn-size out, or choose method ligo",
                    )
        maps = Net2Net(noise=0.0, order=self.order).maps(old, new)
        every = {
            name: copies(round_robin(wire.units, new.wires[name].units), wire, noise=self.noise)
            for name, wire in old.growing.items()
        }
        return replace(maps, wires=per_layer(new, every), mixed=frozenset(maps.depth))

    def operator(
        self, source: "Source", old: Architecture, new: Architecture, maps: Maps, seed: int
    ) -> "Operator":
        """What learns."""
        from growth.learned.ring import Ring

        return Ring(source, old, new, maps, rank=self.rank, seed=seed)
