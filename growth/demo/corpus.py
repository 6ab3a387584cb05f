"""The demo's corpus, Python's own standard library: real text that every machine has; and its tokenizers."""

import contextlib
import random
import sysconfig
import tokenize
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from growth.errors import refuse

# Tests, and two packages that are tables: character sets, the text of `help()`.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def corpus(
    limit: int = 4_000_000, share: float = 0.1, seed: int = 0, packages: bool = False
) -> tuple[list[str], list[str]]:
    """The texts to train on and to validate on: .py files of the standard library, `limit` bytes of them.

    Files are shuffled by `seed` and taken until `limit` is reached, those to validate on first: at least
    `share` of the bytes. No file is in both lists. packages: of what is installed beside it, too, which
    differs. Raises Refusal where the standard library has no sources.
    """
    roots = [Path(sysconfig.get_path(kind)) for kind in ("stdlib", *["purelib"] * packages)]
    files = [
        file
        for root in roots
        for file in sorted(root.rglob("*.py"))
        if LEFT_OUT.isdisjoint(file.relative_to(root).parts) and file.stat().st_size
    ]
    size, limit = 0, min(limit, sum(file.stat().st_size for file in files))
    random.Random(seed).shuffle(files)
    train, validation = [], []
    for file in files:
        with contextlib.suppress(SyntaxError, UnicodeDecodeError), tokenize.open(file) as lines:
            text = lines.read()  # by the file's own coding line; a package may have broken files
            (validation if size < share * limit else train).append(text)
            size += len(text.encode())
        if size >= limit:
            break
    if not train or not validation:
        raise refuse(
            f"demo corpus {roots[0]}",
            "the .py files of the standard library",
            f"{len(files)} of them",
            "use a Python that ships its sources",
        )
    return train, validation


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens, one a byte: token i is byte i, and decoding is exact."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte)
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def _byte(symbol: str) -> int:
    """The byte a symbol of the byte-level alphabet stands for.

    Printable Latin-1 stands for itself; the other bytes, in order, are the code points from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    code = ord(symbol)
    return code if code < 256 else others[code - 256]


def prose() -> list[str]:
    """Text of another domain: the chapters of Python's reference manual that `help()` shows, in English."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def bpe_tokenizer(texts: list[str], vocabulary: int, masked: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of that many tokens, trained on the texts; masked: with a token for the mask."""
    special = ["<|end|>", *(["<|mask|>"] * masked)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {"eos_token": special[0], "pad_token": special[0]} | (
        {"mask_token": special[1]} if masked else {}
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
