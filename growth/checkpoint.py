"""Checkpoints as folders of safetensors: read one tensor, or some rows of it, at a time."""

import hashlib
import json
import math
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from growth.configuration import LARGEST, read_config, refuse_beyond_tensors
from growth.errors import reason, refuse
from growth.folders import refuse_outside
from growth.hub import TENSORS, WANTED, resolve
from growth.jsonfile import read_object
from growth.record import read_record

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK = 2**26  # entries that are read at once where a tensor need not be whole
AXES = 8  # of a tensor
OTHER_FORMATS = ("pytorch_model*.bin", "tf_model.h5", "flax_model.msgpack", "*.gguf")


def chosen_dtype(name: str | None) -> str | None:
    """The name of a dtype to write in, None for each tensor's own; a refusal for any other."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()]
    if name is not None and name not in names:
        raise refuse("dtype", f"one of {', '.join(names)}", name, "leave it out to keep the source's")
    return name


class Stored(NamedTuple):
    """Where a tensor lies. kind: safetensors' name of its dtype."""

    file: Path
    shape: tuple[int, ...]
    kind: str


class Checkpoint:
    """A folder in the Hugging Face format, or a model of the Hub. Tensors are read one by one, none is kept.

    name: what was asked for, a folder or the Hub's owner/name. path: the folder that it is in. taken: bytes
    of tensors that were read.
    """

    def __init__(self, src: str | Path):
        self.name, self.path, self.taken = str(src), resolve(src), 0
        _refuse_adapter(self.path)
        if os.path.isdir(self.path):
            told = [name for name in WANTED if name not in TENSORS]  # large weights may lie on another disk
            refuse_outside(self.path, *(file for name in told for file in self.path.glob(name)))
        self.config = read_config(self.path)
        self._tensors = _tensors(self.path)
        self._found = self._stamps()
        axes = [axis for stored in self._tensors.values() for axis in stored.shape]
        refuse_beyond_tensors(self.path / "config.json", len(self._tensors), max(axes, default=0))

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._tensors[name].kind]

    def bytes(self, name: str) -> int:
        """What a tensor takes on disk, whatever its dtype: BOOL, I64, F8_E4M3."""
        bits = re.search(r"\d+", self._tensors[name].kind)
        return math.prod(self.shape(name)) * int(bits[0] if bits else 8) // 8

    @property
    def coarsest(self) -> torch.dtype:
        """Of the floats among its tensors' dtypes, the one that rounds most."""
        kinds = {stored.kind for stored in self._tensors.values()} & DTYPES.keys()
        return max((DTYPES[kind] for kind in kinds), key=lambda x: torch.finfo(x).eps, default=torch.float32)

    def refuse_other_dtypes(self, names: Iterable[str]) -> None:
        """Raises Refusal where one of these tensors is none of the floats that growth computes in."""
        for name in names:
            if (kind := self._tensors[name].kind) not in DTYPES:
                raise refuse(
                    f"{self.path}: {name}",
                    f"a dtype out of {', '.join(DTYPES)}",
                    kind,
                    "save the model again in one of these; quantized weights are restored to it first",
                )

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or these rows of it, along axis 0: the rest of the file is not touched."""
        file = self._tensors[name].file
        try:
            with safe_open(file, "pt") as tensors:
                x = tensors.get_tensor(name) if rows is None else tensors.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            if _stamp(file) == self._found[file]:
                remedy = "look at the disk that it is on"
                raise refuse(str(file), "a file that can be read", reason(error), remedy) from error
            raise self._changed(file) from error
        self.taken += x.nbytes
        return x

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor in consecutive blocks along axis 0, of at most BLOCK entries unless a row has more."""
        if not (shape := self.shape(name)):
            yield self.read(name)
            return
        for rows in by_rows(shape, BLOCK):
            yield self.read(name, rows)

    def refuse_changed(self) -> None:
        """Raises Refusal where a file is not the one that was there at first."""
        now = self._stamps()
        for file, stamp in self._found.items():
            if now[file] != stamp:
                raise self._changed(file)

    def fingerprint(self) -> str:
        """A checksum of the configuration and of every tensor, however these are spread over files."""
        config = read_object(self.path / "config.json")
        config.pop("transformers_version", None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name in sorted(self._tensors):
            stored, crc = self._tensors[name], 0
            for block in self.blocks(name):
                crc = zlib.crc32(block.flatten().view(torch.uint8).numpy(), crc)  # four times sha256's speed
                del block  # before the next is read
            digest.update(f"{name} {stored.kind} {stored.shape} {crc:08x} ".encode())
        return digest.hexdigest()

    def record(self) -> dict:
        """What growth wrote about this checkpoint, {} where it came from elsewhere."""
        return read_record(self.path)

    def _changed(self, file: Path):
        got = "another one now" if os.path.exists(file) else "none there any more"
        return refuse(str(file), "the file that was there at first", got, "leave the source alone meanwhile")

    def _stamps(self) -> dict[Path, tuple[int, int, int] | None]:
        files = {self.path / "config.json", *(stored.file for stored in self._tensors.values())}
        return {file: _stamp(file) for file in files}


def by_rows(shape: tuple[int, ...], most: int) -> Iterator[slice]:
    """The rows of a tensor, as many at a time as `most` entries hold, but one at least."""
    step = max(1, most // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _refuse_adapter(path: Path) -> None:
    alone = not os.path.exists(path / "config.json")
    if os.path.exists(path / "adapter_config.json") and (alone or any(path.glob("adapter_model.*"))):
        raise refuse(
            str(path),
            "a whole model",
            "an adapter (adapter_config.json)",
            "merge it into its base model first, with peft's merge_and_unload, and save that",
        )


def _tensors(path: Path) -> dict[str, Stored]:
    """Every tensor by its name; each file is opened once, so a damaged one is found before any work."""
    file, index = path / WEIGHTS, path / INDEX
    if file.exists() or not index.exists():  # where both are, transformers reads the one file
        return _header(file)
    where = read_object(index, "weight_map")["weight_map"]
    again = "copy or download it again"
    files = where.values() if isinstance(where, dict) else [None]
    if not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise refuse(str(index), "a weight_map from tensors to files beside it", "something else", again)
    found: dict[str, Stored] = {}
    for name in sorted(set(where.values())):
        tensors = _header(path / name)
        if twice := found.keys() & tensors:
            raise refuse(str(path / name), "tensors that no other shard holds", min(twice), again)
        found |= tensors
    if wrong := {name for name, file in where.items() if name not in found or found[name].file.name != file}:
        raise refuse(str(index), "tensors where the shards hold them", min(wrong), again)
    if unlisted := found.keys() - where:
        raise refuse(str(index), "every tensor of the shards", f"none for {min(unlisted)}", again)
    return found


def _header(file: Path) -> dict[str, Stored]:
    if not os.path.isfile(file):
        others = sorted(x.name for form in OTHER_FORMATS for x in file.parent.glob(form))
        got = "something else" if os.path.exists(file) else "none there"
        raise refuse(
            str(file),
            "a safetensors file",
            f"{others[0]} alone" if others and file.name == WEIGHTS else got,
            "download the checkpoint again, or load it with transformers and save it with save_pretrained",
        )
    try:
        with safe_open(file, "pt") as tensors:  # which holds offsets and sizes to the file's length
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            found = {name: Stored(file, tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
        twice = _twice(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise refuse(
            str(file),
            "a whole safetensors file",
            f"{file.stat().st_size} bytes that end early or are damaged ({reason(error)})",
            "copy or download it again",
        ) from error
    if twice:
        raise refuse(str(file), "each tensor once", f"{min(twice)} twice", "copy or download it again")
    for name, stored in found.items():  # no bytes hold the shape of a tensor without entries to anything
        if len(stored.shape) > AXES or max(stored.shape, default=0) > max(LARGEST, file.stat().st_size):
            got = f"{name} of {len(stored.shape)} axes, the largest {max(stored.shape):,}"
            raise refuse(str(file), "shapes that some machine holds", got, "save the model again")
    return found


def _twice(file: Path) -> set[str]:
    """The names that a header says more than once: of these safetensors keeps one."""
    twice: set[str] = set()

    def pairs(found: list[tuple[str, object]]) -> None:
        counts = Counter(name for name, _ in found)
        twice.update(name for name, count in counts.items() if count > 1)

    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        json.loads(stream.read(size), object_pairs_hook=pairs)
    return twice
