"""LiGO: learn how to grow.  Wang et al., ICLR 2023 (arXiv 2303.00980).

    new[i] = B (sum_j w[i, j] W[j]) Aᵀ          B = [I; C] writes, A = [I; C'] reads, w = depth, mixed first

The units of the source stay, new ones are mixes of them: C and w are trained for a few steps on the large
model's own loss, the source's weights stay as they are. Queries, keys, values and neurons have a map per
target layer, each weight has its own depth coefficients; what does not grow has nothing to learn. What LEMON
scales, gains, is written by a scaled B.

    starts   lossless    C from LEMON's maps, C' = 0: step 0 is the source, then they go where the loss leads.
                         Units that no map writes, and copies of one unit, are read at random, unseen.
             net2net     the same from Net2Net's maps: close to the source where lossless is impossible
             published   rows of C random with sum 1; depth: stacking plus noise, rows with sum 1
    ties     published   A = B of the producer, one for all of the residual stream. Preserves nothing: readers
                         see each channel more than once.
             untied      A and B apart, for every space
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import filter as matching

import torch
from torch import Tensor, nn

from growth.depth import rearranged, stacked
from growth.engine import named_seed
from growth.errors import refuse
from growth.learning import Operator, exactly, key
from growth.maps import Copies, Map, Maps, Widen, keep, learned, unchanged
from growth.operators.lemon import lemon
from growth.operators.net2net import net2net
from growth.plan import Source
from growth.spaces import FIXED, Architecture, Space, Weight
from lcikernels import kronecker_expand

PRESERVING = {"lossless": lemon, "net2net": net2net}
STARTS = (*PRESERVING, "published")
TIES = ("published", "untied")
TIES_OF = {"lossless": "untied", "net2net": "untied", "published": "published"}  # unless asked otherwise
STREAM = ("residual", "gain", "normed", "transform", "final_gain", "final")  # one map in the published ties
DEPTH_NOISE = 0.03
UNSEEN = 0.1  # the random part of a reader, relative to the weight that it is drawn from


class Added(nn.Module):
    """The old units as they are and new ones below: write = scale [I; written], read = [I; taken].

    written, taken [T - S, S], in float32; taken is None where nothing reads the space.
    """

    noise, same = 0.0, False

    def __init__(self, written: Tensor, taken: Tensor | None, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.written = nn.Parameter(written.float())
        self.taken = (
            self.written if taken is written else None if taken is None else nn.Parameter(taken.float())
        )

    def write(self, x: Tensor) -> Tensor:
        return self.scale * torch.cat([x, self.written.to(x.dtype) @ x])

    def read(self, x: Tensor) -> Tensor:
        if self.taken is None:
            return torch.cat([x, x.new_zeros(*x.shape[:-1], len(self.written))], -1)
        return torch.cat([x, x @ self.taken.to(x.dtype).T], -1)

    def dense(self) -> Widen:
        eye = torch.eye(self.written.shape[1]).to(self.written)
        taken = torch.zeros_like(self.written) if self.taken is None else self.taken
        return Widen(self.scale * torch.cat([eye, self.written]), torch.cat([eye, taken]))

    def unseen(self, r: Tensor) -> Tensor:
        return self.dense().unseen(r)


def ligo(
    old: Architecture, new: Architecture, *, start: str = "lossless", ties: str | None = None, seed: int = 0
) -> Maps:
    """The maps that learning starts from. ties: by default published in the published start, else untied.

    Raises Refusal where preserving maps are to be tied: readers of a unit and of its copies see it twice.
    """
    for name, got, known in (("start", start, STARTS), ("ties", ties, (None, *TIES))):
        if got not in known:
            raise refuse(name, f"one of {', '.join(filter(None, known))}", got, "choose one of these")
    ties = ties or TIES_OF[start]
    generator = torch.Generator().manual_seed(named_seed(seed, "ligo"))
    if start == "published":
        return _published(old, new, ties == "published", generator)
    S, T = (x.spaces["residual"].size for x in (old, new))
    if start == "lossless" and old.post_norm and T % S:
        expected = (
            f"net2net or published, for between whole factors of {S} no map of a post-norm model is lossless"
        )
        remedy = f"choose one of these, or hidden size {T // S * S + S}"
        raise refuse("start", expected, f"lossless, and a hidden size of {T}", remedy)
    maps = PRESERVING[start](old, new, noise=0.0)
    if ties == "published" and not all(space.same for space in maps.spaces.values()):
        got = "published, and a width that grows"
        raise refuse("ties", f"untied in the {start} start", got, "choose start published, or untied")
    read = _read(old)

    def grown(name: str, space: Copies) -> Map:
        return space if space.same else added(space, name.partition(".")[0] in read, generator)

    return replace(maps, spaces={name: grown(name, space) for name, space in maps.spaces.items()})


def added(space: Copies, is_read: bool, generator: torch.Generator) -> Added:
    """A map that duplicates, with readers that see the originals alone."""
    S = space.sources * space.width
    written = space.write(torch.eye(S, dtype=torch.float64))[S:]
    if isinstance(space.scale, Tensor):  # copies that share what a tied head reads: the originals keep it all
        written, scale = torch.zeros_like(written), 1.0
    else:
        written, scale = written / space.scale, float(space.scale)
    if not is_read:
        return Added(written, None, scale)
    below = replace(space, index=space.index[space.sources :], share=space.share[space.sources :])
    fresh = torch.randn(S, len(written), dtype=torch.float64, generator=generator) * UNSEEN / math.sqrt(S)
    return Added(written, below.unseen(fresh).T.contiguous(), scale)


def _published(old: Architecture, new: Architecture, tied: bool, generator: torch.Generator) -> Maps:
    read = _read(old)

    def averaged(kind: str, a: Space, b: Space) -> Map:
        if a == b:
            return keep(a)
        written = torch.rand(b.size - a.size, a.size, dtype=torch.float64, generator=generator)
        written /= written.sum(1, keepdim=True)
        return Added(written, None if kind not in read else written if tied else written.clone())

    spaces = unchanged(old)
    stream = averaged("normed", old.spaces["residual"], new.spaces["residual"])
    for name, space in old.spaces.items():
        if name in STREAM and tied:
            spaces[name] = stream
        elif name not in FIXED:
            for i in range(new.layers if "{}" in name else 1):
                spaces[name.format(i)] = averaged(name.partition(".")[0], space, new.spaces[name])
    depth = {}
    for weight in filter(lambda weight: weight.layered, old.weights):
        rows = depth[weight.name] = rearranged(stacked(old.layers, new.layers), old.layers)
        if new.layers > old.layers:
            rows += torch.rand(rows.shape, dtype=torch.float64, generator=generator) * DEPTH_NOISE
            rows /= rows.sum(1, keepdim=True)
    return Maps(spaces, depth)


def _read(old: Architecture) -> set[str]:
    """The kinds of spaces that a matrix reads."""
    return {weight.spaces[1].partition(".")[0] for weight in old.weights if len(weight.spaces) == 2}


def chosen(maps: Maps, patterns: Collection[str]) -> list[str]:
    """The names of the maps that `patterns` fit: write.SPACE, read.SPACE, depth.WEIGHT, such as read.ffn.*.

    SPACE is one of growth.spaces, in a layer with its number, ffn.3; WEIGHT is a name of `growth inspect`.
    Raises Refusal where a pattern fits none.
    """
    grown = {name: space for name, space in maps.spaces.items() if isinstance(space, Added)}
    names = [f"write.{name}" for name in grown]
    names += [f"read.{name}" for name, space in grown.items() if space.taken is not None]
    names += [f"depth.{name}" for name, rows in maps.depth.items() if len(rows) > rows.shape[1]]
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not matching(names, pattern):
            kinds = ", ".join(sorted({f"{name.partition('.')[0]}.*" for name in names}))
            raise refuse("learn", f"patterns of maps: {kinds}", pattern, f"such as {names[0]}")
    return [name for name in names if any(matching([name], pattern) for pattern in patterns)]


def planned(maps: Maps, learn: Collection[str]) -> Maps:
    """What is made of what when the maps of these names have learned."""
    depth = (name.removeprefix("depth.") for name in learn if name.startswith("depth."))
    return replace(maps, depth=learned(maps.depth, depth))


class LearnedMaps(Operator):
    """Maps whose tensors are parameters, and the small model that they enlarge.

    The maps are taken over as they are: a second one takes them from the first.

    learn: patterns, as for `chosen`; where maps are tied, one name is enough.
    """

    def __init__(self, maps: Maps, source: Source, learn: Collection[str] = ("*",)):
        super().__init__(source)
        self.start = maps
        self.spaces = nn.ModuleDict({key(name): x for name, x in maps.spaces.items() if isinstance(x, Added)})
        self.depth = nn.ParameterDict({key(name): x.float() for name, x in maps.depth.items()})
        self.requires_grad_(False)
        for name in chosen(maps, learn):
            kind, _, of = name.partition(".")
            side = {"write": "written", "read": "taken"}.get(kind)
            tensor = getattr(maps.spaces[of], side) if side else self.depth[key(of)]
            tensor.requires_grad_()
        self.copied = {
            name: [_copied(row) for row in rows.tolist()]
            for name, rows in maps.depth.items()
            if not self.depth[key(name)].requires_grad
        }

    def matrix(self, weight: Weight, axis: int) -> Tensor | None:
        space = self.start.spaces[weight.spaces[axis]]
        if space.same:
            return None
        dense = space.dense()
        return dense.read_matrix if axis else dense.write_matrix

    def wide(self, weights: Sequence[Weight], layer: int | None) -> list[Tensor]:
        return [self._one(weight, layer) for weight in weights]

    def _one(self, weight: Weight, layer: int | None) -> Tensor:
        spaces = [self.start.spaces[space.format(layer)] for space in weight.spaces]
        x = self.small(weight)
        if layer is not None:
            x, depth = self._mixing(weight.name, layer)
            if len(spaces) == 2 and all(isinstance(space, Widen) for space in spaces):
                maps = spaces[0].write_matrix.to(x.dtype), spaces[1].read_matrix.to(x.dtype)
                return kronecker_expand(x, *maps, depth)[0]
            if len(spaces) == 2 and all(space.same or isinstance(space, Added) for space in spaces):
                maps = (  # no matrix's space is scaled
                    x.new_empty(0, size) if space.same else getattr(space, side).to(x.dtype)
                    for space, side, size in zip(spaces, ("written", "taken"), x.shape[1:], strict=True)
                )
                return kronecker_expand(x, *maps, depth, added=True)[0]
        with exactly(x):
            if layer is not None:
                x = x[0] if depth is None else torch.tensordot(depth[0], x, 1)
                if weight.name in self.start.constants:
                    x = x + float(self.start.constants[weight.name][layer])
            x = spaces[0].write(x)
            return spaces[1].read(x) if x.ndim == 2 else x

    def _mixing(self, name: str, layer: int) -> tuple[Tensor, Tensor | None]:
        """The old layers [L, ...] that a new one is a mix of, its row of depth [1, L] or None for a copy."""
        old, depth = getattr(self, key(name)), self.depth[key(name)]
        old = self.held(name) if old.ndim == 3 else old  # norms and biases stay in float32
        if name in self.copied and (j := self.copied[name][layer]) is not None:
            return old[j : j + 1], None
        return old, depth[layer : layer + 1].to(old.dtype)


def _copied(row: list[float]) -> int | None:
    """The layer that a row of depth copies, None where it is a mix."""
    return row.index(1.0) if 1.0 in row and sum(map(abs, row)) == 1 else None
