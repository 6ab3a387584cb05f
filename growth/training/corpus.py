"""Text to tokens: in memory while they are few, in a memory-mapped file where they are many.

corpus      the tokens of the documents, one after the other, each document ended by the tokenizer's
            end-of-text token where it has one
cache       ids.bin, starts.bin, and key.json, which is written last and says what they were made of; lock is
            held while they are written
"""

import hashlib
import json
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from growth.errors import Refusal, first_process, refuse
from growth.jsonfile import read_object
from growth.locks import LOCK, alone_in
from growth.training import texts
from growth.training.texts import Paths, Piece, documents, files_below, named, pieces, statuses

HELD = 1 << 24  # tokens that stay in memory: at most 64 MB
KEY = "key.json"
FILES = KEY, "ids.bin", "starts.bin"
PARTS = "data", "validation"  # of what a run reads, a folder each beside its result
PATIENCE = 60  # seconds in which the first of several processes begins to write


class Corpus(NamedTuple):
    """ids [N], of any integer dtype; starts [documents]: where each document begins, int64."""

    ids: np.ndarray
    starts: np.ndarray


def tokens(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The corpus of texts in memory, int64 [N]."""
    cut = (piece for text in documents for piece in pieces([text], texts.PIECE))
    found = encoded(cut, tokenizer, texts.PIECE)
    return torch.from_numpy(np.concatenate([np.array(ids, np.int64) for ids, _ in found]))


def read_corpus(
    paths: Paths,
    tokenizer: PreTrainedTokenizerBase,
    what: str = "data",
    field: str = "text",
    cache: Path | None = None,
) -> Corpus:
    """The corpus of files (training.texts); of more than HELD tokens it stays on disk, mapped.

    cache: the folder that it is kept in then, and found again in while files, field and tokenizer are the
    same; without, a file that is gone with the process. Raises Refusal as `documents` does, where another
    process writes there, and where the disk has no room.
    """
    paths = named(paths, what)
    key = "" if cache is None else _key(paths, tokenizer, what, field)
    if cache is not None and (found := _kept(cache, key)):
        return found
    kind = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)
    found = documents(paths, what, field)
    try:
        return _written(encoded(found, tokenizer, texts.PIECE), kind, cache, key)
    except OSError as error:
        where = "the folder for temporary files" if cache is None else str(cache)
        raise refuse(where, "room for the tokens", error.strerror, "make room") from error


@contextmanager
def kept_beside(out: Path, run: Path) -> Iterator[Path]:
    """The folder for the tokens of a result `out`; it stays while the run, in its folder, may go on."""
    cache = Path(f"{out}.tokens")
    try:
        yield cache
    finally:
        if first_process() and not run.exists():
            for part in map(cache.joinpath, PARTS):
                with suppress(Refusal, OSError):  # another process may be writing there
                    if _ours(part):
                        with alone_in(part):
                            _cleared(part)
            with suppress(OSError):
                cache.rmdir()


def _ours(cache: Path) -> bool:
    """Is nothing there that was not written here?"""
    return cache.is_dir() and {x.name for x in cache.iterdir()} <= {*FILES, LOCK}


def _cleared(cache: Path) -> None:
    """What was written here is gone, and the folder where nothing else is in it."""
    for name in (*FILES, LOCK):
        with suppress(OSError):
            (cache / name).unlink()
    with suppress(OSError):
        cache.rmdir()


def encoded(
    found: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, characters: int
) -> Iterator[tuple[list[int], bool]]:
    """The tokens of each piece, and whether a document ends with them; characters: of `batches`."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in batches(found, characters):
        ids = tokenizer(
            [piece for piece, _ in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for (_, last), part in zip(batch, ids):
            yield part + end if last else part, last


def batches(found: Iterable[Piece], characters: int) -> Iterator[list[Piece]]:
    """Pieces, about so many characters of them at a time."""
    batch, size = [], 0
    for piece in found:
        batch.append(piece)
        size += len(piece[0])
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _written(parts: Iterable[tuple[list[int], bool]], kind: np.dtype, cache: Path | None, key: str) -> Corpus:
    """The parts in memory, or from the token on that is too many, in files."""
    held, starts, count, begins, file = [], array("q"), 0, True, None
    with ExitStack() as stack:
        for ids, last in parts:
            if begins:
                starts.append(count)
            begins, count = last, count + len(ids)
            if file is None:
                held.append(np.array(ids, kind))
                if count <= HELD:
                    continue
                if cache is not None and not first_process():
                    if found := _awaited(cache, key):
                        return found
                    cache = None
                if cache is not None:
                    stack.enter_context(_anew(cache))
                file = stack.enter_context(_file(cache, "ids.bin"))
                for part in held:
                    file.write(part)
                held = []
            else:
                file.write(np.array(ids, kind))
        bounds = np.frombuffer(starts, np.int64) if starts else np.zeros(0, np.int64)
        if file is None:
            return Corpus(np.concatenate(held) if held else np.zeros(0, kind), bounds)
        file.flush()
        mapped = np.memmap(file, kind, "r", shape=(count,))
        if cache is not None:
            bounds.tofile(cache / "starts.bin")
            told = {"key": key, "dtype": kind.name, "tokens": count, "documents": len(bounds)}
            (cache / KEY).write_text(json.dumps(told))
        return Corpus(mapped, bounds)


@contextmanager
def _anew(cache: Path) -> Iterator[None]:
    """The cache has no tokens inside, and no other process writes there; what did not get whole is gone."""
    cache.mkdir(parents=True, exist_ok=True)
    with alone_in(cache):
        try:
            for name in FILES:  # who has mapped them keeps them
                (cache / name).unlink(missing_ok=True)
            yield
        except BaseException:
            _cleared(cache)
            raise


def _file(cache: Path | None, name: str) -> IO[bytes]:
    return tempfile.TemporaryFile() if cache is None else (cache / name).open("w+b")


def _kept(cache: Path, key: str) -> Corpus | None:
    """What lies in the cache, where it is whole and was made of the same."""
    try:
        told = read_object(cache / KEY, "key", "dtype", "tokens", "documents")
        if told["key"] != key:
            return None
        return Corpus(
            np.memmap(cache / "ids.bin", told["dtype"], "r", shape=(told["tokens"],)),
            np.memmap(cache / "starts.bin", np.int64, "r", shape=(told["documents"],)),
        )
    except (Refusal, OSError, ValueError, TypeError):
        return None


def _awaited(cache: Path, key: str) -> Corpus | None:
    """What the first process writes; None where it stops, or writes where this one does not see it."""
    began = time.monotonic()
    while cache.is_dir() or time.monotonic() - began < PATIENCE:
        if found := _kept(cache, key):
            return found
        time.sleep(0.1)
    return None


def _key(paths: list[Path], tokenizer: PreTrainedTokenizerBase, what: str, field: str) -> str:
    """Of the files, by name, size and time, the field and the tokenizer."""
    told = [field, str(tokenizer.eos_token_id), type(tokenizer).__name__]
    told.append(
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab()))
    )
    for path in paths:
        for entry in files_below(path, what):
            for file, status in statuses(entry, what):
                told.append(f"{file.absolute()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(told).encode()).hexdigest()
