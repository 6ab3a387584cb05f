"""Which way each mixer of a model starts, and the weights that follow from it, a layer at a time."""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from growth.errors import refuse
from growth.plan import Source
from growth.transferring.layers import Layers
from growth.transferring.mixers import (
    mamba2_fields,
    mamba2_from_attention,
    regrouped,
    retention_from_attention,
)
from growth.transferring.planned import Made, Start, Weights
from growth.transferring.sources import lci_config, pattern_of
from lcikernels.layers import Retention
from lcikernels.models import LCIConfig
from lcikernels.models.fields import ATTENTION

STARTS = ("published", "attention")
PASSES = "passes each token on"
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
        raise refuse(
            "start", "published for Mamba", start, "its gates and rates are no projections of attention's"
        )
    if start == "attention" and letter == "R" and copy in ("norms", "mlp"):
        raise refuse("start", f"published, where copy {copy} makes mixers fresh", start, "leave copy out")
    if start is None and letter == "R":
        return "attention" if copy == "all" or (copy == "output" and data) else "published"
    return start or "published"


class Starting:
    """How mixers start: those of `config`, with `letters` and `fields`, from those of `old`, the source's.

    start, copy: as `transfer` has them; data: are there any to fit to. `new` are the layers whose mixers are
    others than the source's; `ways` how each starts. Raises Refusal where a mixer has no such start.
    """

    def __init__(
        self,
        source: Source,
        letters: str,
        fields: Mapping[str, Any],
        start: str | None,
        copy: str,
        seed: int,
        data: bool,
    ):
        self.source, self.seed, self.asked = source, seed, (fields, start, copy, seed, data)
        stored = source.dtype([source.where("embed.weight", None)])
        self.old = old = lci_config(source.config, pattern_of(source.config), stored)
        self.new = [i for i, (a, b) in enumerate(zip(old.pattern, letters, strict=True)) if a != b]
        ways = {letter: way(letter, start, copy, data) for letter in {letters[i] for i in self.new}}
        if ways.get("S") == "attention":
            fields = {**mamba2_fields(old), **fields}
        self.config = config = lci_config(source.config, letters, stored, **fields)
        self.ways = {i: ways[letters[i]] for i in self.new}
        for layer in self.new:
            if old.pattern[layer] not in ATTENTION:  # another mixer, of the source's own
                self.ways[layer] = "published"
        self.same_heads = old.heads_of("A") == config.heads_of("R")
        self.copy = "all" if ways.get("R") == "attention" else copy
        self.base = self.weights()
        for letter in {old.pattern[i] for i, x in self.ways.items() if (letters[i], x) == ("R", "attention")}:
            # heads that do not fit are refused before any work
            regrouped(
                *old.heads_of("A"),
                rotating_pairs(old, letter),
                config.retention_num_heads,
                rotating_pairs(config, "R"),
            )

    def keeping(self, layers: Collection[int]) -> "Starting":
        """The same, but that these layers stay as they are in the source."""
        pairs = enumerate(zip(self.old.pattern, self.config.pattern, strict=True))
        letters = "".join(old if i in layers else new for i, (old, new) in pairs)
        return Starting(self.source, letters, *self.asked)

    def told(self) -> dict[str, str]:
        """How the mixer of each letter starts, for growth.json."""
        return {self.config.pattern[layer]: start for layer, start in self.ways.items()}

    def weights(self, starts: Mapping[int, Start] | None = None) -> Weights:
        return Weights(self.source, self.config, self.copy, self.seed, starts)

    def layers(self, device: torch.device, kind: type[Layers] = Layers) -> tuple[Layers, Layers]:
        """The source's, and the model's, whose mixers are as they are drawn or copied."""
        whole = Weights(self.source, self.old, "all", self.seed)
        return kind(whole, device), kind(self.base, device)

    def begin(self, layer: int, mixer: nn.Module, old: nn.Module) -> None:
        """Start the mixer of a layer in place, from the source's mixer there."""
        if self.ways[layer] == "published":
            return
        if isinstance(mixer, Retention):
            letter = self.old.pattern[layer]
            turning = rotating_pairs(self.old, letter), rotating_pairs(self.config, "R")
            retention_from_attention(mixer, old, turning)
        else:
            mamba2_from_attention(mixer, old)

    def made(self, layer: int) -> dict[str, Made]:
        """What the start makes of a layer's mixer, besides what is copied or fresh."""
        letter = self.config.pattern[layer]
        if self.ways[layer] == "published" or (letter == "R" and self.same_heads):
            return {}
        names = self.base.mixer(layer)
        if letter == "S":
            of = {f"layers.{{}}.mamba2.{name}": sources for name, sources in MAMBA2.items()}
        else:
            of = {name: (name.removeprefix(MIXER),) for name in names}
        found = {}
        for name in names:
            sources = tuple(x for part in of.get(name, ()) if ((x := MIXER + part), layer) in self.source)
            as_it_is = letter == "R" and name.split(".")[-2] in "vo" and self.base.copied(name, layer)
            if sources and not as_it_is:
                found[name] = Made("regrouped", sources)
        if letter == "S":
            taps = (f"layers.{{}}.mamba2.conv1d.{part}.weight" for part in ("v", "bc"))
            found |= dict.fromkeys(taps, Made("regrouped", (), PASSES))
        return found

    def begun_from(self, layer: int) -> dict[str, tuple[str, ...]]:
        """Every weight of a layer's mixer -> the source's that it starts from; none where it is drawn."""
        made = self.made(layer)
        copied = {name: (name,) for name in self.base.mixer(layer) if self.base.copied(name, layer)}
        started = {name: x.sources for name, x in made.items()}
        return dict.fromkeys(self.base.mixer(layer), ()) | copied | started

    def starts(self) -> dict[int, Start]:
        """Those that need no data."""
        made = {layer: x for layer in self.new if (x := self.made(layer))}
        ends = self.layers(torch.device("cpu")) if made else ()
        return {layer: Start(x, partial(self._begun, *ends)) for layer, x in made.items()}

    def _begun(self, source: Layers, target: Layers, layer: int) -> dict[str, Tensor]:
        block = source.block(layer)
        own = target.with_mixer(layer, block)
        self.begin(layer, own.mixer, block.mixer)
        return target.values(layer, own.mixer)

    def lost(self) -> tuple[str, ...]:
        """What of the attention has no place in the mixers that start from it, a sentence each."""
        letters = {self.config.pattern[layer] for layer, start in self.ways.items() if start == "attention"}
        return tuple(
            sentence for letter in sorted(letters) for sentence in LOST[letter](self.old, self.config)
        )


def rotating_pairs(config: LCIConfig, letter: str) -> int:
    """How many pairs of dims of a head rotate."""
    return -(-config.rotary_dims.get(letter, 0) // 2)


def lost_by_retention(old: LCIConfig, new: LCIConfig) -> Iterator[str]:
    (H, _, K), (heads, _, size) = old.heads_of("A"), new.heads_of("R")
    turns = any(rotating_pairs(old, letter) for letter in old.pattern)
    if heads < H:
        yield f"retention: each head of {size} dims adds up the scores of {H // heads} of the source's" + (
            ", most of whose dims rotate slower there" if turns else ""
        )
    if heads > H:
        yield f"retention: each head of the source becomes {heads // H}, which keep apart what it adds up"
    if heads != H and old.qk_norm == "head":
        yield f"retention: norms of q and k are over the {size} dims of a new head, not over {K}"
    if old.attention_softcap is not None:
        yield f"retention: scores are not capped at {old.attention_softcap}"


def lost_by_mamba2(old: LCIConfig, new: LCIConfig) -> Iterator[str]:
    yield "Mamba-2: C, B and x pass a silu, and the head's norm is over the gated output"
    if any(rotating_pairs(old, letter) for letter in old.pattern):
        yield "Mamba-2: rotary positions have no place in it"
    if old.qk_norm is not None:
        yield "Mamba-2: norms of q and k have no place in it"


LOST = {"R": lost_by_retention, "S": lost_by_mamba2}
