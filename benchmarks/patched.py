"""transformers' own models before and after `compat.transformers.patch()`: training, a prompt, tokens.

Of 768 channels and 24 layers, mamba-130m's and mamba2-130m's. A case is a function that is called either way.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from benchmarks.answers import same
from lcikernels.compat.transformers import parts, patch, wrappers

HIDDEN, LAYERS, VOCABULARY, STEPS = 768, 24, 50280, 32


def mamba(layers: int) -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=layers))


def mamba2(layers: int) -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=layers)
    sizes |= dict(num_heads=2 * HIDDEN // 64, head_dim=64, state_size=128, n_groups=1)
    return Mamba2ForCausalLM(Mamba2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0))


def row(tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))


def training(model: PreTrainedModel, tokens: int) -> Callable[[], Tensor]:
    """Forward and backward of the loss, which it returns."""
    ids = row(tokens)

    def run() -> Tensor:
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return run


def prefill(model: PreTrainedModel, tokens: int) -> Callable[[], Tensor]:
    """A prompt, and the cache that generating from it begins with; the last token's logits."""
    ids = row(tokens)

    @torch.inference_mode()
    def run() -> Tensor:
        return model.eval()(input_ids=ids, use_cache=True).logits[:, -1]

    return run


def decoding(model: PreTrainedModel, tokens: int) -> Callable[[], Tensor]:
    """So many tokens one by one, from the cache of a short prompt; the logits of the last."""
    ids = row(STEPS + 1)

    @torch.inference_mode()
    def run() -> Tensor:
        out = model.eval()(input_ids=ids[:, :1], use_cache=True)
        for token in ids[:, 1:].split(1, dim=1):
            out = model(input_ids=token, cache=out.cache, use_cache=True)
        return out.logits[:, -1]

    return run


def patched(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call of a patched transformers."""

    @wraps(call)
    def run() -> Tensor:
        with patch():
            return call()

    return run


class Case(NamedTuple):
    """A call of a model of `LAYERS` layers, patched at least `ratio` times as fast.

    layers: of the unpatched model, where all would take minutes; tenth: a tenth of its memory is the target.
    """

    name: str
    model: Callable[[int], PreTrainedModel]
    mode: str
    make: Callable[[PreTrainedModel, int], Callable[[], Tensor]]
    tokens: int
    ratio: float
    layers: int = LAYERS
    tenth: bool = False

    def call(self, model: PreTrainedModel) -> Callable[[], Tensor]:
        return self.make(model, self.tokens)

    def flops(self, model: PreTrainedModel) -> int:
        """Of the matrix products alone: 2 for each weight and token, and 4 more where there is a backward."""
        matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
        each = 6 if self.make is training else 2
        return each * matrices * (STEPS if self.make is decoding else self.tokens)

    def named(self) -> dict[str, str]:
        """Its row in the report."""
        shape = f"layers={LAYERS} hidden={HIDDEN} T={self.tokens}"
        return dict(op=f"transformers' {self.name}", shape=shape, mode=self.mode)

    def __str__(self) -> str:
        return f"{self.name}-{self.mode}".replace(" ", "_")


CASES = [
    Case("MambaForCausalLM", mamba, "forward + backward", training, 512, 100, layers=1, tenth=True),
    Case("MambaForCausalLM", mamba, "a prompt", prefill, 512, 10, tenth=True),
    Case("MambaForCausalLM", mamba, f"{STEPS} tokens one by one", decoding, 1, 1.5),
    Case("Mamba2ForCausalLM", mamba2, "forward + backward", training, 2048, 2.5),
    Case("Mamba2ForCausalLM", mamba2, "a prompt", prefill, 2048, 1),
    Case("Mamba2ForCausalLM", mamba2, f"{STEPS} tokens one by one", decoding, 1, 1),
]


def installed(model: PreTrainedModel) -> str:
    """Who computes where it is not patched."""
    function = next(x for x in wrappers() if x.__module__ == type(model).__module__)
    theirs = parts(function)["is_new_implementation"].cell_contents
    return "the packages that are installed" if theirs else "plain torch"


def same_answer(case: Case, model: PreTrainedModel) -> None:
    """Raises where a patched call's answer is another than the call's."""
    call = case.call(model)
    theirs = call()
    same(patched(call)(), theirs)
