"""Do two tokenizers do the same? And a folder whose model is of another type reads text as its source's did.

Which class transformers makes of a tokenizer's files follows from the model's type, too, and a class may have
its own way to split text, whatever the files say.
"""

import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from growth.errors import Refusal, reason
from growth.loading import load_tokenizer

# Where tokenizers differ: numbers, contractions, white space, accents, scripts, what is in no vocabulary.
SAMPLE = (
    "Hello  World! It's 12345.67 tests,\n\n\tdon't  stop   \r\n"
    "caf\u00e9 cafe\u0301 \u00c5 \u212b \ufb01 \u6f22\u5b57\u304b\u306a \u0627 \U0001f468\u200d\U0001f469 "
    "def f(x_1): x+=1 # <s></s><|endoftext|> [MASK] snake_case camelCase http://a.b/c?d=e \u2581x \u0120y "
)


def other_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """How two tokenizers differ in what they do; "" where they do not: their classes do not count."""
    if differ := len(one.get_vocab().items() ^ other.get_vocab().items()):
        return f"{differ} other tokens"
    split, others = (_split(x, False) for x in (one, other))
    return "" if split == others else "one that splits text otherwise"


def keep_tokenizer(source: Path, folder: Path) -> None:
    """Make what was copied to `folder` the tokenizer of `source`, where transformers reads another there.

    One that cannot be read in `source` stays as it is.
    """
    try:
        own = load_tokenizer(source)
    except Refusal:
        return
    if not _is_alike(own, folder):
        own.save_pretrained(folder)
        if not _is_alike(own, folder):
            told = f"transformers reads text otherwise beside the new model, load the tokenizer of {source}"
            print(f"{source}: {told}", file=sys.stderr)


def _split(tokenizer: PreTrainedTokenizerBase, around: bool) -> list[int] | str:
    """The sample's tokens, or why there are none, as where a vocabulary has no token for what it lacks."""
    try:
        return tokenizer.encode(SAMPLE, add_special_tokens=around)
    except Exception as error:
        return reason(error)


def _is_alike(own: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether the tokenizer in `folder` does the same, around a text, too."""
    try:
        found = load_tokenizer(folder)
    except Refusal:
        return False
    around = ((_split(x, True), x.special_tokens_map) for x in (own, found))
    return not other_tokens(own, found) and next(around) == next(around)
