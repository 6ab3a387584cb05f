"""Which way each mixer of a model starts, and the weights that follow from it, a layer at a time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growth.errors import refuse
from growth.plan import Origin, Source
from growth.transferring.layers import Layers
from growth.transferring.mixers import (
    alibi_log_decays,
    mamba2_fields,
    mamba2_from_attention,
    retention_fields,
    retention_from_attention,
)
from growth.transferring.planned import ATTENTION, Start, Weights
from lcikernels.models import LCIConfig
from lcikernels.models.lm import LCIBlock

STARTS = ("published", "attention")
DECAYS = ("retnet", "alibi", "learned")
MIXER = "layers.{}.mixer."
# What is made of the attention's projections by "attention", besides a retention's, which have their names.
MAMBA2 = {
    "v.weight": ("v.weight",),
    "bc.weight": ("k.weight", "q.weight"),
    "conv1d.v.bias": ("v.bias",),
    "conv1d.bc.bias": ("k.bias", "q.bias"),
    "out_proj.weight": ("o.weight",),
}


def way(letter: str, start: str | None, copy: str, data: bool) -> str:
    """The start of a mixer. Where none is asked for, a retention starts from the attention if the copy mode
    says so, or if there are data to fit it to; what else starts as published trains better.

    Raises Refusal where there is no such start, or none for this mixer.
    """
    if start not in (None, *STARTS):
        raise refuse("start", f"one of {', '.join(STARTS)}", start, "choose one of these")
    if start == "attention" and letter == "M":
        raise refuse("start", "published for Mamba", start, "its gates and rates are no projections of attention's")
    if start == "attention" and letter == "R" and copy in ("norms", "mlp"):
        raise refuse("start", f"published, where copy {copy} makes mixers fresh", start, "leave copy out")
    if start is None and letter == "R":
        return "attention" if copy == "all" or (copy == "output" and data) else "published"
    return start or "published"


def mixer_fields(
    config: LCIConfig, letters: str, start: str | None, heads: int | None, decays: str | Sequence[float] | None
) -> dict[str, Any]:
    """The fields of mixers that can start so, in the place of config's attention.

    heads: a retention's. decays: retnet | alibi | learned, from RetNet's on | the share of its memory that
    each head keeps from token to token. Raises Refusal where they do not fit.
    """
    fields: dict[str, Any] = {}
    for name, given in (("retention-heads", heads), ("decays", decays)):
        if given is not None and "R" not in letters:
            raise refuse(name, "none, for no layer becomes a retention", given, "leave it out")
    if "R" in letters:
        fields |= retention_fields(config, heads)
        fields |= decay_fields(decays, fields["retention_num_heads"])
    if "S" in letters and start == "attention":
        fields |= mamba2_fields(config)
    return fields


def decay_fields(decays: str | Sequence[float] | None, heads: int) -> dict[str, Any]:
    if decays in (None, "retnet"):
        return {}
    if decays == "learned":
        return {"retention_learned_decay": True}
    if decays == "alibi":
        return {"retention_log_decay": alibi_log_decays(heads)}
    if isinstance(decays, str):
        raise refuse("decays", f"one of {', '.join(DECAYS)}, or a number for each head", decays, "choose one")
    if len(decays) != heads:
        raise refuse("decays", f"{heads} numbers, one for each head", len(decays), "give one for each")
    if wrong := [x for x in decays if not 0 < x <= 1]:
        remedy = "a head keeps that share of its memory from token to token"
        raise refuse("decays", "numbers above 0 and at most 1", wrong[0], remedy)
    return {"retention_log_decay": [math.log(x) for x in decays]}


class Starting:
    """How the mixers of the model `config` start from those of `source`, which as an LCI model is `old`.

    start, copy: as `transfer` has them; data: are there any to fit to.
    """

    def __init__(
        self, source: Source, old: LCIConfig, config: LCIConfig, start: str | None, copy: str, seed: int, data: bool
    ):
        self.source, self.old, self.config = source, old, config
        letters = dict.fromkeys(config.pattern)
        self.ways = {letter: way(letter, start, copy, data) for letter in letters if letter not in ATTENTION}
        self.same_heads = heads_of(old, "A") == heads_of(config, "R")
        self.copy = "all" if self.ways.get("R") == "attention" else copy
        self.seed = seed

    def weights(self, starts: Mapping[int, Start] | None = None) -> Weights:
        return Weights(self.source, self.config, self.copy, self.seed, starts)

    def layers(self, device: torch.device) -> tuple[Layers, Layers]:
        """The source's, all of them attention, and the model's with mixers as they are drawn or copied."""
        whole = Weights(self.source, self.old, "all", self.seed)
        return Layers(whole, device), Layers(self.weights(), device)

    def begin(self, letter: str, mixer: nn.Module, attention: nn.Module) -> None:
        """Start a mixer in place."""
        if self.ways[letter] == "attention" and letter == "R":
            retention_from_attention(mixer, attention, (pairs(self.old, "A"), pairs(self.config, "R")))
        elif self.ways[letter] == "attention":
            mamba2_from_attention(mixer, attention)

    def same(self, layer: int) -> bool:
        """Does it start with tensors of the source as they are, or fresh?"""
        letter = self.config.pattern[layer]
        return self.ways[letter] == "published" or (letter == "R" and self.same_heads)

    def made(self, layer: int) -> dict[str, Made]:
        """What the start alone makes of a layer's mixer, besides what is copied or fresh."""
        letter, base = self.config.pattern[layer], self.weights()
        if self.same(layer):
            return {}
        if letter == "S":
            of = {f"layers.{{}}.mamba2.{name}": sources for name, sources in MAMBA2.items()}
        else:
            of = {name: (name.removeprefix(MIXER),) for name in base.mixer(layer)}
        found = {}
        for name in base.mixer(layer):
            sources = tuple(x for part in of.get(name, ()) if ((x := MIXER + part), layer) in self.source)
            if sources and not (letter == "R" and name.split(".")[-2] in "vo" and base.copied(name, layer)):
                found[name] = Made("regrouped", sources)
        if letter == "S":
            found |= {f"layers.{{}}.mamba2.conv1d.{part}.weight": Made("regrouped", (), PASSES) for part in ("v", "bc")}
        return found

    def starts(self, device: torch.device) -> dict[int, Start]:
        """Those that need no data."""
        layers = [i for i, letter in enumerate(self.config.pattern) if letter not in ATTENTION and not self.same(i)]
        if not layers:
            return {}
        ends = self.layers(device)
        return {layer: Start(self.made(layer), partial(self._begun, *ends)) for layer in layers}

    def _begun(self, source: Layers, target: Layers, layer: int) -> dict[str, Tensor]:
        block = source.block(layer)
        own = target.with_mixer(layer, block)
        self.begin(self.config.pattern[layer], own.mixer, block.mixer)
        return target.values(layer, own.mixer)

    def lost(self) -> tuple[str, ...]:
        """What of the attention has no place in the mixers that start from it, a sentence each."""
        return tuple(sentence for letter, start in self.ways.items() if start == "attention" for sentence in LOST[letter](self.old, self.config))


def pairs(config: LCIConfig, letter: str) -> int:
    """How many pairs of dims of a head rotate."""
    return -(-config.rotary_dims[letter] // 2)


def heads_of(config: LCIConfig, letter: str) -> tuple[int, int, int]:
    """Heads, those of k and v, the dims of one."""
    if letter == "A":
        return config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return config.retention_num_heads, config.retention_num_kv_heads, config.retention_head_dim
