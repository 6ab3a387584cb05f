"""Mango's ring of cores, and the small model that it enlarges (growth.methods.mango has the equations)."""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from growth.architecture import Architecture, Tied, Weight
from growth.expand import named_seed
from growth.learned.maps import depth_matrix
from growth.learned.operator import Operator, exactly, key
from growth.learned.starts import parted
from growth.maps import Maps
from growth.methods.copying import tied_factors
from growth.plan import Source
from lcikernels import kronecker_expand

INSIDE, WRITES = 0, 1  # the terms between L and B: slots inside a block, slots that write to the stream
UNUSED = 0.1  # of cores whose terms another core holds at zero: how long their rows are


class Ring(Operator):
    """The cores and the small model that they enlarge.

    read, write [R, R, T, D]  layers [R, 2, L', L]  slots [2, R, B, B], as I, O, L and B in
    growth.methods.mango.

    start: what Mango.maps gives, with the order of its layers.
    """

    def __init__(
        self,
        source: Source,
        old: Architecture,
        new: Architecture,
        start: Maps,
        *,
        rank: int = 1,
        seed: int = 0,
    ):
        super().__init__(source)
        D = old.wires["residual"].size
        # What a tied head reads is not written: it is read from the copies of the table, which may be scaled.
        factors = {op.reads: 1.0 for op in old.ops if isinstance(op, Tied)} | tied_factors(old, new)
        gains = {norm.gain: factors[norm.writes] for norm in old.norms if norm.writes in factors}
        self.read_by_table = factors | gains
        self.fixed = {name for name, wire in old.wires.items() if wire.fixed}
        self.constants = start.constants
        self.where: dict[str, range] = {}  # the slots of each matrix
        self.rows: dict[str, bool] = {}  # are they its rows, or its columns?
        stacks, B = [], 0
        for name, weight in old.layered.items():
            if not weight.reads:
                continue
            x = self.small(weight)
            parts = x[0].numel() // D**2
            self.where[name] = range(B, B + parts)
            self.rows[name] = "{}" in weight.wires[0]
            cut = "l (b d) e -> l b d e" if self.rows[name] else "l d (b e) -> l b d e"
            stacks.append(rearrange(x, cut, b=parts))
            delattr(self, key(name))
            B += parts
        self.register_buffer("old", torch.cat(stacks, 1), persistent=False)  # [L, B, D, D]
        generator = torch.Generator().manual_seed(named_seed(seed, "mango"))
        stream = start.wires.get("normed") or start.wires.get("residual")
        if stream is None:
            read, write = torch.eye(D), torch.eye(D)
        else:
            read, write = parted(stream, generator)
        ring = {
            "read": _core(read, rank),
            "write": _core(write, rank, generator),
            "layers": torch.zeros(rank, 2, new.layers, old.layers),
            "slots": torch.randn(2, rank, B, B, generator=generator) * UNUSED / math.sqrt(B),
        }
        ring["slots"][:, 0] = 0
        for name, slots in self.where.items():
            term = INSIDE if self.rows[name] else WRITES
            ring["layers"][0, term] = depth_matrix(start.depth[name], old.layers)
            ring["slots"][term, 0, list(slots), list(slots)] = 1.0
        self.ring = nn.ParameterDict(ring)
        depth = {name: rows for name, rows in start.depth.items() if name not in self.where}
        self.depth = nn.ParameterDict(
            {key(name): depth_matrix(rows, old.layers).float() for name, rows in depth.items()}
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
                if constants := self.constants.get(weight.name):
                    x = x + constants[layer]
            for axis, wire in enumerate(weight.wires):
                if wire in self.fixed:
                    continue
                if weight.reads and axis == len(weight.wires) - 1:
                    x = x @ self.ring["read"][0, 0].T
                else:
                    core = self.ring["read" if wire in self.read_by_table else "write"][0, 0]
                    units = x.movedim(axis, 0).unflatten(0, (-1, core.shape[1]))  # neurons are several parts
                    x = torch.einsum("td, bd... -> bt...", core, units).flatten(0, 1).movedim(0, axis)
                    x = x / self.read_by_table.get(wire, 1.0)
            return x

    def matrix(self, weight: Weight) -> Tensor | None:
        if weight.wires[-1] in self.fixed:
            return None
        return self.ring["read" if weight.reads else "write"][0, 0]


def _core(first: Tensor, rank: int, generator: torch.Generator | None = None) -> Tensor:
    """[R, R, T, D] with `first` at [0, 0]; elsewhere random numbers, or zeros without a generator."""
    shape = (rank, rank, *first.shape)
    core = torch.zeros(shape) if generator is None else torch.randn(shape, generator=generator)
    core *= UNUSED / math.sqrt(first.shape[1])
    core[0, 0] = first
    return core
