"""Checkpoints as folders of safetensors: written block by block, all at once or not at all."""

import json
import math
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor
from transformers import PreTrainedConfig

from growth.card import title, told, write_card
from growth.checkpoint import DTYPES, INDEX, WEIGHTS, Checkpoint
from growth.companions import copy_companions, generate_without_cache
from growth.errors import refuse
from growth.families import FAMILIES
from growth.folders import staged
from growth.jsonfile import read_object
from growth.plan import Row
from growth.record import RECORD
from growth.tokenizing import keep_tokenizer

CONFIG = "config.json"
DECIDE = ("model_type", "tokenizer_class")  # fields by which transformers chooses a tokenizer's class
SHARD_BYTES = 2 * 10**9
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
GB = 10**9
SECONDS = 30  # between two lines where standard error is no terminal


def write_checkpoint(
    dst: str | Path,
    config: PreTrainedConfig,
    made: Iterator[tuple[Row, Iterable[Tensor]]],
    rows: Sequence[Row],
    source: Checkpoint,
    record: dict,
    *,
    shard_bytes: int = SHARD_BYTES,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Configuration, a tensor for each row, growth.json, a card, what lay beside the source: all, or nothing.

    made: the rows in their order, each with consecutive blocks of its tensor along axis 0, mostly one, the
    whole. Each block is rounded to its row's dtype here, and only here, and is on disk before the next one is
    asked for. also: writes more into the folder. Raises Refusal where a number is not finite then.
    """
    widths = getattr(source.config, "hidden_size", 0), getattr(config, "hidden_size", 0)
    with staged(dst) as folder:
        copy_companions(source.path, folder, widths)
        config.save_pretrained(folder)
        if any(getattr(config, name, None) != getattr(source.config, name, None) for name in DECIDE):
            keep_tokenizer(source.path, folder)
        say_plainly(folder, config)
        if not getattr(config, "use_cache", True) and getattr(source.config, "use_cache", True):
            generate_without_cache(folder)
        with WriteProgress(str(dst), sum(row.bytes for row in rows)) as progress:
            Writer(folder, rows, shard_bytes, progress).write(made)
        if also:
            also(folder)
        source.refuse_changed()
        (folder / RECORD).write_text(json.dumps(record, indent=1))
        write_card(folder, title(Path(dst)), source.path, config, *told(record))


def say_plainly(folder: Path, config: PreTrainedConfig) -> None:
    """Put config.json, as transformers wrote it, in the words that others read too."""
    if family := FAMILIES.get(config.model_type):
        found = read_object(file := folder / CONFIG)
        if (plain := family.plain(found)) != found:
            file.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


class WriteProgress:
    """How much of `total` bytes is written, on standard error. A context manager."""

    def __init__(self, name: str, total: int):
        self.total, self.done, self._said = total, 0, time.monotonic()
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        live = sys.stderr.isatty()
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True) if live else None
        if self._bar:
            self._bar.add_task(name, total=total)

    def __enter__(self) -> "WriteProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()

    def wrote(self, size: int) -> None:
        self.done += size
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.done)
        elif time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            text = f"growth: {self.done / GB:.1f} of {self.total / GB:.1f} GB written"
            print(text, file=sys.stderr, flush=True)


class Writer:
    """Safetensors files of at most `shard_bytes`, or of one tensor, and the index that transformers reads"""

    def __init__(self, folder: Path, rows: Sequence[Row], shard_bytes: int, progress: WriteProgress):
        self.folder, self.rows, self.progress = folder, rows, progress
        self.files = planned(rows, shard_bytes)

    def write(self, made: Iterator[tuple[Row, Iterable[Tensor]]]) -> None:
        """made: as in write_checkpoint."""
        for name, rows in self.files.items():
            head, starts = layout(rows)
            with (self.folder / name).open("wb") as file:
                file.write(head)
                for row in rows:
                    got, blocks = next(made)
                    assert got.name == row.name, (got, row)
                    file.seek(len(head) + starts[row.name])
                    self.add(file, row, blocks)
                    del blocks  # before the next are made
        assert next(made, None) is None
        if len(self.files) > 1:
            self._write_index()

    def add(self, file: BinaryIO, row: Row, blocks: Iterable[Tensor]) -> None:
        """Raises Refusal where a number is not finite in the row's dtype."""
        dtype, entries = getattr(torch, row.dtype), 0
        for block in blocks:
            assert block.ndim == len(row.shape) and block.shape[1:] == row.shape[1:], (block.shape, row)
            x = block.to("cpu", dtype)
            if x.numel() and not all(end.isfinite() for end in x.aminmax()):
                raise refuse(
                    row.name,
                    f"finite numbers in {row.dtype}",
                    "others",
                    "look for such numbers in the source, or for a learning rate that was too high; "
                    "what grows beyond float16 fits into bfloat16",
                )
            file.write(x.flatten().view(torch.uint8).numpy())
            entries += x.numel()
            self.progress.wrote(x.nbytes)
            del block, x  # before the next is made
        assert entries == math.prod(row.shape), (entries, row)

    def _write_index(self) -> None:
        metadata = {
            "total_parameters": sum(math.prod(row.shape) for row in self.rows),
            "total_size": sum(row.bytes for row in self.rows),
        }
        where = {row.name: name for name, rows in self.files.items() for row in rows}
        index = json.dumps({"metadata": metadata, "weight_map": where}, indent=2, sort_keys=True)
        (self.folder / INDEX).write_text(f"{index}\n")


def refuse_odd_shards(size: int) -> None:
    """Raises Refusal where the size of the largest file is none."""
    if type(size) is not int or size < 1:
        raise refuse("shard_bytes", "a whole number of bytes", repr(size), "such as 2 * 10**9")


def planned(rows: Sequence[Row], shard_bytes: int) -> dict[str, list[Row]]:
    """File -> its tensors, in order; a new one begins where the next tensor would exceed `shard_bytes`."""
    parts, room = [[]], shard_bytes
    for row in rows:
        if parts[-1] and row.bytes > room:
            parts.append([])
            room = shard_bytes
        parts[-1].append(row)
        room -= row.bytes
    N = len(parts)
    if N == 1:
        return {WEIGHTS: parts[0]}
    return {f"model-{i:05d}-of-{N:05d}.safetensors": part for i, part in enumerate(parts, 1)}


def layout(rows: Sequence[Row]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and where behind it each tensor begins.

    Wider dtypes come first, whatever the order of the rows: no tensor begins at a fraction of its numbers.
    """
    starts, entries, end = {}, {}, 0
    for row in sorted(rows, key=lambda row: -getattr(torch, row.dtype).itemsize):
        starts[row.name], end = end, end + row.bytes
        offsets = [starts[row.name], end]
        kind = KINDS[getattr(torch, row.dtype)]
        entries[row.name] = {"dtype": kind, "shape": list(row.shape), "data_offsets": offsets}
    text = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, starts
