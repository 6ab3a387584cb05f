"""Some windows of much text: of each of many equal parts, neighbouring ones behind a place drawn there.

No more is read than they take, and of a text only its first tokens where these are asked for.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from growth.training.corpus import encoded
from growth.training.texts import (
    Paths,
    Piece,
    documents,
    documents_in,
    files_below,
    named,
    statuses,
    textless,
)

SMALL = 1 << 22  # bytes: seconds of a tokenizer; less is read whole
TOKEN = 16  # bytes of one at most, on average
PARTS = 64
LITTLE = 1 << 14  # characters tokenized at once


class File(NamedTuple):
    """name: what a refusal calls it. before: the bytes of the files in front of it."""

    path: Path
    name: str
    before: int
    size: int


def first_tokens(paths: Paths, tokenizer: PreTrainedTokenizerBase, count: int, what: str) -> Tensor:
    """The first `count` tokens of files (training.texts), or all where there are fewer, int64 [N]."""
    ids = _tokens(documents(paths, what, characters=LITTLE), tokenizer)
    return torch.tensor(list(islice(ids, count)), dtype=torch.int64)


def some_tokens(
    paths: Paths,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    what: str = "data",
    field: str = "text",
    seed: int = 0,
) -> Tensor | None:
    """`count` windows of `length` tokens, int64 [count * length]: the same for the same files and seed.

    None where there is so little text that it is better read whole. A row is read from its begin on, by the
    part that this lies in: of rows longer than a part the ends are rarer than they should be.
    """
    files = _files(paths, what)
    if (size := sum(file.size for file in files)) <= max(SMALL, TOKEN * count * length):
        return None
    parts, draw = min(PARTS, count), torch.Generator().manual_seed(seed)
    places = (torch.arange(parts) + torch.rand(parts, generator=draw, dtype=torch.float64)) * size / parts
    begun = [
        _tokens(_between(files, field, i * size // parts, int(place), (i + 1) * size // parts), tokenizer)
        for i, place in enumerate(places.tolist())
    ]
    found: list[list[int]] = []
    while begun and len(found) < count:
        now, later = begun[: count - len(found)], begun[count - len(found) :]
        windows = [list(islice(ids, length)) for ids in now]
        found += [window for window in windows if len(window) == length]
        begun = later + [ids for ids, window in zip(now, windows) if len(window) == length]
    return torch.tensor(found).flatten() if len(found) == count else None


def _files(paths: Paths, what: str) -> list[File]:
    """All of them, a folder of `datasets` as one. Raises Refusal where a path has no bytes."""
    found, before = [], 0
    for path in named(paths, what):
        begun, below = before, list(files_below(path, what))
        for file in below:
            if size := sum(status.st_size for _, status in statuses(file, what)):
                found.append(File(file, f"{what} {file}", before, size))
                before += size
        if before == begun:
            raise textless(path, what, len(below))
    return found


def _between(files: list[File], field: str, begin: int, place: int, end: int) -> Iterator[Piece]:
    """The documents of the bytes from `place` to `end`, then of those before."""
    for first, last in ((place, end), (begin, place)):
        inside = bisect_right(files, first, key=lambda file: file.before) - 1
        beyond = bisect_left(files, last, key=lambda file: file.before)
        for file in files[inside:beyond]:
            part = tuple(min(1.0, max(0.0, (x - file.before) / file.size)) for x in (first, last))
            yield from documents_in(file.path, file.name, field, part, LITTLE)


def _tokens(found: Iterator[Piece], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for ids, _ in encoded(found, tokenizer, LITTLE):
        yield from ids
