"""A model of which one layer at a time has weights, so that a source of any size fits."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from growth.transferring.planned import Weights
from lcikernels.models import LCIForCausalLM
from lcikernels.models.lm import LCIBlock

WORDS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Place(nn.Module):
    """Where a layer stands: it passes the stream on, and does `work` with what else the layer is given.

    work: (the stream, what a model hands to the layer besides) -> the stream behind this place.
    """

    def __init__(self):
        super().__init__()
        self.work = None

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        return x if self.work is None else self.work(x, *given, **named)


class Layers:
    """The layers of the LCI model with these weights, made one at a time, and its two ends.

    None is kept here: a layer lives as long as its caller holds it. All is in the dtype of the model, but in
    float32 at least, on `device`, without gradients. Positions and masks are the model's own doing.
    """

    def __init__(self, weights: Weights, device: torch.device):
        self.weights, self.device, self.config = weights, device, weights.config
        self.dtype = torch.promote_types(self.config.dtype, torch.float32)
        with init_empty_weights(include_buffers=False):
            self.model = LCIForCausalLM(self.config).eval()
        self.places = [Place() for _ in self.model.model.layers]
        self.model.model.layers = nn.ModuleList(self.places)
        self.table = weights.model.table()
        self._load(self.model.model, "model.", None, without=(WORDS,))

    def block(self, layer: int) -> LCIBlock:
        """A layer with its weights."""
        block = self._empty(layer)
        self._load(block, f"model.layers.{layer}.", layer)
        return block.to(self.device)

    def with_mixer(self, layer: int, block: LCIBlock) -> LCIBlock:
        """The same layer of another model, with the mixer of this one."""
        own = self._empty(layer)
        for name, child in block.named_children():
            if name != "mixer":
                setattr(own, name, child)
        self._load(own.mixer, f"model.layers.{layer}.mixer.", layer)
        return own.to(self.device)

    def values(self, layer: int, mixer: nn.Module) -> dict[str, Tensor]:
        """The weights of a layer's mixer by their names."""
        found, held = {}, mixer.state_dict()
        for name, (entry, at) in self.table.items():
            if at == layer and name.startswith(prefix := f"model.layers.{layer}.mixer."):
                parts = entry.from_disk(held[name.removeprefix(prefix)].cpu())
                found |= {weight.name: part for weight, part in zip(entry.weights, parts, strict=True)}
        return found

    def embed(self, batches: Iterable[Tensor]) -> list[Tensor]:
        """The streams in front of the first layer, [B, T, hidden_size] each, of ids [B, T]."""
        inner, seen = self.model.model, []
        words, inner.embed_tokens = inner.embed_tokens, nn.Embedding.from_pretrained(self.tensor(WORDS))
        with working(self.places[0], lambda x, *given, **named: seen.append(x) or x):
            for ids in batches:
                self._forward(input_ids=ids.to(self.device))
        inner.embed_tokens = words
        return seen

    def run(self, layer: int, block: nn.Module, x: Tensor) -> Tensor:
        """The stream behind `block` in the place of that layer. x [N, T, hidden_size]."""
        out = []
        with working(
            self.places[layer], lambda _, *given, **named: out.append(block(x, *given, **named)) or x
        ):
            self._forward(inputs_embeds=x)
        return out[0]

    @contextmanager
    def headed(self) -> Iterator["Layers"]:
        """Inside, `logits` can be had."""
        weight = self.tensor(HEAD if HEAD in self.table else WORDS)
        empty, self.model.lm_head.weight = (
            self.model.lm_head.weight,
            nn.Parameter(weight, requires_grad=False),
        )
        try:
            yield self
        finally:
            self.model.lm_head.weight = empty

    def logits(self, x: Tensor) -> Tensor:
        """[.., vocab_size] from the stream behind the last layer, [.., hidden_size]."""
        with torch.no_grad():
            return self.model.logits(self.model.model.norm(x))

    @torch.no_grad()
    def _forward(self, **inputs: Tensor) -> None:
        self.model.model(**inputs, use_cache=False)

    def _empty(self, layer: int) -> LCIBlock:
        with init_empty_weights(include_buffers=False):
            return LCIBlock(self.config, layer).eval()

    def _load(self, module: nn.Module, prefix: str, layer: int | None, without: tuple[str, ...] = ()) -> None:
        names = [name for name, (_, at) in self.table.items() if at == layer and name.startswith(prefix)]
        values = {name.removeprefix(prefix): self.tensor(name) for name in names if name not in without}
        missing = module.load_state_dict(values, strict=False, assign=True)
        assert not missing.unexpected_keys, missing
        module.requires_grad_(False)

    def tensor(self, name: str) -> Tensor:
        """One as it is stored, by its name, in the dtype of the layers."""
        entry, layer = self.table[name]
        values = (self.weights.tensor(weight.name, layer) for weight in entry.weights)
        return entry.to_disk(values).to(self.device, self.dtype)


@contextmanager
def working(place: Place, work: Any) -> Iterator[None]:
    place.work = work
    try:
        yield
    finally:
        place.work = None
