"""Checkpoints as folders of safetensors: read one tensor at a time, written all at once or not at all."""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from growth.card import made, write_card
from growth.companions import copy_companions
from growth.errors import reason, refuse
from growth.folders import named_folder, staged
from growth.jsonfile import read_object
from growth.plan import Row
from growth.record import RECORD, read_record

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LARGEST = 2**24  # of one size: a matrix of a thousand times that many entries is beyond any machine
SIZES = """hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size
    max_position_embeddings n_inner type_vocab_size""".split()
STEADY = ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "initializer_range")


class Stored(NamedTuple):
    """Where a tensor lies. kind: safetensors' name of its dtype."""

    file: Path
    shape: tuple[int, ...]
    kind: str


class Checkpoint:
    """A folder in the Hugging Face format. Tensors are read one by one; nothing else is held in memory."""

    def __init__(self, path: str | Path):
        self.path = named_folder(path, "checkpoint")
        self.config = _config(self.path)
        self._tensors = _tensors(self.path)
        self._found = self._stamps()
        layers = getattr(self.config, "num_hidden_layers", 0)
        if layers > len(self._tensors):
            raise refuse(
                str(self.path / "config.json"),
                f"at most {len(self._tensors)} layers, for there are no more tensors",
                layers,
                "check that it belongs to these weights",
            )

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._tensors[name].kind]

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

    def read(self, name: str) -> Tensor:
        file = self._tensors[name].file
        try:
            with safe_open(file, "pt") as tensors:
                return tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._changed(file) from error

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
            stored = self._tensors[name]
            crc = zlib.crc32(self.read(name).flatten().view(torch.uint8).numpy())  # four times sha256's speed
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


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _config(path: Path) -> PreTrainedConfig:
    import lcikernels.models  # noqa: F401  - registers its configuration with AutoConfig

    file = path / "config.json"
    if not os.path.isfile(file):  # false, too, where a name is too long or a link leads to itself
        there = os.path.exists(path)
        got = "a folder without it" if os.path.isdir(path) else "a file" if there else "nothing there"
        raise refuse(
            str(path), "a checkpoint folder with config.json", got, "name a folder that save_pretrained wrote"
        )
    read_object(file)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a value of a wrong type or size raises whatever the code that it meets does
        raise refuse(
            str(file),
            "a configuration that transformers knows by itself",
            reason(error),
            "mend the file; Python code that comes with a checkpoint is not run",
        ) from error
    if getattr(config, "quantization_config", None):
        remedy = "dequantize the model, or remove that entry where its weights are floats"
        raise refuse(str(file), "a model that is not quantized", "quantization_config", remedy)
    for name in STEADY:
        if not 0 <= getattr(config, name, 0.0) < math.inf:
            remedy = "check that it belongs to these weights"
            raise refuse(f"{file}: {name}", "at least 0, and finite", getattr(config, name), remedy)
    for name in SIZES:
        size = getattr(config, name, None)
        if isinstance(size, int) and not 0 < size <= LARGEST:
            remedy = "check that it belongs to these weights"
            raise refuse(f"{file}: {name}", f"1 to {LARGEST:,}", size, remedy)
    return config


def _tensors(path: Path) -> dict[str, Stored]:
    """Every tensor by its name; each file is opened once, so a damaged one is found before any work."""
    file, index = path / "model.safetensors", path / INDEX
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
        raise refuse(
            str(file),
            "a safetensors file",
            "something else" if os.path.exists(file) else "none there",
            "download the checkpoint again, or save it with save_pretrained(safe_serialization=True)",
        )
    try:
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {name: Stored(file, tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
    except (SafetensorError, OSError) as error:
        raise refuse(
            str(file),
            "a whole safetensors file",
            f"{file.stat().st_size} bytes that end early or are damaged ({reason(error)})",
            "copy or download it again",
        ) from error


class Writer:
    """Safetensors shards of a bounded size, with the index that transformers reads."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises Refusal where a number is not finite in the tensor's dtype."""
        if tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):
            raise refuse(
                name,
                f"finite numbers in {str(tensor.dtype).removeprefix('torch.')}",
                "others",
                "look for such numbers in the source, or for a learning rate that was too high; "
                "what grows beyond float16 fits into bfloat16",
            )
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        save_file(self._pending, self.folder / f"{len(self._shards)}.part", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def close(self) -> None:
        self._flush()
        N = len(self._shards)
        files = [
            f"model-{i + 1:05d}-of-{N:05d}.safetensors" if N > 1 else "model.safetensors" for i in range(N)
        ]
        for i, file in enumerate(files):
            os.rename(self.folder / f"{i}.part", self.folder / file)
        if N > 1:
            where = {name: file for names, file in zip(self._shards, files, strict=True) for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": where}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2))


def write_checkpoint(
    dst: str | Path,
    config: PreTrainedConfig,
    tensors: Iterator[tuple[str, Tensor]],
    rows: Sequence[Row],
    source: Checkpoint,
    record: dict,
) -> None:
    """Configuration, a tensor for each row, growth.json, a card, the source's tokenizer: all, or nothing.

    tensors: by the rows' names and in their order; each is rounded to its row's dtype here, and only here.
    """
    console = Console(stderr=True)
    with staged(dst) as folder:
        copy_companions(source.path, folder)
        config.save_pretrained(folder)
        writer = Writer(folder)
        live = {"console": console, "transient": True, "disable": not console.is_terminal}
        for row, (name, tensor) in zip(rows, track(tensors, str(dst), len(rows), **live), strict=True):
            assert name == row.name
            writer.add(name, tensor.to(getattr(torch, row.dtype)))
        source.refuse_changed()
        writer.close()
        (folder / RECORD).write_text(json.dumps(record, indent=1))
        write_card(folder, Path(dst).absolute().name, source.path, config, *made(record))
