"""How a space grows: what its producers write, what its readers read, and whether anything is lost.

    new = write . (sum_j depth[i, j] old[j]) . read^T

A pair is lossless iff read^T write = I: the readers of the wide space see exactly the narrow one. `Copies`
only duplicates units and is applied by indexing, so a checkpoint of any size streams through; `Widen` is a
pair of dense matrices, for maps that are learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from growth.spaces import FIXED, Architecture, Space


class Map(Protocol):
    """What the engine asks of a space's growth from S to T entries."""

    def write(self, x: Tensor) -> Tensor:
        """[S, ...] -> [T, ...]: the producer's rows."""

    def read(self, x: Tensor) -> Tensor:
        """[..., S] -> [..., T]: the reader's columns."""

    def unseen(self, r: Tensor) -> Tensor:
        """[..., T] -> [..., T]: the part of r that readers cannot see, r - r . write . read^T."""

    @property
    def noise(self) -> float:
        """Standard deviation, in units of a fresh matrix, of the unseen part that readers are given."""

    @property
    def same(self) -> bool:
        """The space did not grow."""

    def dense(self) -> Widen: ...


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

    @property
    def same(self) -> bool:
        return False

    def dense(self) -> Widen:
        return self


@dataclass(frozen=True)
class Copies:
    """Unit t of the wide space is a copy of unit index[t]; index -1 marks a unit of its own, which no reader
    sees.

    index [T units]; readers take `share[t]` of what they took from the original; a unit of its own is written
    as zero or as the mean of all units (`rest`), and all that is written is multiplied by `scale`, one number
    or one per unit. width: entries per unit.
    """

    index: Tensor
    share: Tensor
    sources: int
    width: int = 1
    rest: Literal["zero", "mean"] = "zero"
    scale: float | Tensor = 1.0
    noise: float = 0.0

    def _entries(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Entry-wise source index (0 where there is none) and the mask of entries that have one."""
        index = self.index.to(device)
        entries = (index[:, None] * self.width + torch.arange(self.width, device=device)).flatten()
        return entries.clamp(min=0), (index >= 0).repeat_interleave(self.width)

    def write(self, x: Tensor) -> Tensor:
        entries, copied = self._entries(x.device)
        out = x[entries]
        if (self.index < 0).any():
            out[~copied] = x.mean(0) if self.rest == "mean" else 0
        if isinstance(self.scale, Tensor):
            return out * self.scale.to(x).repeat_interleave(self.width).view(-1, *[1] * (x.ndim - 1))
        return out * self.scale

    def read(self, x: Tensor) -> Tensor:
        entries, copied = self._entries(x.device)
        share = self.share.to(x).repeat_interleave(self.width) * copied
        return x[..., entries] * share

    def unseen(self, r: Tensor) -> Tensor:
        entries, copied = self._entries(r.device)
        S = self.sources * self.width
        seen = r.new_zeros(*r.shape[:-1], S).index_add_(-1, entries, r * copied)  # r . write
        count = torch.bincount(entries[copied], minlength=S).to(r)
        return torch.where(copied, r - (seen / count)[..., entries], r)

    @property
    def same(self) -> bool:
        return torch.equal(self.index, torch.arange(self.sources))

    def dense(self) -> Widen:
        eye = torch.eye(self.sources * self.width, dtype=torch.float64)
        return Widen(self.write(eye), self.read(eye).T, self.noise)


def keep(space: Space) -> Copies:
    """The space does not grow."""
    return Copies(
        torch.arange(space.units), torch.ones(space.units, dtype=torch.float64), space.units, space.width
    )


def unchanged(old: Architecture) -> dict[str, Map]:
    """The maps of the spaces that no operator widens."""
    return {name: keep(space) for name, space in old.spaces.items() if name in FIXED}


def copies(old: Space, new: Space, *, noise: float = 0.0) -> Copies:
    """Copy units round-robin (0 1 2 0 1 ...); readers divide by the number of copies. Lossless."""
    if old == new:
        return keep(old)
    index = torch.arange(new.units) % old.units
    share = 1 / torch.bincount(index, minlength=old.units).double()[index]
    return Copies(index, share, old.units, old.width, noise=noise)


def per_layer(old: Architecture, new: Architecture, grown: Callable[[Space, Space], Map]) -> dict[str, Map]:
    """One map for every layer's own spaces, keyed by the layer's index in the target."""
    return {
        name.format(i): grown(space, new.spaces[name])
        for name, space in old.spaces.items()
        if "{}" in name
        for i in range(new.layers)
    }


def learned(depth: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The depth matrices, those of `names` all nan: every old layer counts, how much is not known yet."""
    return depth | {name: torch.full_like(depth[name], torch.nan) for name in names}


HEADS = ("query", "key", "value")
# Softmax and GELU commute with copies of a unit, not with sums of units.
COPIED_ONLY = (*HEADS, "ffn", "transform")
READ_BY_NORMS = ("residual", "gain", "transform", "final_gain")  # and by nothing else: checked as norms
POST_NORMS = ("layers.{}.mixer_norm.", "layers.{}.mlp_norm.")  # in the order in which the stream meets them


@dataclass(frozen=True)
class Maps:
    """What an operator returns: a map per space and a depth matrix [L_new, L_old] per layered weight.

    Spaces of one layer are keyed by the layer's index in the target ("ffn.3"). `norm_eps` multiplies the
    norms' eps. constants: of some weights, what is added to each layer's mix, [L_new].
    """

    spaces: dict[str, Map]
    depth: dict[str, Tensor]
    norm_eps: float = 1.0
    constants: dict[str, Tensor] = field(default_factory=dict)

    def lossless(self, old: Architecture) -> bool:
        """Does the grown model compute the same function in exact arithmetic? From the maps alone.

        A norm of a norm is the norm but for O(eps): layers are added losslessly to a post-norm model whose
        eps does not show in nine digits, as BERT's 1e-12 does not.
        """
        return self._depth_is_lossless(old) and self._width_is_lossless(old)

    def _depth_is_lossless(self, old: Architecture) -> bool:
        """Every old layer acts once and in order; the layers between them add nothing to the stream."""
        kept = None
        for weight in filter(lambda weight: weight.layered, old.weights):
            depth = self.depth[weight.name]
            if weight.spaces[0] != "residual":
                continue
            active = depth.ne(0).any(1)
            if kept is not None and not torch.equal(kept, active):
                return False
            kept = active
        identity = torch.eye(old.layers, dtype=torch.float64)
        norms = POST_NORMS if old.post_norm else ()
        layered = (weight.name for weight in old.weights if weight.layered)
        inside = (name for name in layered if not name.startswith(norms))
        return (
            kept is not None
            and int(kept.sum()) == old.layers
            and all(torch.equal(self.depth[name][kept].double(), identity) for name in inside)
            and all(name.startswith(norms) for name in self.constants)
            and (not old.post_norm or self._post_norms_are_lossless(old, kept))
        )

    def _post_norms_are_lossless(self, old: Architecture, kept: Tensor) -> bool:
        """A random stream, random outputs of the kept layers: do these read what the old layers read?"""
        generator, D = torch.Generator().manual_seed(0), 64

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, D, dtype=torch.float64, generator=generator)

        start, outputs = random(), random(2, old.layers)
        narrow = {norm + part: random(old.layers) for norm in POST_NORMS for part in ("weight", "bias")}
        wide = {name: self.depth[name].double() @ x for name, x in narrow.items()}
        wide |= {name: wide[name] + x[:, None] for name, x in self.constants.items()}
        added = outputs.new_zeros(2, len(kept), D)
        added[:, kept] = outputs

        def stream(norms: dict[str, Tensor], outputs: Tensor, eps: float) -> tuple[Tensor, Tensor]:
            """What each block reads, [L, 2, D], and what the last layer leaves, [D]."""
            x, read = start, []
            for layer in range(outputs.shape[1]):
                for norm, output in zip(POST_NORMS, outputs[:, layer], strict=True):
                    read.append(x)
                    gain, bias = norms[norm + "weight"][layer], norms[norm + "bias"][layer]
                    x = F.layer_norm(x + output, (D,), gain, bias, eps)
            return torch.stack(read).unflatten(0, (-1, 2)), x

        want, left = stream(narrow, outputs, old.norm_eps)
        got, also = stream(wide, added, old.norm_eps * self.norm_eps)
        return all(torch.allclose(*pair, rtol=1e-9, atol=1e-9) for pair in ((got[kept], want), (also, left)))

    def _width_is_lossless(self, old: Architecture) -> bool:
        """One random vector per space settles each identity, with probability one and in O(T)."""
        generator = torch.Generator().manual_seed(0)
        written, probes = {}, {}
        for name, space in self.spaces.items():
            kind, _, layer = name.partition(".")
            size = old.spaces[f"{kind}.{{}}" if layer else kind].size
            # The parts of a layer's heads are probed with one vector: they must be copied alike.
            key = f"heads.{layer}" if kind in HEADS else name
            if key not in probes:
                probes[key] = torch.randn(2, size, dtype=torch.float64, generator=generator)
            unit, reader = probes[key]
            wide = written[name] = space.write(unit)
            if kind in COPIED_ONLY and not torch.isin(wide, unit).all():
                return False
            if kind in READ_BY_NORMS:
                continue
            seen = (
                self.spaces["residual"].write(reader) if kind == "final" and old.tied else space.read(reader)
            )
            if not torch.allclose(seen @ wide, reader @ unit, rtol=1e-9, atol=1e-9):
                return False
            if kind in HEADS and not torch.equal(wide, written.get(f"query.{layer}", wide)):
                return False
        if old.post_norm:  # a block adds to what a norm gives
            given = self.spaces["normed"].write(probes["residual"][0])
            if not torch.allclose(given, written["residual"], rtol=1e-9, atol=1e-9):
                return False
        last = "transform" if "transform" in self.spaces else "residual"
        return self._norm_is_lossless(old, "residual", "gain", "normed") and self._norm_is_lossless(
            old, last, "final_gain", "final"
        )

    def _norm_is_lossless(self, old: Architecture, stream: str, gain: str, normed: str) -> bool:
        """A random stream, gain and bias: is the wide norm the wide form of the narrow one?"""
        D = old.spaces[stream].size
        x, g, b = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        wide = self.spaces[stream].write(x)
        eps = old.norm_eps
        want = self.spaces[normed].write(F.layer_norm(x, (D,), g, b, eps))
        got = F.layer_norm(
            wide, wide.shape, self.spaces[gain].write(g), self.spaces[normed].write(b), eps * self.norm_eps
        )
        return torch.allclose(got, want, rtol=1e-9, atol=1e-9)
