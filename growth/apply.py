"""Maps applied to tensors: what producers write, what readers read, what readers cannot see.

Copies are applied run by run, at the speed of a copy: a run is a stretch of the wide wire that is a stretch
of the narrow one, or no copy at all.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from growth.maps import Copies


class Run(NamedTuple):
    """`length` entries of the wide wire from `start` on; source: where they lie in the narrow one, or -1."""

    start: int
    source: int
    length: int


@lru_cache(maxsize=64)
def runs(of: Copies) -> tuple[Run, ...]:
    found: list[Run] = []
    for t, s in enumerate(of.index):
        start, source = t * of.width, s * of.width if s >= 0 else -1
        if found and source == (found[-1].source + found[-1].length if found[-1].source >= 0 else -1):
            found[-1] = found[-1]._replace(length=found[-1].length + of.width)
        else:
            found.append(Run(start, source, of.width))
    return tuple(found)


@lru_cache(maxsize=64)
def _each(numbers: tuple[float, ...], width: int) -> Tensor:
    """A number per unit as one per entry."""
    return torch.tensor(numbers, dtype=torch.float64).repeat_interleave(width)


def exact(x: Tensor) -> Tensor:
    """In float32 at least: W / 3 has no 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def write(of: Any, x: Tensor, axis: int = 0, rows: slice | None = None) -> Tensor:
    """[.., S, ..] -> [.., T, ..]: what the producer's rows become along `axis`, or some of them."""
    if not isinstance(of, Copies):
        return of.write(x.movedim(axis, 0)).movedim(0, axis)
    first, last = (rows.start, rows.stop) if rows else (0, len(of.index) * of.width)
    parts = []
    for run in runs(of):
        a, b = max(run.start, first), min(run.start + run.length, last)
        if a >= b:
            continue
        if run.source >= 0:
            parts.append(exact(x.narrow(axis, run.source + a - run.start, b - a)))
        else:
            mean = exact(x).mean(axis, keepdim=True)
            size = [b - a if i == axis % x.ndim else -1 for i in range(x.ndim)]
            parts.append((mean if of.rest == "mean" else torch.zeros_like(mean)).expand(size))
    out = torch.cat(parts, axis)
    if isinstance(of.scale, tuple):
        scale = _each(of.scale, of.width)[first:last].to(out)
        return out * scale.view(-1, *[1] * (x.ndim - 1 - axis % x.ndim))
    return out if of.scale == 1.0 else out * of.scale


def read(of: Any, x: Tensor) -> Tensor:
    """[..., S] -> [..., T]: the reader's columns."""
    if not isinstance(of, Copies):
        return of.read(x)
    parts = [
        x.narrow(-1, run.source, run.length) if run.source >= 0 else x.new_zeros(*x.shape[:-1], run.length)
        for run in runs(of)
    ]
    return torch.cat(parts, -1).mul_(_each(of.share, of.width).to(x))


def unseen(of: Any, r: Tensor) -> Tensor:
    """[..., T] -> [..., T]: the part of r that readers cannot see, r - r . write . read^T, in place."""
    if not isinstance(of, Copies):
        return of.unseen(r)
    seen, count = (r.new_zeros(*shape, of.sources * of.width) for shape in (r.shape[:-1], ()))
    copied = [run for run in runs(of) if run.source >= 0]
    for run in copied:
        seen.narrow(-1, run.source, run.length).add_(r.narrow(-1, run.start, run.length))
        count.narrow(-1, run.source, run.length).add_(1)
    seen /= count
    for run in copied:
        r.narrow(-1, run.start, run.length).sub_(seen.narrow(-1, run.source, run.length))
    return r
