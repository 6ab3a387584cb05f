"""A GPT-NeoX and what it is transferred to: tokens one by one after long texts, prompts, steps of training.

And a layer of a small Llama, which a mixer is fitted to.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

import growth
from benchmarks.answers import same, wrong
from growth.loading import quiet
from growth.report import Report
from growth.training.data import Windows
from growth.transferring.align import Alignment
from lcikernels.models.cache import RecurrentLayer, state_bytes

PATTERNS = {"RetNet": "R", "Mamba": "M", "Mamba-2": "S", "hybrid of RetNet": "RA"}  # repeated
PROMPT = 16  # tokens that a state has really read


class Size(NamedTuple):
    """Of the source; and tokens: of contexts, decoded at a time, of a step of training, of a prompt, of its
    chunks."""

    hidden: int = 512
    layers: int = 4
    vocabulary: int = 8192
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536)
    decoded: int = 16
    trained: int = 2048
    prompt: int = 32768
    chunk: int = 2048

    def __str__(self) -> str:
        return f"layers={self.layers} hidden={self.hidden} vocabulary={self.vocabulary}"


SMALL = Size(64, 2, 256, (64, 256), 4, 64, 256, 64)


def saved(folder: Path, of: type[PreTrainedConfig], hidden: int, layers: int, length: int, **sizes) -> Path:
    """A random model in a new folder, its heads of 64 dims."""
    torch.manual_seed(0)
    sizes |= dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64)
    with quiet():
        model = AutoModelForCausalLM.from_config(of(**sizes, max_position_embeddings=2 * length))
        model.save_pretrained(folder)
    return folder


def source(size: Size, folder: Path) -> Path:
    length, sizes = max(*size.contexts, size.trained, size.prompt), dict(vocab_size=size.vocabulary)
    sizes["intermediate_size"] = 4 * size.hidden
    return saved(folder, GPTNeoXConfig, size.hidden, size.layers, length, **sizes)


def target(size: Size, name: str, folder: Path) -> Path:
    """What `growth transfer` makes of the source in `folder`, beside it."""
    out = folder.with_name(name)
    if not out.exists():
        growth.transfer(folder, out, pattern=(PATTERNS[name] * size.layers)[: size.layers])
    return out


def loaded(folder: Path) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def words(model: PreTrainedModel, count: int) -> Tensor:
    """Random tokens [1, count], the same for every model of a vocabulary."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, count), generator=draw).to(model.device)


@torch.inference_mode()
def filled(model: PreTrainedModel, context: int, room: int) -> Cache:
    """A cache as it is after `context` tokens, with room for more.

    Random keys and values stand in it, where attention has some; a recurrent state has read 16 tokens and
    counts as many as the others, for its size and cost do not follow from what it has read.
    """
    cache = StaticCache(config=model.config, max_cache_len=context + room)
    model(words(model, PROMPT), cache=cache, use_cache=True)
    for layer in cache.layers:
        if isinstance(layer, RecurrentLayer):
            layer.length = context
        else:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
    return cache


def decoding(model: PreTrainedModel, cache: Cache, count: int) -> Callable[[], Tensor]:
    """So many tokens one by one, whose places in the cache are given back; the logits of all of them."""
    tokens = words(model, count).split(1, dim=1)

    @torch.inference_mode()
    def run() -> Tensor:
        logits = [model(token, cache=cache, use_cache=True).logits for token in tokens]
        for layer in cache.layers:
            if isinstance(layer, RecurrentLayer):
                layer.length -= count
            else:
                layer.crop(-count)
        return torch.cat(logits, 1)

    return run


class Writer:
    """A model that writes tokens after so many others; checked in float32."""

    def __init__(self, folder: Path, context: int, size: Size, device: str = "cpu", dtype=torch.float32):
        self.model, self.context = loaded(folder).to(device), context
        self.wrong = wrong(as_the_whole, self.model, size.decoded)
        self.model.to(dtype)
        cache = filled(self.model, context, size.decoded)
        self.call, self.bytes = decoding(self.model, cache, size.decoded), sum(state_bytes(cache))

    def least(self) -> tuple[float, float]:
        """Bytes and operations of a token: every matrix is read and the state; what is written is less."""
        matrices = [module.weight for module in self.model.modules() if isinstance(module, nn.Linear)]
        numbers = sum(weight.numel() for weight in matrices)
        return matrices[0].element_size() * numbers + self.bytes, 2 * numbers


@torch.inference_mode()
def as_the_whole(model: PreTrainedModel, count: int) -> None:
    """AssertionError where tokens one by one get other logits than all at once."""
    tokens = words(model, PROMPT + count)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + count)
    parts = [tokens[:, :PROMPT], *tokens[:, PROMPT:].split(1, dim=1)]
    got = torch.cat([model(part, cache=cache, use_cache=True).logits for part in parts], 1)
    same(got, model(tokens, use_cache=False).logits)


def reading(model: PreTrainedModel, count: int, chunk: int | None) -> Callable[[], Tensor]:
    """A prompt of so many tokens, in chunks or at once; the logits of the token after it."""
    prompt = words(model, count)
    given = {"attention_mask": torch.ones_like(prompt), "prefill_chunk_size": chunk}
    one = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def run() -> Tensor:
        return model.generate(prompt, **given, **one).logits[0]

    return run


def training(model: PreTrainedModel, count: int) -> Callable[[], Tensor]:
    """Forward, backward and AdamW on one row of tokens; returns the loss before it."""
    tokens = words(model, count)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)

    def run() -> Tensor:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


@torch.no_grad()
def as_in_float64(folder: Path, count: int) -> None:
    """AssertionError where the logits are others than those of the same weights in float64."""
    model = loaded(folder)
    tokens = words(model, count)
    got = model(tokens).logits
    same(got, model.double()(tokens).logits)


class Aligning(NamedTuple):
    """A layer of SmolLM-135M, and the windows that a mixer is fitted to its attention on."""

    hidden: int = 576
    vocabulary: int = 49152
    steps: int = 100
    batch: int = 8
    length: int = 512

    def __str__(self) -> str:
        return f"hidden={self.hidden}, {self.steps} batches of {self.batch} x {self.length}"

    def source(self, folder: Path) -> Path:
        """Random, of one layer, of which alone aligning has to know."""
        sizes = dict(vocab_size=self.vocabulary, num_key_value_heads=self.hidden // 192)
        sizes |= dict(intermediate_size=self.hidden * 8 // 3, tie_word_embeddings=True)
        return saved(folder, LlamaConfig, self.hidden, 1, self.length, **sizes)

    def aligned(self, source: Path, name: str) -> Report:
        """The transfer of the source, beside it, with its mixer fitted."""
        size, length = self.batch, self.length
        how = Alignment(self.steps, batch_size=size, step_size=size, sequence_length=length)
        draw = torch.Generator().manual_seed(0)
        corpus = torch.randint(self.vocabulary, (how.batches * self.batch * self.length,), generator=draw)
        data, out = Windows(corpus, self.length), source.with_name(name)
        return growth.transfer(source, out, pattern=PATTERNS[name][0], align=how, data=data)
