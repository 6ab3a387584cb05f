"""What the models of a family learn from, and what they are measured on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from growth.demo.corpus import bpe_tokenizer, byte_tokenizer, corpus, prose
from growth.demo.digits import digits
from growth.demo.scales import Numbers
from growth.training.corpus import tokens
from growth.training.curve import evaluate
from growth.training.data import Windows, collator
from growth.training.examples import Examples

PROMPT = "def "


@dataclass(frozen=True)
class Material:
    """far: of another domain, where there is one; said: what all this is; classes: of tokens or of images."""

    examples: Examples
    held_out: Examples
    far: Examples | None
    unit: str
    said: str
    classes: int
    tokenizer: PreTrainedTokenizerFast | None = None

    def losses(self, model: PreTrainedModel, of: Examples, auto: type, folder: Path) -> Tensor:
        """A model's loss on each of these, [N]; of a masked model always on the same tokens."""
        if (collate := collator(auto, folder)) is None:
            return of.losses(model)
        masked = collate([of[i] for i in range(len(of))], seed=0)
        pairs = zip(masked["input_ids"].split(1), masked["labels"].split(1))
        return torch.tensor([evaluate(model, *pair) for pair in pairs])

    def beside(self, folder: Path) -> None:
        """Writes what belongs beside a fresh model."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def told(self, model: PreTrainedModel, numbers: Numbers, seed: int) -> dict:
        """What a trained model does, beside its losses: its accuracy, or a few words that it writes."""
        if self.tokenizer is None:
            return {"accuracy": self.held_out.accuracy(model)}
        if self.tokenizer.mask_token is not None:
            return {}
        prompt = self.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
        torch.manual_seed(seed)
        text = model.generate(**prompt, max_new_tokens=numbers.corpus.words, do_sample=True, temperature=0.7)
        return {"sample": self.tokenizer.decode(text[0])}


def text(numbers: Numbers, folder: Path | None, masked: bool) -> Material:
    """Python's standard library; what is trained on and measured on is left as text in `folder`, if any."""
    asked = numbers.corpus
    train, validation = corpus(asked.bytes, packages=asked.packages)
    tokenizer = bpe_tokenizer(train, asked.vocabulary, masked) if asked.vocabulary else byte_tokenizer()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in (("train", train), ("validation", validation)):
            (folder / f"{name}.txt").write_text("".join(texts), encoding="utf-8")
    windows, held_out, far = (
        Windows(tokens(texts, tokenizer), asked.length) for texts in (train, validation, prose())
    )
    held_out, far = held_out.sample(numbers.held_out), far.sample(numbers.held_out)
    where = "Python's standard library" + " and of what is installed beside it" * asked.packages
    kind = f"a BPE of {asked.vocabulary} tokens, trained on it" if asked.vocabulary else "a token a byte"
    said = (
        f"Text: {len(train)} files of {where} ({kind}: {len(windows) * asked.length:,} tokens). "
        f"Measured: {numbers.held_out} windows of {asked.length} tokens, always the same, out of "
        f"{len(validation)} files that were not trained on. Another domain: as many windows of Python's "
        "reference manual, which is English."
    )
    return Material(
        windows,
        held_out,
        far,
        f"nats a {'token' if asked.vocabulary else 'byte'}",
        said,
        len(tokenizer),
        tokenizer,
    )


def images(numbers: Numbers) -> Material:
    train, held_out = digits(numbers.held_out)
    said = (
        f"Images: {len(train) // 9} handwritten digits of 8 x 8 pixels that come with scikit-learn, each "
        f"moved by up to a pixel. Measured: {len(held_out)} others."
    )
    return Material(train, held_out, None, "nats an image", said, 10)


def material(numbers: Numbers, folder: Path | None) -> Material:
    """Of a family; texts are written to `folder`."""
    return images(numbers) if numbers.corpus is None else text(numbers, folder, numbers.model == "bert")
