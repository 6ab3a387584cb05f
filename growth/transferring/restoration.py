"""Which layers keep their attention: those whose restoration brings the model closest to the source.

    score[l] = KL(source || student with the attention of layer l),  a mean over tokens of held-out windows

KL-guided layer selection (fla-org/hybrid-distillation, ICLR 2026): one pass of scores, the K lowest are kept.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from growth.errors import refuse
from growth.transferring.layers import Layers
from growth.transferring.one_mixer import Cost

HELD_OUT = 8  # windows: of 512 tokens they tell scores apart that differ by 0.01
CHUNK = 512  # tokens whose logits are there at a time: 0.26 GB twice with a vocabulary of 128k


class Restored:
    """The student with each layer's attention in turn, a layer of all of them at a time.

    Student l and the student without any differ from layer l on, so a pass over L layers takes L (L + 1) / 2
    of them, and holds L + 2 streams [N, T, hidden_size] of the N windows `ids` [N, T], but one layer.

    layers: those whose attention may be restored.
    """

    def __init__(self, ids: Tensor, layers: Collection[int]):
        self.ids, self.layers, self.cost = ids, layers, Cost()
        self.source: Tensor | None = None  # the stream of the source, and of the student without attention
        self.plain: Tensor | None = None
        self.with_layer: dict[int, Tensor] = {}

    def advance(
        self, layer: int, source: Layers, block: nn.Module, target: Layers, own: nn.Module | None
    ) -> None:
        """Every stream passes a layer: the source's `block`, or the student's `own`, if that is another."""
        if self.source is None:
            (self.source,) = (self.plain,) = source.embed([self.ids])
        with self.cost.counted(), self.cost.timed():
            restored = source.run(layer, block, self.plain)
            self.source = source.run(layer, block, self.source)
            end, at = (source, block) if own is None else (target, own)
            for i, x in self.with_layer.items():  # in place, or each would be there twice
                self.with_layer[i] = end.run(layer, at, x)
            if own is None:
                self.plain = restored
            else:
                self.plain = target.run(layer, own, self.plain)
                if layer in self.layers:
                    self.with_layer[layer] = restored

    def scores(self, source: Layers) -> dict[int | None, float]:
        """KL in nats a token of every layer that can be restored; of none under None.

        Raises Refusal where one is not finite.
        """
        students = {None: self.plain} | self.with_layer
        streams = {layer: x.flatten(0, 1).split(CHUNK) for layer, x in students.items()}
        sums = dict.fromkeys(students, 0.0)
        with source.headed(), self.cost.counted(), self.cost.timed():
            for i, x in enumerate(self.source.flatten(0, 1).split(CHUNK)):
                log_p = source.logits(x).log_softmax(-1)
                for layer, stream in streams.items():
                    log_q = source.logits(stream[i]).log_softmax(-1)
                    sums[layer] += (log_p.exp() * (log_p - log_q)).sum().item()
        if odd := [layer for layer, total in sums.items() if not math.isfinite(total)]:
            where = "no attention" if odd[0] is None else f"the attention of layer {odd[0]}"
            remedy = "look for numbers in the source that are too large for float32"
            raise refuse(
                "keep-attention", "a finite KL to the source", f"{sums[odd[0]]} with {where}", remedy
            )
        return {layer: total / self.ids.numel() for layer, total in sums.items()}


def best(scores: dict[int | None, float], count: int) -> list[int]:
    """The `count` layers of the lowest scores, in their order."""
    layers = sorted(
        (layer for layer in scores if layer is not None), key=lambda layer: (scores[layer], layer)
    )
    return sorted(layers[:count])


def table(scores: dict[int | None, float], chosen: Sequence[int]) -> list[dict[str, Any]]:
    """The table, as growth.json has it: every layer's score, how much it lowers, was it chosen."""
    without = scores[None]
    rows = [
        {"layer": i, "kl": x, "lowers": without - x, "kept": i in chosen}
        for i, x in scores.items()
        if i is not None
    ]
    return [{"layer": None, "kl": without, "lowers": 0.0, "kept": False}, *rows]
