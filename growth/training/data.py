"""A corpus to windows of tokens: a window is `length` neighbouring tokens, and may know its documents."""

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
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
from growth.training.corpus import read_corpus
from growth.training.curve import window_losses
from growth.training.examples import Examples
from growth.training.sampled import some_tokens
from growth.training.texts import Paths, named

SOME = 1 << 20  # tokens that are looked at in one go


class Windows(Examples):
    """A corpus cut into windows of `length` tokens that do not overlap; what is left at the end is dropped.

    Item i is {"input_ids": [length], "labels": [length]}, both tokens i * length to (i + 1) * length: models
    of `transformers` shift the labels themselves, so a window holds length - 1 predictions. The corpus, of
    any integer dtype, may be a memory-mapped array: it is read as items are asked for.

    starts: where documents begin in the corpus. Windows are packed then: "position_ids" [length] count from 0
    in each document, by which models tell several in a row apart, and no label is a document's first token,
    which nothing before it tells. A document that a window cuts goes on in the next as one of its own.

    Raises Refusal where the corpus is shorter than one window.
    """

    unit = "windows"

    def __init__(self, corpus: Tensor | np.ndarray, length: int, starts: np.ndarray | None = None):
        count = len(corpus) // length
        if count < 1:
            _refuse_short("data", len(corpus), length)
        corpus = corpus.numpy() if isinstance(corpus, Tensor) else corpus
        self.rows, self.length, self.starts = corpus[: count * length].reshape(count, length), length, starts
        self.chosen = torch.arange(count)

    @property
    def packed(self) -> bool:
        return self.starts is not None

    @property
    def windows(self) -> Tensor:
        """All of them, int64 [N, length]."""
        return self.batch(range(len(self)))["input_ids"]

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Iterable[int]) -> dict[str, Tensor]:
        rows = self.chosen[list(indices)].numpy()
        ids = torch.from_numpy(self.rows[rows].astype(np.int64))
        if not self.packed:
            return {"input_ids": ids, "labels": ids.clone()}
        places = torch.stack([self._places(row) for row in rows.tolist()])
        return {"input_ids": ids, "labels": ids.masked_fill(places == 0, -100), "position_ids": places}

    def _places(self, row: int) -> Tensor:
        """Of each token of a window, counted from the last document's start or the window's."""
        first, place = row * self.length, torch.arange(self.length)
        here = slice(*np.searchsorted(self.starts, [first, first + self.length]))
        begins = torch.zeros(self.length, dtype=torch.int64)
        bounds = torch.from_numpy(np.asarray(self.starts[here]) - first)
        return place - begins.index_copy(0, bounds, bounds).cummax(0).values

    def at(self, indices: Tensor) -> "Windows":
        some = copy.copy(self)
        some.chosen = self.chosen[indices]
        return some

    def losses(self, model: nn.Module) -> Tensor:
        every = self.batch(range(len(self)))
        return window_losses(model, every["input_ids"], every["labels"], every.get("position_ids"))

    def fingerprint(self) -> str:
        crc = 0
        for ids, places in self._parts():
            crc = zlib.crc32(ids.astype(np.int32), crc)
            crc = crc if places is None else zlib.crc32(places, crc)
        return f"{self}, {crc:08x}"

    def refuse_foreign(self, config: PreTrainedConfig, what: str = "data") -> None:
        """Raises Refusal where a token is none of the model's: the text was cut by another tokenizer."""
        V = config.vocab_size
        for ids, _ in self._parts():
            for token in (ids.max().item(), ids.min().item()):
                if not 0 <= token < V:
                    raise refuse(what, f"tokens below the model's {V}", token, "use the model's tokenizer")

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """The windows, some at a time, and the places of their tokens where they are packed."""
        for rows in self.chosen.split(max(1, SOME // self.length)):
            places = [self._places(row) for row in rows.tolist()] if self.packed else None
            yield self.rows[rows.numpy()], None if places is None else torch.stack(places).numpy()


Data = Paths | Examples


def examples_of(
    data: Data,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int | None,
    what: str = "data",
    *,
    field: str = "text",
    pack: bool = False,
    cache: Path | None = None,
    windows: int | None = None,
    seed: int = 0,
) -> Examples:
    """Examples as they are, files and folders cut into windows; a refusal calls them `what`.

    field: of rows, which holds the text. pack: tell documents apart. cache: where many tokens are kept
    (training.corpus). windows: how many will be used; of much more text they come from places drawn by `seed`
    (training.sampled), and the rest is not read.
    """
    if isinstance(data, Examples):
        if pack and not (isinstance(data, Windows) and data.packed):
            remedy = "pass files, or Windows that know where documents start"
            raise refuse("pack", f"{what} whose documents are known", str(data), remedy)
        return data
    data = named(data, what)
    if windows is not None:
        some = some_tokens(data, tokenizer, length, windows, what, field, seed)
        if some is not None:
            return Windows(some, length)
    corpus = read_corpus(data, tokenizer, what, field, cache)
    if len(corpus.ids) < length:
        _refuse_short(what, len(corpus.ids), length)
    return Windows(corpus.ids, length, corpus.starts if pack else None)


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
