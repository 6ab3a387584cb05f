"""Dense maps, those whose tensors learn among them, and the operator that applies them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growth import apply
from growth.architecture import Architecture, Weight
from growth.errors import refuse
from growth.expand import part_copies
from growth.learned.operator import Operator, exactly, key
from growth.maps import Copies, Maps, Row
from growth.plan import Source
from lcikernels import kronecker_expand


@dataclass(frozen=True)
class Widen:
    """Dense maps: write_matrix [T, S] and read_matrix [T, S]."""

    write_matrix: Tensor
    read_matrix: Tensor
    noise: float = 0.0

    def write(self, x: Tensor) -> Tensor:
        return self.write_matrix.to(x.dtype) @ x

    def read(self, x: Tensor) -> Tensor:
        return x @ self.read_matrix.to(x.dtype).T

    def unseen(self, r: Tensor) -> Tensor:
        return r - (r @ self.write_matrix.to(r.dtype)) @ self.read_matrix.to(r.dtype).T


class Added(nn.Module):
    """The old units as they are and new ones among them: write = scale [I; written], read = [kept; taken].

    written, taken [T - S, S], in float32; taken is None where nothing reads the wire, and written learns
    nothing where no weight writes it. place [T]: where the rows of [old; new] go, None where the new ones
    come last. kept [S]: of the old units, what readers still take, all of them unless given. parting: the
    copies that it started as, whose noise is added to what layers read it by.
    """

    noise = 0.0

    def __init__(
        self,
        written: Tensor,
        taken: Tensor | None,
        scale: float = 1.0,
        place: Tensor | None = None,
        is_written: bool = True,
        kept: Tensor | None = None,
        parting: Copies | None = None,
    ):
        super().__init__()
        self.scale, self.parting = scale, parting
        if is_written:
            self.written = nn.Parameter(written.float())
        else:
            self.register_buffer("written", written.float(), persistent=False)
        self.taken = (
            self.written if taken is written else None if taken is None else nn.Parameter(taken.float())
        )
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("kept", None if kept is None else kept.float(), persistent=False)

    def write(self, x: Tensor) -> Tensor:
        return self.scale * self.placed(torch.cat([x, self.written.to(x.dtype) @ x]), 0)

    def read(self, x: Tensor) -> Tensor:
        if self.taken is None:
            return self.placed(torch.cat([x, x.new_zeros(*x.shape[:-1], len(self.written))], -1), -1)
        return self.placed(self.shared(torch.cat([x, x @ self.taken.to(x.dtype).T], -1)), -1)

    def shared(self, x: Tensor) -> Tensor:
        """A reader's columns [old; new], all of the old ones, with what it keeps of these."""
        if self.kept is None:
            return x
        return x * F.pad(self.kept, (0, len(self.written)), value=1.0).to(x.dtype)

    def placed(self, x: Tensor, axis: int) -> Tensor:
        """[old; new] along an axis, in the order of the wide wire."""
        return x if self.place is None else x.index_select(axis, self.place)

    def dense(self) -> Widen:
        eye = torch.eye(self.written.shape[1]).to(self.written)
        return Widen(self.write(eye), self.read(eye).T)

    def unseen(self, r: Tensor) -> Tensor:
        return self.dense().unseen(r)


def dense(of: Copies | Added | Widen, size: int) -> Widen:
    """The matrices of any map of a wire of `size` entries."""
    if isinstance(of, Widen):
        return of
    if isinstance(of, Added):
        return of.dense()
    eye = torch.eye(size, dtype=torch.float64)
    return Widen(apply.write(of, eye), apply.read(of, eye).T, of.noise)


def depth_matrix(rows: Sequence[Row], old: int) -> Tensor:
    """A depth matrix [L_new, L_old]."""
    out = torch.zeros(len(rows), old, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, w in row:
            out[i, j] = w
    return out


def chosen(old: Architecture, maps: Maps, patterns: Collection[str]) -> list[str]:
    """The names of the maps that `patterns` fit: write.WIRE, read.WIRE, depth.WEIGHT, such as read.ffn.*.

    Raises Refusal where a pattern fits none.
    """
    grown = {name: of for name, of in maps.wires.items() if isinstance(of, Added) and len(of.written)}
    names = [f"write.{name}" for name, of in grown.items() if isinstance(of.written, nn.Parameter)]
    names += [f"read.{name}" for name, of in grown.items() if of.taken is not None]
    names += [f"depth.{name}" for name, rows in maps.depth.items() if len(rows) > _layers(old, name)]
    for pattern in patterns:
        if not matching(names, pattern):
            kinds = ", ".join(sorted({f"{name.partition('.')[0]}.*" for name in names}))
            raise refuse("learn", f"patterns of maps: {kinds}", pattern, f"such as {names[0]}")
    return [name for name in names if any(matching([name], pattern) for pattern in patterns)]


def _layers(old: Architecture, weight: str) -> int:
    return old.stack_of(weight)[1].layers


class LearnedMaps(Operator):
    """Maps whose tensors are parameters, and the small model that they enlarge.

    The maps are taken over as they are: a second one takes them from the first.

    learn: patterns, as for `chosen`; where maps are tied, one name is enough. seed: of what parts copies.
    """

    def __init__(self, maps: Maps, source: Source, learn: Collection[str] = ("*",), seed: int = 0):
        super().__init__(source)
        self.std, self.seed = source.model.architecture.init_std, seed
        old = source.model.architecture
        self.start = maps
        self.wires = nn.ModuleDict({key(name): x for name, x in maps.wires.items() if isinstance(x, Added)})
        self.depth = nn.ParameterDict(
            {key(name): depth_matrix(rows, _layers(old, name)).float() for name, rows in maps.depth.items()}
        )
        self.requires_grad_(False)
        for name in chosen(old, maps, learn):
            kind, _, of = name.partition(".")
            side = {"write": "written", "read": "taken"}.get(kind)
            tensor = getattr(maps.wires[of], side) if side else self.depth[key(of)]
            tensor.requires_grad_()
        self.copied: Mapping[str, list[int | None]] = {
            name: [row[0][0] if [w for _, w in row] == [1.0] else None for row in rows]
            for name, rows in maps.depth.items()
            if not self.depth[key(name)].requires_grad
        }

    def matrix(self, weight: Weight) -> Tensor | None:
        of = self.start.wires.get(weight.wires[-1])
        if of is None:
            return None
        small = self.small(weight)
        made = dense(of, small.shape[-1])
        return (made.read_matrix if weight.reads else made.write_matrix).to(small)

    def wide(self, weights: Sequence[Weight], layer: int | None) -> list[Tensor]:
        return [self._parted(self._one(weight, layer), weight, layer) for weight in weights]

    def _parted(self, x: Tensor, weight: Weight, layer: int | None) -> Tensor:
        """With the noise that readers in layers cannot see; numbers from the CPU, alike on every device."""
        of = self.start.of(weight.wires[-1], layer) if weight.reads and layer is not None else None
        if not isinstance(of, Added) or of.parting is None:
            return x
        where = weight.name, layer, x.device
        noise = self.drawn.get(where)
        if noise is None:
            noise = torch.zeros(x.shape)
            part_copies(noise, of.parting, weight, layer, self.std, self.seed)
            noise = noise.to(x.device)
            if self.keeps:
                self.drawn[where] = noise
        return x + noise.to(x.dtype)

    def _one(self, weight: Weight, layer: int | None) -> Tensor:
        maps = [self.start.of(wire, layer) for wire in weight.wires]
        x, depth = self.small(weight), None
        if layer is not None:
            x, depth = self._mixing(weight.name, layer)
            if weight.reads and all(isinstance(of, Widen) for of in maps):
                sides = maps[0].write_matrix.to(x.dtype), maps[1].read_matrix.to(x.dtype)
                return kronecker_expand(x, *sides, depth)[0]
            if weight.reads and all(of is None or isinstance(of, Added) for of in maps):
                sides = (
                    x.new_empty(0, size) if of is None else getattr(of, side).to(x.dtype)
                    for of, side, size in zip(maps, ("written", "taken"), x.shape[1:], strict=True)
                )
                made = kronecker_expand(x, *sides, depth, added=True)[0]
                made = made if maps[1] is None else maps[1].shared(made)
                for axis, of in enumerate(maps):
                    made = made if of is None else of.placed(made, axis)
                return made if maps[0] is None or maps[0].scale == 1 else made * maps[0].scale
        with exactly(x):
            if layer is not None:
                x = x[0] if depth is None else torch.tensordot(depth[0], x, 1)
                if constants := self.start.constants.get(weight.name):
                    x = x + constants[layer]
            for axis, of in enumerate(maps):
                if of is not None and weight.reads and axis == len(maps) - 1:
                    x = apply.read(of, x)
                elif of is not None:
                    x = apply.write(of, x, axis)
            return x

    def _mixing(self, name: str, layer: int) -> tuple[Tensor, Tensor | None]:
        """The old layers [L, ...] that a new one is a mix of, its row of depth [1, L] or None for a copy."""
        old, depth = getattr(self, key(name)), self.depth[key(name)]
        old = self.held(name) if old.ndim == 3 else old  # norms and biases stay in float32
        if name in self.copied and (j := self.copied[name][layer]) is not None:
            return old[j : j + 1], None
        return old, depth[layer : layer + 1].to(old.dtype)
