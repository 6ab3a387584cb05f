"""What a run trains on and is measured on: windows of text for language models, images for classifiers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerBase

from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.families import model_of
from growth.families.table import Model
from growth.loading import load_tokenizer
from growth.training.curve import evaluate
from growth.training.data import Collator, Data, collator, examples_of, window_length
from growth.training.examples import Examples
from growth.training.images import Images

HELD_OUT = 256  # windows; of 128 tokens, they compare two models to about 0.005 nats


@dataclass(frozen=True)
class Task:
    """examples are trained on, held_out is not. measure: a model's validation loss. collate: how examples
    become a batch, None for the Trainer's own way. tokenizer: of the text, None for images."""

    examples: Examples
    held_out: Examples
    measure: Callable[[nn.Module], float]
    collate: Collator | None
    tokenizer: PreTrainedTokenizerBase | None

    def first(self, batch_size: int) -> dict[str, Tensor]:
        """A batch, the same each time."""
        if self.collate:
            return self.collate([self.examples[i] for i in range(batch_size)], seed=0)
        return self.examples.batch(range(batch_size))


def task(
    checkpoint: Checkpoint,
    data: Data,
    validation: Data | None,
    sequence_length: int | None,
    *,
    field: str = "text",
    pack: bool = False,
    cache: Path | None = None,
) -> Task:
    """The task of training that checkpoint on `data`, measured on `validation` or on a part held out.

    field, pack, cache: as examples_of has them, of both. What a masked model is measured on is masked once.
    Raises Refusal where the data are of another kind than the model, or too few to hold some out, and where
    windows for a masked model, which reads all of a row at once, are to be packed.
    """
    seen = model_of(checkpoint.config, checkpoint.names)
    for name, given in (("data", data), ("validation", validation)):
        if given is not None:
            refuse_other_kind(seen, given, name)
    length = window_length(checkpoint.config, data, validation, sequence_length)
    tokenizer = load_tokenizer(checkpoint.path) if length else None
    collate = collator(seen.auto, checkpoint.path) if seen else None
    if pack and (collate or not length):
        got = f"a {checkpoint.config.model_type}"
        raise refuse("pack", "a causal language model", got, "leave it out")
    examples, held_out = split(data, validation, tokenizer, length, field=field, pack=pack, cache=cache)
    if not collate:
        return Task(examples, held_out, lambda model: held_out.losses(model).mean().item(), None, tokenizer)
    masked = collate([held_out[i] for i in range(len(held_out))], seed=0)
    measure = partial(evaluate, windows=masked["input_ids"], labels=masked["labels"])
    return Task(examples, held_out, measure, collate, tokenizer)


def split(
    data: Data,
    validation: Data | None,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int | None,
    *,
    field: str = "text",
    pack: bool = False,
    cache: Path | None = None,
) -> tuple[Examples, Examples]:
    """The examples to train on and those to measure on; the same ones for the same data."""

    def made(of: Data, what: str) -> Examples:
        place = cache / what if cache else None
        return examples_of(of, tokenizer, length, what, field=field, pack=pack, cache=place)

    examples = made(data, "data")
    if validation is not None:
        return examples, made(validation, "validation").sample(HELD_OUT)
    if len(examples) < 2:
        each = f" of {length} tokens" if length else ""
        raise refuse(
            "data",
            f"at least 2 {examples.unit}{each}, one to train on and one to measure on",
            len(examples),
            "give more text, a shorter sequence length, or validation text" if length else "give more",
        )
    return examples.hold_out(min(HELD_OUT, math.ceil(len(examples) / 20)))


def refuse_other_kind(model: Model | None, data: Data, what: str = "data") -> None:
    """Raises Refusal where text is given for a model of images or images for one of text, and where the model
    has no head that learns from them."""
    if model is None:
        return
    sees, images = model.family.probe == "images", isinstance(data, Images)
    kind = f"a {model.family.model_type}"
    if sees and not images:
        remedy = "call it from Python, with growth.training.images.Images"
        raise refuse(what, f"Images, which {kind} learns from", "text", remedy)
    if images and not sees:
        raise refuse(what, f"text, which {kind} learns from", "Images", "name files of text")
    refuse_headless(model)


def refuse_headless(model: Model, what: str = "model") -> None:
    """Raises Refusal where a model has no head that learns from examples."""
    sees = model.family.probe == "images"
    learns = "classes" in model.parts if sees else model.auto in (AutoModelForCausalLM, AutoModelForMaskedLM)
    if not learns:
        wanted = "an image classifier with one head" if sees else "a causal or a masked language model"
        raise refuse(what, wanted, model.written_as, "name another checkpoint")
