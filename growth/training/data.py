"""Text to windows of tokens.

A text is a file; a corpus is the tokens of its texts, one after the other, each ended by the tokenizer's
end-of-text token where it has one; a window is `length` neighbouring tokens of the corpus.
"""

import codecs
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.families import FAMILIES
from growth.families.table import all_positions
from growth.loading import load_tokenizer
from growth.training.curve import window_losses
from growth.training.examples import Examples

# The tokenizer holds about 100 bytes a token: a million characters at a time bound it to about 100 MB.
BATCH_CHARS = 1 << 20
MARKS = {  # the longer first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def load_text(paths: str | Path | Iterable[str | Path], what: str = "data") -> list[str]:
    """The texts of files, in the order given; of a folder, every file below it, in the order of their names.

    Hidden files are left out of a folder, and so are its empty files; links are followed. A byte-order mark
    is no text. Raises Refusal, which calls the argument `what`, where a file is missing, cannot be read or is
    not UTF-8, where a file that was named is empty, and where a folder holds no text at all.
    """
    texts = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        if not str(path) or "\0" in str(path):
            raise refuse(what, "the name of a file or a folder", repr(str(path)), "name one")
        path = Path(path)
        files = list(_files(path, what))
        found = [text for file in files if (text := _read(file, what)).strip()]
        if not found:
            got = f"a folder without any ({len(files)} files)" if path.is_dir() else "an empty file"
            raise refuse(f"{what} {path}", "text", got, "name a file that holds text")
        texts += found
    if not texts:
        raise refuse(what, "at least one file or folder", "none", "name one")
    return texts


def tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The corpus, int64 [N]: the tokens of every text, each ended by the end-of-text token if any."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = []
    for batch in _batches(texts):
        pieces = [piece for piece, _ in batch]
        encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for (_, last), ids in zip(batch, encoded["input_ids"]):
            parts.append(torch.tensor(ids + end if last else ids))
    return torch.cat(parts)


class Windows(Examples):
    """A corpus cut into windows of `length` tokens that do not overlap; what is left at the end is dropped.

    Item i is {"input_ids": [length], "labels": [length]}, both tokens i * length to (i + 1) * length: models
    of `transformers` shift the labels themselves, so a window holds length - 1 predictions. Raises Refusal
    where the corpus is shorter than one window.
    """

    unit = "windows"

    def __init__(self, corpus: Tensor, length: int):
        count = len(corpus) // length
        if count < 1:
            _refuse_short("data", len(corpus), length)
        super().__init__(corpus[: count * length].view(count, length).long())
        self.length = length

    @property
    def windows(self) -> Tensor:
        return self.tensors[0]

    def named(self, *tensors: Tensor) -> dict[str, Tensor]:
        (windows,) = tensors
        return {"input_ids": windows, "labels": windows}

    def at(self, indices: Tensor) -> "Windows":
        return Windows(self.windows[indices].flatten(), self.length)

    def losses(self, model: nn.Module) -> Tensor:
        return window_losses(model, self.windows)

    def refuse_foreign(self, config: PreTrainedConfig, what: str = "data") -> None:
        """Raises Refusal where a token is none of the model's: the text was cut by another tokenizer."""
        V = config.vocab_size
        for token in (self.windows.max().item(), self.windows.min().item()):
            if not 0 <= token < V:
                raise refuse(what, f"tokens below the model's {V}", token, "use the model's tokenizer")


Data = str | Path | Sequence[str | Path] | Examples


def examples_of(
    data: Data, tokenizer: PreTrainedTokenizerBase | None, length: int | None, what: str = "data"
) -> Examples:
    """Examples as they are, files and folders cut into windows; a refusal calls them `what`."""
    if isinstance(data, Examples):
        return data
    corpus = tokens(load_text(data, what), tokenizer)
    if len(corpus) < length:
        _refuse_short(what, len(corpus), length)
    return Windows(corpus, length)


def window_length(
    config: PreTrainedConfig,
    data: Data,
    validation: Data | None,
    sequence_length: int | None,
    *,
    usual: int = 2048,
) -> int | None:
    """Tokens a window: those of the Windows given, else `sequence_length`, else `usual` if the model has it.

    None for examples without tokens. Raises Refusal where two of them differ, where it is no sequence, and
    where the model has fewer positions.
    """
    if isinstance(data, Examples) and data.length is None:
        if sequence_length is not None:
            got = f"{sequence_length} for {data.unit}"
            raise refuse("sequence length", "none, where there are no tokens", got, "leave it out")
        return None
    lengths = [
        (name, given.length)
        for name, given in (("data", data), ("validation", validation))
        if isinstance(given, Windows)
    ]
    if sequence_length is not None:
        lengths.insert(0, ("sequence length", sequence_length))
    most = positions(config)
    if not lengths:
        return min(most or usual, usual)
    (name, length), *others = lengths
    for other, got in others:
        if got != length:
            raise refuse(other, f"windows of {length} tokens, as the {name} has", got, "cut them alike")
    if length < 2:
        raise refuse(name, "at least 2", length, "choose a larger number")
    if most and length > most:
        remedy = f"choose at most {most}"
        if (
            hasattr(config, "rope_parameters")
            and getattr(config, "position_embedding_type", "rope") == "rope"
        ):
            remedy += ", or raise max_position_embeddings in its config.json"
        raise refuse(name, f"at most {most} tokens, the model's positions", length, remedy)
    return length


def positions(config: PreTrainedConfig) -> int | None:
    """The tokens that a model is made for at most; None where there is no such number."""
    family = FAMILIES.get(config.model_type)
    return family.positions(config) if family else all_positions(config)


def _refuse_short(what: str, tokens: int, length: int) -> NoReturn:
    shorter = f", or a sequence length of at most {tokens}" if tokens > 1 else ""
    raise refuse(what, f"at least {length} tokens, one window", tokens, f"give more text{shorter}")


Collator = Callable[..., dict[str, Tensor]]  # of windows, and a seed where it draws


def collator(auto: type, folder: str | Path) -> Collator | None:
    """How windows become a batch: None, the Trainer's own way, for a causal model; masked for a masked one.

    Of 15 % of the tokens, which alone are labels, 80 % turn into the mask, 10 % into any token; drawn anew
    for every batch, or alike for one `seed`. Raises Refusal where the tokenizer in `folder` is needed and has
    no mask.
    """
    if auto is not AutoModelForMaskedLM:
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.mask_token is None:
        raise refuse(str(folder), "a tokenizer with a mask token", "none", "save the model's own beside it")
    if len(tokenizer) > (V := Checkpoint(folder).config.vocab_size):  # any of it may be drawn
        raise refuse(
            str(folder),
            f"a tokenizer of the model's {V} tokens",
            len(tokenizer),
            "save the model's own beside it",
        )
    masking = DataCollatorForLanguageModeling(tokenizer)

    def masked(windows: Sequence[dict[str, Tensor]], seed: int | None = None) -> dict[str, Tensor]:
        masking.generator = None if seed is None else torch.Generator().manual_seed(seed)
        ids, labels = masking.torch_mask_tokens(torch.stack([window["input_ids"] for window in windows]))
        return {"input_ids": ids, "labels": labels}

    return masked


def _files(path: Path, what: str, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The file at `path`, or all below the folder at `path`, which lies in the folders `above`."""
    name = f"{what} {path}"
    try:
        kind = path.stat().st_mode
        if stat.S_ISREG(kind):
            yield path
            return
        if not stat.S_ISDIR(kind):
            raise refuse(name, "a file or a folder", "a pipe or a device", "copy what it gives to a file")
        real = path.resolve()
        if real in above:
            raise refuse(name, "a folder", f"a link back to {real}, where it lies itself", "remove the link")
        inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    except FileNotFoundError as error:
        got = "a link to nothing" if path.is_symlink() else "nothing there"
        raise refuse(name, "a file or a folder", got, "check the path") from error
    except OSError as error:
        remedy = "check its links and permissions"
        raise refuse(name, "a file or a folder that can be read", error.strerror, remedy) from error
    for file in inside:
        yield from _files(file, what, (*above, real))


def _read(file: Path, what: str) -> str:
    name = f"{what} {file}"
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise refuse(name, "a file that can be read", error.strerror, "check its permissions") from error
    for mark, encoding in MARKS.items():
        if raw.startswith(mark):
            raise refuse(name, "UTF-8 text", f"{encoding}, by its first bytes", "convert it to UTF-8")
    if (at := raw.find(0)) >= 0:
        remedy = "is it UTF-16, or binary? Convert it to UTF-8, or leave it out"
        raise refuse(name, "UTF-8 text", f"NUL bytes, the first at {at}", remedy)
    text = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return text.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        at = error.start + len(raw) - len(text)
        raise refuse(
            name, "UTF-8 text", f"byte {raw[at]:#04x} at {at}", "convert the file, or leave it out"
        ) from error


def _batches(texts: Sequence[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of the texts, about BATCH_CHARS a batch, and whether a piece is its text's last."""
    batch, size = [], 0
    for text in texts:
        pieces = list(_pieces(text))
        for i, piece in enumerate(pieces):
            batch.append((piece, i == len(pieces) - 1))
            size += len(piece)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most BATCH_CHARS, cut behind a line where there is one."""
    start = 0
    while len(text) - start > BATCH_CHARS:
        end = text.rfind("\n", start, start + BATCH_CHARS) + 1 or start + BATCH_CHARS
        yield text[start:end]
        start = end
    yield text[start:]
