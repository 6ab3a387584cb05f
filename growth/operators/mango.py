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
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from growth.engine import named_seed
from growth.errors import refuse
from growth.learning import Operator, exactly, key
from growth.maps import Maps, learned
from growth.operators.ligo import added
from growth.operators.net2net import net2net
from growth.plan import Source
from growth.spaces import FIXED, Architecture, Weight
from lcikernels import kronecker_expand

INSIDE, WRITES = 0, 1  # the terms between L and B: slots inside a block, slots that write to the stream
UNUSED = 0.1  # of cores whose terms another core holds at zero: how long their rows are


def mango(old: Architecture, new: Architecture, *, rank: int = 1) -> Maps:
    """What is made of what: every new unit is a mix of all old ones, every new layer of all old layers.

    Raises Refusal where rank is below 1, or a feed-forward block is not a whole number of streams wide, the
    same before and after.
    """
    if rank < 1:
        raise refuse("rank", "at least 1", rank, "the paper's is 1")
    (D, T), (F, G) = ([x.spaces[name].size for x in (old, new)] for name in ("residual", "ffn.{}"))
    if F % D or F * T != G * D:
        raise refuse(
            "ffn-size",
            f"the same whole multiple of the hidden size, {D} and {T}, before and after",
            f"{F} and {G}",
            "choose method ligo" if F % D else "leave ffn-size out, or choose method ligo",
        )
    maps = net2net(old, new, noise=0.0)
    stream = maps.spaces["normed"].dense()
    spaces = {name: x if name in FIXED else stream for name, x in maps.spaces.items()}
    return replace(maps, spaces=spaces, depth=learned(maps.depth, maps.depth))


def slotted(old: Architecture) -> list[Weight]:
    """The matrices of the layers."""
    return [weight for weight in old.weights if weight.layered and len(weight.spaces) == 2]


class Mango(Operator):
    """The cores and the small model that they enlarge.

    read, write [R, R, T, D]  layers [R, 2, L', L]  slots [2, R, B, B], as I, O, L and B above; of sizes that
    `mango` takes.
    """

    def __init__(self, source: Source, old: Architecture, new: Architecture, *, rank: int = 1, seed: int = 0):
        super().__init__(source)
        D, self.tied = old.spaces["residual"].size, old.tied
        self.start = net2net(old, new, noise=0.0)
        self.where: dict[str, range] = {}  # the slots of each matrix
        self.rows: dict[str, bool] = {}  # are they its rows, or its columns?
        stacks, B = [], 0
        for weight in slotted(old):
            x = self.small(weight)
            parts = x[0].numel() // D**2
            self.where[weight.name] = range(B, B + parts)
            self.rows[weight.name] = weight.spaces[0] != "residual"
            cut = "l (b d) e -> l b d e" if self.rows[weight.name] else "l d (b e) -> l b d e"
            stacks.append(rearrange(x, cut, b=parts))
            delattr(self, key(weight.name))
            B += parts
        self.register_buffer("old", torch.cat(stacks, 1), persistent=False)  # [L, B, D, D]
        generator = torch.Generator().manual_seed(named_seed(seed, "mango"))
        stream = self.start.spaces["normed"]
        stream = (stream if stream.same else added(stream, True, generator)).dense()
        ring = {
            "read": _core(stream.read_matrix, rank),
            "write": _core(stream.write_matrix, rank, generator),
            "layers": torch.zeros(rank, 2, new.layers, old.layers),
            "slots": torch.randn(2, rank, B, B, generator=generator) * UNUSED / math.sqrt(B),
        }
        ring["slots"][:, 0] = 0
        for name, slots in self.where.items():
            term = INSIDE if self.rows[name] else WRITES
            ring["layers"][0, term] = self.start.depth[name]
            ring["slots"][term, 0, list(slots), list(slots)] = 1.0
        self.ring = nn.ParameterDict(ring)
        self.depth = nn.ParameterDict(
            {key(name): x.float() for name, x in self.start.depth.items() if name not in self.where}
        )

    def wide(self, weights: Sequence[Weight], layer: int | None) -> list[Tensor]:
        slots = [weight for weight in weights if weight.name in self.where]
        made = self._slots(slots, layer) if slots else {}
        return [made[w.name] if w.name in made else self._other(w, layer) for w in weights]

    def _slots(self, weights: Sequence[Weight], layer: int) -> dict[str, Tensor]:
        """The matrices of one layer: all their slots from one call for each term of the ring."""
        read, write, layers, mix = (self.ring[name] for name in ("read", "write", "layers", "slots"))
        wanted = [b for weight in weights for b in self.where[weight.name]]
        K = torch.einsum("tul, urcb -> trclb", layers[:, :, layer], mix[:, :, wanted])
        R, old = len(K), self.held("old").flatten(0, 1)
        made = sum(
            kronecker_expand(old, *(x.to(old.dtype) for x in (write[s, t], read[r, s], K[t, r].flatten(1))))
            for r in range(R)
            for s in range(R)
            for t in range(R)
        )
        parts = made.split([len(self.where[weight.name]) for weight in weights])
        whole = {True: "b d e -> (b d) e", False: "b d e -> d (b e)"}
        return {w.name: rearrange(x, whole[self.rows[w.name]]) for w, x in zip(weights, parts, strict=True)}

    def _other(self, weight: Weight, layer: int | None) -> Tensor:
        x = self.small(weight)
        with exactly(x):
            if layer is not None:
                x = torch.tensordot(self.depth[key(weight.name)][layer], x, 1)
                if weight.name in self.start.constants:
                    x = x + float(self.start.constants[weight.name][layer])
            if (core := self.matrix(weight, 0)) is not None:
                units = x.unflatten(0, (-1, core.shape[1]))  # neurons are as many parts as their matrices
                x = torch.einsum("td, bd... -> bt...", core, units).flatten(0, 1)
            if x.ndim == 2 and (core := self.matrix(weight, 1)) is not None:
                x = x @ core.T
            return x

    def matrix(self, weight: Weight, axis: int) -> Tensor | None:
        if weight.spaces[axis] in FIXED:
            return None
        shared = self.tied and weight.spaces[axis] in ("final", "final_gain")
        return self.ring["read" if axis or shared else "write"][0, 0]


def _core(first: Tensor, rank: int, generator: torch.Generator | None = None) -> Tensor:
    """[R, R, T, D] with `first` at [0, 0]; elsewhere random numbers, or zeros without a generator."""
    shape = (rank, rank, *first.shape)
    core = torch.zeros(shape) if generator is None else torch.randn(shape, generator=generator)
    core *= UNUSED / math.sqrt(first.shape[1])
    core[0, 0] = first
    return core
