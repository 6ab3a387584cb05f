"""Maps applied to tensors: what producers write, what readers read, what readers cannot see.

Copies are applied run by run, at the speed of a copy: a run is a stretch of the wide wire that is a stretch
of the narrow one, or no copy at all.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from growth.maps import Copies, numbered

SHORT = 64  # entries of a run on average: below, one gather is faster than many copies


class Run(NamedTuple):
    """`length` entries of the wide wire from `start` on; source: where they lie in the narrow one, or -1."""

    start: int
    source: int
    length: int


@lru_cache(maxsize=64)
def runs(of: Copies) -> tuple[Run, ...]:
    return _merged(enumerate(of.index), of.width)


def _merged(units: Iterable[tuple[int, int]], width: int) -> tuple[Run, ...]:
    """Of pairs of units, in the wide wire and in the narrow one or -1, those that go on together in one."""
    found: list[Run] = []
    for t, s in units:
        run = Run(t * width, s * width if s >= 0 else -1, width)
        last = found[-1] if found else None
        if last and run[:2] == (
            last.start + last.length,
            last.source + last.length if last.source >= 0 else -1,
        ):
            found[-1] = last._replace(length=last.length + width)
        else:
            found.append(run)
    return tuple(found)


@lru_cache(maxsize=64)
def _scattered(of: Copies) -> Tensor | None:
    """Where every entry lies in the narrow wire, if runs are so short that gathering is faster."""
    T = len(of.index) * of.width
    if len(runs(of)) * SHORT <= T or -1 in of.index:
        return None
    return (torch.tensor(of.index)[:, None] * of.width + torch.arange(of.width)).flatten()


@lru_cache(maxsize=64)
def with_ahead(of: Copies) -> Copies:
    """The map of a wire and of the same wire of another layer behind it: further copies are of the latter."""
    copy = zip(of.index, numbered(of.index), strict=True)
    index = tuple(s + of.sources if c else s for s, (c, _) in copy)
    return replace(of, index=index, sources=2 * of.sources)


@lru_cache(maxsize=64)
def _each(numbers: tuple[float, ...], width: int, dtype: torch.dtype) -> Tensor:
    """A number per unit as one per entry."""
    return torch.tensor(numbers, dtype=dtype).repeat_interleave(width)


@lru_cache(maxsize=64)
def _whole(of: Copies) -> bool:
    """Do readers take all of every copy?"""
    return all(share == 1.0 for share, s in zip(of.share, of.index, strict=True) if s >= 0)


def exact(x: Tensor) -> Tensor:
    """In float32 at least: W / 3 has no 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def write(of: Any, x: Tensor, axis: int = 0, rows: slice | None = None) -> Tensor:
    """[.., S, ..] -> [.., T, ..]: what the producer's rows become along `axis`, or some of them."""
    if not isinstance(of, Copies):
        return of.write(x.movedim(axis, 0)).movedim(0, axis)
    first, last = (rows.start, rows.stop) if rows else (0, len(of.index) * of.width)
    out = _copied(of, x, axis, first, last)
    if isinstance(of.scale, tuple):
        scale = _each(of.scale, of.width, out.dtype)[first:last].to(out.device)
        return out * scale.view(-1, *[1] * (x.ndim - 1 - axis % x.ndim))
    return out if of.scale == 1.0 else out * of.scale


def _copied(of: Copies, x: Tensor, axis: int, first: int, last: int) -> Tensor:
    """Entries `first` to `last` of the wide wire, in float32 at least."""
    if (where := _scattered(of)) is not None:
        return exact(x.index_select(axis, where[first:last].to(x.device)))
    parts = []
    for run in runs(of):
        a, b = max(run.start, first), min(run.start + run.length, last)
        if a >= b:
            continue
        if run.source >= 0:
            parts.append(exact(x.narrow(axis, run.source + a - run.start, b - a)))
        else:
            size = [b - a if i == axis % x.ndim else n for i, n in enumerate(x.shape)]
            rest = exact(x).mean(axis, keepdim=True) if of.rest == "mean" else exact(x.new_zeros(()))
            parts.append(rest.expand(size))
    return torch.cat(parts, axis)


def read(of: Any, x: Tensor, writes: Any = None, rows: slice | None = None) -> Tensor:
    """[..., S] -> [..., T]: the reader's columns.

    writes: the map of what the reader writes, None where that stays; rows: those of its rows that x has. They
    count where copies are parted in blocks, and x has the rows first.
    """
    if not isinstance(of, Copies):
        return of.read(x)
    out = _taken(of, x)
    if not _whole(of):
        out.mul_(_each(of.share, of.width, x.dtype).to(x.device))
    if of.parting == "blocks" and isinstance(writes, Copies):
        table, row = _blocks(of, writes)
        row = row[rows or slice(None)].to(x.device)
        out.mul_(table.to(out)[row].view(len(row), *[1] * (x.ndim - 2), -1))
    return out


def _taken(of: Copies, x: Tensor) -> Tensor:
    """Every column as often as its unit is copied; zero where what is read is no copy."""
    if (where := _scattered(of)) is not None:
        return x.index_select(-1, where.to(x.device))
    parts = [
        x.narrow(-1, run.source, run.length) if run.source >= 0 else x.new_zeros(*x.shape[:-1], run.length)
        for run in runs(of)
    ]
    return torch.cat(parts, -1)


@lru_cache(maxsize=64)
def _blocks(of: Copies, writes: Copies) -> tuple[Tensor, Tensor]:
    """[kinds of rows, T]: how many times its share a row takes of a column; [rows]: of which kind it is."""
    own, of_rows = numbered(of.index), numbered(writes.index)
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(of_rows))}
    table = [[(g := gcd(m, n)) * (c % g == r % g) for c, n in own] for r, m in kinds]
    row = torch.tensor([kinds[kind] for kind in of_rows]).repeat_interleave(writes.width)
    return torch.tensor(table, dtype=torch.float64).repeat_interleave(of.width, -1), row


def rows_apart(writes: Any) -> tuple[int, ...]:
    """A row of each kind that blocks tell apart."""
    if not isinstance(writes, Copies):
        return (0,)
    kinds = numbered(writes.index)
    return tuple(kinds.index(kind) * writes.width for kind in dict.fromkeys(kinds))


def unseen(of: Any, r: Tensor) -> Tensor:
    """[..., T] -> [..., T]: r made into what readers cannot see, p with p . write = 0, in place.

    Spread or in blocks, p is r - r . write . read^T; growth.maps.Copies has the others.
    """
    if not isinstance(of, Copies):
        return of.unseen(r)
    if of.parting in ("first", "pairs"):
        silent, balanced = _balanced(of)
        for run in silent:
            r.narrow(-1, run.start, run.length).zero_()
        for run in balanced:
            r.narrow(-1, run.source, run.length).sub_(r.narrow(-1, run.start, run.length))
        return r
    seen, count = (r.new_zeros(*shape, of.sources * of.width) for shape in (r.shape[:-1], ()))
    copied = [run for run in runs(of) if run.source >= 0]
    for run in copied:
        seen.narrow(-1, run.source, run.length).add_(r.narrow(-1, run.start, run.length))
        count.narrow(-1, run.source, run.length).add_(1)
    seen /= count
    for run in copied:
        r.narrow(-1, run.start, run.length).sub_(seen.narrow(-1, run.source, run.length))
    return r


@lru_cache(maxsize=64)
def _balanced(of: Copies) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """What is nothing by itself, and which copies (start) are taken from which (source)."""
    where = {
        (s, c): t for t, (s, (c, _)) in enumerate(zip(of.index, numbered(of.index), strict=True)) if s >= 0
    }
    if of.parting == "first":
        partner = {t: where[s, 0] for (s, c), t in where.items() if c}
    else:
        partner = {t: where[s, c + 1] for (s, c), t in where.items() if c % 2 == 0 and (s, c + 1) in where}
    silent = [(t, s) for (s, _), t in sorted(where.items(), key=lambda at: at[1]) if t not in partner]
    return _merged(silent, of.width), _merged(sorted(partner.items()), of.width)


def add_noise(of: Copies, x: Tensor, std: float, generator: torch.Generator) -> None:
    """Add what readers cannot see of normal numbers to a reader's columns [rows, T], in place.

    That is nothing where a unit has no other copy, so no numbers are drawn there.
    """
    free, places = _free(of)
    if places:
        fresh = torch.randn(len(x), len(free.index) * of.width, dtype=x.dtype, generator=generator)
        unseen(free, fresh.mul_(std))
    for run in places:
        x.narrow(-1, run.start, run.length).add_(fresh.narrow(-1, run.source, run.length))


def parted(of: Copies) -> int:
    """Numbers that add_noise draws for a row."""
    free, places = _free(of)
    return len(free.index) * of.width if places else 0


@lru_cache(maxsize=64)
def _free(of: Copies) -> tuple[Copies, tuple[Run, ...]]:
    """The units that have other copies, or no source, and where they stand in the wide wire."""
    count = Counter(of.index)
    free = [t for t, s in enumerate(of.index) if s < 0 or count[s] > 1]
    number = {s: i for i, s in enumerate(sorted({of.index[t] for t in free} - {-1}))}
    index = tuple(number.get(of.index[t], -1) for t in free)
    places = _merged(((t, i) for i, t in enumerate(free)), of.width)
    return replace(of, index=index, share=(0.0,) * len(index), sources=len(number)), places
