"""What two models are given to compare them: random input of their family's kind, or the tokens of a text."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from growth.checkpoint import Checkpoint
from growth.errors import Refusal, refuse
from growth.families import FAMILIES
from growth.loading import load_tokenizer
from growth.training.data import positions
from growth.training.sampled import first_tokens

MASKED = 0.15  # of the tokens, as in training


def probe(
    old: Checkpoint,
    new: Checkpoint,
    text: str | Path | None = None,
    *,
    batch: int = 2,
    length: int = 128,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Input that both models take, by the names of their arguments.

    images   pixel_values [batch, channels, height, width], standard normal
    tokens   input_ids [batch, T], uniform, with T as far as `length` and the models' positions reach
    masked   the same, some of them the mask of the source's tokenizer where that has one, and
             token_type_ids where there are several types
    pairs    the same twice: input_ids and decoder_input_ids

    text: a file, or a folder of them, whose first tokens by the source's tokenizer stand there instead; where
    it has fewer, the rows are fewer, or one shorter row. Raises Refusal where the models take no input of one
    kind and size, and where a text is given to models of images, cannot be read, or is not of their tokens.
    """
    kind, draw = kind_of(old), torch.Generator().manual_seed(seed)
    _refuse_other(new, "kind of input", kind, kind_of(new), "compare models of one family")
    if kind == "images":
        if text is not None:
            raise refuse("text", "none, for these models read images", text, "leave it out")
        shape = image_shape(old.config)
        _refuse_other(new, "images", shape, image_shape(new.config), "compare models of the same images")
        return {"pixel_values": torch.randn(batch, *shape, generator=draw)}
    V = old.config.vocab_size
    _refuse_other(new, "vocabulary", V, new.config.vocab_size, "compare models of one tokenizer")
    T = min(length, *(positions(model.config) or length for model in (old, new)))
    if text is None:
        ids, others = (_random(old.config, kind, (batch, T), draw) for _ in range(2))
    else:
        ids = others = _read(text, old, batch, T)
    if kind == "pairs":
        return {"input_ids": ids, "decoder_input_ids": others}
    return {"input_ids": ids} if kind == "tokens" else _masked(ids, old, draw)


def kind_of(checkpoint: Checkpoint) -> str:
    """The kind of input that a checkpoint takes. Raises Refusal where it is none of these."""
    family = FAMILIES.get(checkpoint.config.model_type)
    if family is None and not isinstance(getattr(checkpoint.config, "vocab_size", None), int):
        got = f"a {checkpoint.config.model_type}, of no known family and without words"
        raise refuse(str(checkpoint.path), "a model that reads words or images", got, "name another")
    return family.probe if family else "tokens"


def _refuse_other(new: Checkpoint, what: str, expected: object, got: object, remedy: str) -> None:
    if got != expected:
        raise refuse(str(new.path), f"the source's {what} of {expected}", got, remedy)


def image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height, width."""
    size = config.image_size
    return (config.num_channels, *((size, size) if isinstance(size, int) else size))


def _pad(config: PreTrainedConfig) -> int:
    """The pad token, -1 where there is none."""
    pad = getattr(config, "pad_token_id", None)
    return -1 if pad is None else pad


def _random(config: PreTrainedConfig, kind: str, shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Tokens, none of them the pad token where that is looked for."""
    V, pad = config.vocab_size, _pad(config)
    if kind == "tokens" or not 0 <= pad < V:
        return torch.randint(V, shape, generator=draw)
    ids = torch.randint(V - 1, shape, generator=draw)
    return ids + (ids >= pad)


def _read(text: str | Path, old: Checkpoint, batch: int, T: int) -> Tensor:
    """The first tokens of a text, at most [batch, T]."""
    corpus = first_tokens(text, load_tokenizer(old.path), batch * T, "text")
    if not len(corpus):
        raise refuse(f"text {text}", "a token at least", "none", "name another")
    if (most := corpus.max().item()) >= (V := old.config.vocab_size):
        raise refuse(f"text {text}", f"tokens below the model's {V}", most, "use the model's tokenizer")
    T = min(T, len(corpus))
    rows = min(batch, len(corpus) // T)
    return corpus[: rows * T].view(rows, T)


def _masked(ids: Tensor, old: Checkpoint, draw: torch.Generator) -> dict[str, Tensor]:
    """With some of them masked, and the types of tokens in turn, each a stretch."""
    try:
        mask = load_tokenizer(old.path).mask_token_id
    except Refusal:  # none there: tokens of all kinds do as well
        mask = None
    if mask is not None and mask < old.config.vocab_size:
        ids = ids.masked_fill(torch.rand(ids.shape, generator=draw) < MASKED, mask)
    kinds, T = getattr(old.config, "type_vocab_size", 1), ids.shape[1]
    if kinds < 2:
        return {"input_ids": ids}
    return {"input_ids": ids, "token_type_ids": (torch.arange(T) * kinds // T).expand_as(ids)}
