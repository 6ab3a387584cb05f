"""Checkpoints as folders of safetensors: read one tensor at a time, written all at once or not at all."""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from growth.errors import refuse

RECORD = "growth.json"  # how a checkpoint came to be
SHARD_BYTES = 5 * 10**9
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "spiece.model",
    "chat_template*",
)


class Checkpoint:
    """A folder in the Hugging Face format. Tensors are read one by one; nothing else is held in memory."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = _config(self.path)
        self._shard = _shards(self.path)

    @property
    def names(self) -> list[str]:
        return list(self._shard)

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._shard[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        with safe_open(self._shard[name], "pt") as file:
            return file.get_slice(name)[:0].dtype

    def read(self, name: str) -> Tensor:
        with safe_open(self._shard[name], "pt") as file:
            return file.get_tensor(name)

    def record(self) -> dict:
        """What growth wrote about this checkpoint, {} where it came from elsewhere."""
        path = self.path / RECORD
        return _json(path, "verb") if path.exists() else {}


def _config(path: Path) -> PreTrainedConfig:
    import lcikernels.models  # noqa: F401  - registers its configuration with AutoConfig

    if not (path / "config.json").is_file():
        got = "a folder without it" if path.is_dir() else "a file" if path.exists() else "nothing there"
        raise refuse(
            str(path), "a checkpoint folder with config.json", got, "name a folder that save_pretrained wrote"
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, TypeError, ArithmeticError, OSError, StrictDataclassError) as error:
        raise refuse(
            str(path / "config.json"),
            "a configuration that transformers knows",
            str(error).splitlines()[0],
            "check the file",
        ) from error


def _shards(path: Path) -> dict[str, Path]:
    """Tensor name -> its file; each is opened once, so a truncated one is found before any work."""
    index, files = path / "model.safetensors.index.json", [path / "model.safetensors"]
    if index.exists() and not files[0].exists():  # where both are, transformers reads the one file
        files = sorted({path / str(name) for name in _json(index, "weight_map")["weight_map"].values()})
    shards: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise refuse(
                str(file),
                "a safetensors file",
                "none there",
                "download the checkpoint again, or save it with save_pretrained(safe_serialization=True)",
            )
        try:
            with safe_open(file, "pt") as tensors:
                shards |= dict.fromkeys(tensors.keys(), file)
        except SafetensorError as error:
            raise refuse(
                str(file),
                "a whole safetensors file",
                f"{file.stat().st_size} bytes that end early or are damaged ({error})",
                "copy or download it again",
            ) from error
    return shards


def refuse_existing(dst: str | Path) -> None:
    """Nothing is overwritten, and long work does not begin where its result has no place."""
    dst = Path(dst)
    above = next(folder for folder in dst.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise refuse(
            str(dst), "a folder to write it in", f"{above}, where nothing can be written", "name another"
        )
    if dst.exists() or dst.is_symlink():
        raise refuse(
            str(dst),
            "an output folder that does not exist yet",
            "one that does",
            "name another, or remove it first",
        )


def _json(path: Path, key: str) -> dict:
    """The object in a file of JSON, which must have this key."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise refuse(str(path), "JSON", str(error), "copy or download it again") from error
    if not isinstance(found, dict) or key not in found:
        raise refuse(str(path), f"an object with {key!r}", "one without", "copy or download it again")
    return found


def publish(folder: Path, dst: Path) -> None:
    """Rename a finished folder to `dst`. Where that was taken meanwhile, it stays beside it: dst-2, dst-3, ...

    Raises Refusal then, which names the place. Nothing finished is deleted, nothing is overwritten.
    """
    if not (dst.exists() or dst.is_symlink()):
        os.rename(folder, dst)
        return
    beside = next(x for i in itertools.count(2) if not os.path.lexists(x := dst.with_name(f"{dst.name}-{i}")))
    os.rename(folder, beside)
    raise refuse(str(dst), "a free place", f"one that was taken meanwhile: the result is in {beside}", "rename it")


@contextlib.contextmanager
def staged(dst: str | Path) -> Iterator[Path]:
    """A temporary folder beside `dst` that becomes `dst` when the block ends well, and is removed when it
    does not.

    Raises Refusal where `dst` exists.
    """
    dst = Path(dst)
    refuse_existing(dst)
    dst.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{dst.name}-", dir=dst.parent))
    try:
        yield folder
        folder.chmod(0o755)
        os.rename(folder, dst)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class Writer:
    """Safetensors shards of a bounded size, with the index that transformers reads."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
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
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_checkpoint(
    dst: str | Path,
    config: PreTrainedConfig,
    tensors: Iterator[tuple[str, Tensor]],
    count: int,
    source: Path,
    record: dict,
) -> None:
    """Configuration, `count` tensors, growth.json, the source's tokenizer: all of it, or nothing."""
    console = Console(stderr=True)
    with staged(dst) as folder:
        writer = Writer(folder)
        for name, tensor in track(
            tensors, str(dst), count, console=console, transient=True, disable=not console.is_terminal
        ):
            writer.add(name, tensor)
        writer.close()
        config.save_pretrained(folder)
        for pattern in (*TOKENIZER, "generation_config.json"):
            for file in source.glob(pattern):
                shutil.copy2(file, folder)
        (folder / RECORD).write_text(json.dumps(record, indent=1))
