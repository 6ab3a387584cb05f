"""Text to windows of tokens.

A text is a file; a corpus is the tokens of its texts, one after the other, each ended by the tokenizer's
end-of-text token where it has one; a window is `length` neighbouring tokens of the corpus.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
)

from growth.adapters.table import Adapter
from growth.errors import refuse
from growth.loading import load_tokenizer

# The tokenizer holds about 100 bytes a token: a million characters at a time bound it to about 100 MB.
BATCH_CHARS = 1 << 20


def load_text(paths: str | Path | Iterable[str | Path]) -> list[str]:
    """The texts of files, in the order given; of a folder, every file below it, in the order of their names.

    Hidden files are left out of a folder, and so are its empty files. Raises Refusal where a file is missing
    or is not UTF-8, where a file that was named is empty, and where a folder holds no text at all.
    """
    texts = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if not path.exists():
            raise refuse(f"data {path}", "a file or a folder", "nothing there", "check the path")
        files = [path] if path.is_file() else _below(path)
        found = [text for text in map(_read, files) if text.strip()]
        if not found:
            got = "an empty file" if path.is_file() else f"a folder without any ({len(files)} files)"
            raise refuse(f"data {path}", "text", got, "name a file that holds text")
        texts += found
    if not texts:
        raise refuse("data", "at least one file or folder", "none", "name one")
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


class Windows(Dataset):
    """A corpus cut into windows of `length` tokens that do not overlap; what is left at the end is dropped.

    Item i is {"input_ids": [length], "labels": [length]}, both tokens i * length to (i + 1) * length: models
    of `transformers` shift the labels themselves, so a window holds length - 1 predictions. Raises Refusal
    where the corpus is shorter than one window.
    """

    def __init__(self, corpus: Tensor, length: int):
        count = len(corpus) // length
        if count < 1:
            raise refuse("data", f"at least {length} tokens, one window", len(corpus), "give more text")
        self.windows = corpus[: count * length].view(count, length).long()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}

    def batch(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """The windows of those indices as one batch, each tensor [B, length]."""
        windows = self.windows[list(indices)]
        return {"input_ids": windows, "labels": windows}

    def hold_out(self, count: int, seed: int = 0) -> tuple["Windows", Tensor]:
        """The dataset without `count` windows, and those, [count, length]; the same for the same seed."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        rest = order[count:].sort().values
        return Windows(self.windows[rest].flatten(), self.windows.shape[1]), self.windows[order[:count]]

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """`count` windows, or all where there are fewer, [count, length]; the same for the same seed."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.windows[order[:count]]

    def fingerprint(self) -> str:
        """How many they are, and a checksum of their tokens."""
        return f"{len(self)} windows, {zlib.crc32(self.windows.numpy()):08x}"

    def refuse_unfit(self, batch_size: int, vocabulary: int) -> None:
        """Raises Refusal where they are less than a batch, or not of the model's tokenizer."""
        if len(self) < batch_size:
            raise refuse(
                "data",
                f"at least one batch, {batch_size} windows of {self.windows.shape[1]} tokens",
                f"{len(self)} windows",
                "give more text, or a smaller batch size or sequence length",
            )
        refuse_foreign(self.windows, vocabulary)


Data = str | Path | Sequence[str | Path] | Windows


def windows_of(data: Data, tokenizer: PreTrainedTokenizerBase, length: int) -> Windows:
    """Windows as they are, files and folders cut into them."""
    return data if isinstance(data, Windows) else Windows(tokens(load_text(data), tokenizer), length)


def refuse_foreign(windows: Tensor, vocabulary: int) -> None:
    """Raises Refusal where a token is none of the model's: the text was cut by another tokenizer."""
    if (most := windows.max().item()) >= vocabulary:
        raise refuse("data", f"tokens below the model's {vocabulary}", most, "use the model's tokenizer")


Collator = Callable[..., dict[str, Tensor]]  # of windows, and a seed where it draws


def collator(adapter: Adapter, folder: str | Path) -> Collator | None:
    """How windows become a batch: None, the Trainer's own way, for a causal model; masked for a masked one.

    Of 15 % of the tokens, which alone are labels, 80 % turn into the mask, 10 % into any token; drawn anew
    for every batch, or alike for one `seed`. Raises Refusal where the tokenizer in `folder` is needed and has
    no mask.
    """
    if adapter.auto is not AutoModelForMaskedLM:
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.mask_token is None:
        raise refuse(str(folder), "a tokenizer with a mask token", "none", "save the model's own beside it")
    if len(tokenizer) > (V := AutoConfig.from_pretrained(folder).vocab_size):  # any of it may be drawn
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


def _below(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise refuse(
            f"data {file}",
            "UTF-8 text",
            f"byte {error.object[error.start]:#04x} at {error.start}",
            "convert the file, or leave it out",
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
