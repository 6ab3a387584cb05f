"""Do two models write the same? What a small difference of logits can hide, greedy continuations show."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from growth.checkpoint import Checkpoint
from growth.errors import refuse
from growth.loading import load_model, quiet
from growth.probes import kind_of, probe
from growth.training.data import positions

TOKENS = 64  # of a continuation, where the command line asks for them
PROMPTS, PROMPT = 8, 32  # as many, of at most so many tokens
CACHED = 1e-4  # of the largest logit: two orders of summing in float32, on a stack of any depth


@dataclass(frozen=True)
class Continuations:
    """How far the greedy continuations of a source and of a new model agree, in float32.

    count, tokens: so many prompts, each continued by so many tokens; an end-of-text token ends nothing.
    identical: the share of the continuations that are the same to the end. before: the tokens before the
    first difference, on average, `tokens` where there is none. agreeing: the share of the next tokens that
    are the same where both models read the source's continuation (teacher forcing).

    apart: of the differences, which are the first of each continuation and all those under teacher forcing,
    how many are no ties. A tie is where the source's logits of both tokens are at most `tie` apart: twice the
    largest difference that a promised equality allows, for each of the two may be off by that much.
    promised: is there such a promise. cached: the largest difference of the logits that the cache gave and
    those of the whole text at once, of the source and of the new model, None for one whose settings turn the
    cache off; limit: what of it is rounding, 1e-4 of the largest logit where that exceeds 1.
    """

    count: int
    tokens: int
    identical: float
    before: float
    agreeing: float
    apart: int
    tie: float
    promised: bool
    cached: tuple[float | None, float | None]
    limit: float

    @property
    def kept(self) -> bool:
        """False where a promised equality fails, or the new model's cache."""
        cached = self.cached[1] is None or self.cached[1] <= self.limit
        return cached and not (self.promised and self.apart)

    def __str__(self) -> str:
        said = [
            f"{self.identical:.1%} of {self.count} greedy continuations of {self.tokens} tokens are "
            f"identical, the first difference comes after {self.before:.1f} tokens, and {self.agreeing:.1%} "
            "of the next tokens agree after the source's text"
        ]
        if self.promised and self.apart:
            said.append(f"promised the same: BROKEN by {self.apart} that are no ties within {self.tie:.1e}")
        elif self.promised:
            ties = "" if self.identical == self.agreeing == 1 else f", but for ties within {self.tie:.1e}"
            said.append(f"promised the same: kept{ties}")
        for whose, apart in zip(("source", "new model"), self.cached, strict=True):
            if apart is None:
                said.append(f"the {whose}'s settings turn the cache off")
            elif not apart <= self.limit:
                said.append(f"the {whose}'s CACHE gives other logits than the whole text, by {apart:.1e}")
        return "; ".join(said)


def refuse_no_writer(old: Checkpoint, new: Checkpoint, tokens: int) -> None:
    """Raises Refusal where one of the models does not continue a text, and by so many tokens."""
    if tokens < 1:
        raise refuse("generate", "at least 1 token, or 0 for none", tokens, "choose a larger number")
    for model in (old, new):
        got = f"a {model.config.model_type}, {model.path}"
        if (kind := kind_of(model)) != "tokens":
            raise refuse("generate", "decoders, which continue a text", f"{got}, of {kind}", "leave it out")
        if (positions(model.config) or 2) < 2:
            raise refuse("generate", "a model of at least 2 positions", got, "leave it out")


@torch.no_grad()
def continuations(
    old: Checkpoint,
    new: Checkpoint,
    text: str | Path | None,
    tokens: int,
    seed: int,
    relative: float,
    promised: bool,
) -> Continuations:
    """Continue prompts greedily by `tokens` tokens, or as half the positions reach, with each model's cache.

    text, seed: of the prompts, as `growth.probes.probe` has them. relative: the difference that an equality
    allows, of the largest logit where that exceeds 1.
    """
    most = min([positions(model.config) or 2 * tokens + PROMPT for model in (old, new)])
    tokens = min(tokens, most // 2)
    length = min(PROMPT, most - tokens)
    prompts = probe(old, new, text, batch=PROMPTS, length=length, seed=seed)["input_ids"]
    model = load_model(old.path).eval()
    truth, cached = _continue(model, prompts, tokens)
    del model
    words, largest = truth.argmax(-1), max(1.0, truth.abs().max().item())
    model = load_model(new.path).eval()
    got, new_cached = _continue(model, prompts, tokens)
    forced = _whole(model, prompts, words).argmax(-1)
    free, tie = got.argmax(-1), 2 * relative * largest
    same = (free == words).long().cumprod(1)
    before = same.sum(1)
    first = torch.nn.functional.one_hot(before, tokens + 1)[:, :tokens].bool()  # none where all are the same
    tied = {name: _gap(truth, other) <= tie for name, other in (("free", free), ("forced", forced))}
    apart = (first & ~tied["free"]).sum() + ((forced != words) & ~tied["forced"]).sum()
    return Continuations(
        len(prompts),
        tokens,
        same[:, -1].double().mean().item(),
        before.double().mean().item(),
        (forced == words).double().mean().item(),
        int(apart),
        tie,
        promised,
        (cached, new_cached),
        CACHED * largest,
    )


def _continue(model: PreTrainedModel, prompts: Tensor, tokens: int) -> tuple[Tensor, float | None]:
    """The logits [B, tokens, V] of a greedy continuation; and how far from them are those of all its text at
    once, None where no cache gave them."""
    cached = False not in (model.generation_config.use_cache, getattr(model.config, "use_cache", None))
    model.generation_config = GenerationConfig()  # its own may end a text, or forbid words
    greedy = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=cached,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with quiet():
        given = {"attention_mask": torch.ones_like(prompts), "generation_config": greedy}
        out = model.generate(prompts, **given)
    logits = torch.stack(out.logits, 1).float()
    apart = (_whole(model, prompts, logits.argmax(-1)) - logits).abs().max().item()
    return logits, apart if cached else None


def _whole(model: PreTrainedModel, prompts: Tensor, words: Tensor) -> Tensor:
    """The logits [B, N, V] before each of the words [B, N] that follow prompts [B, P]; a row at a time, for
    those of the prompt are made too."""
    P = prompts.shape[1]
    rows = torch.cat([prompts, words[:, :-1]], 1).split(1)
    return torch.cat([model(row, use_cache=False).logits[:, P - 1 :] for row in rows]).float()


def _gap(logits: Tensor, words: Tensor) -> Tensor:
    """By how much the largest logit exceeds the word's [B, N]; NaN where the logits are."""
    return logits.amax(-1) - logits.gather(-1, words[..., None])[..., 0]
