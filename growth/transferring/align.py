"""Mixers fitted to the attention whose place they take, a layer of the source at a time.

    minimise over the mixer's parameters alone   |mixer(x) - attention(x)|^2 / |attention(x)|^2

where x is what the source's own layer reads, the stream behind its norm.  Kasai et al. 2021 (T2R), Zhang et al.
2024 (LoLCATs), Goldstein et al. 2025 (RADLADS).

The source runs once over each distinct window: the stream of all of them is kept, [N, T, hidden_size], and of
the source one layer, which is read, watched, fitted to and dropped. No layer's error depends on another
mixer, and gradients are clipped and steps taken for each layer by itself, so fitting all layers at once gives
the same; it would hold the whole source for no gain.
"""

import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from growth.errors import refuse
from growth.training.flops import CPU_ATTENTION
from growth.transferring.layers import Layers
from growth.transferring.mixers import Ridge

def watched(source: Layers, layer: int, block: nn.Module, stream: list[Tensor], cost: Cost) -> tuple[list[Tensor], Tensor, Tensor]:
    """The stream behind a layer of the source, and what its attention read and gave, [N, T, hidden_size].

    stream: batches [B, T, hidden_size], of which each is let go when it has been read.
    """
    seen = []
    hook = block.mixer.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    try:
        with cost.counted(), cost.timed():
            for i, x in enumerate(stream):
                stream[i] = source.run(layer, block, x)
    finally:
        hook.remove()
    x, y = (torch.cat(parts) for parts in zip(*seen))
    return stream, x, y


class Called(nn.Module):
    """In a mixer's place: notes what the model hands to it besides x, and gives x back."""

    given: tuple = ()
    named: dict = {}

    def forward(self, x: Tensor, *given, **named) -> Tensor:
        self.given, self.named = given, named
        return x


def called(target: Layers, layer: int, block: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The block's mixer as a function of x [B, T, hidden_size] alone, called as the model calls it."""
    mixer, note = block.mixer, Called()
    block.mixer = note
    target.run(layer, block, x[:1])
    block.mixer = mixer
    return lambda x: mixer(x, *note.given, **note.named)


