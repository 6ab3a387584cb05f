"""Packed sequences one by one: where each is in the row, and its state."""

from itertools import pairwise

from torch import Tensor

from .checks import boundaries


def sequences(
    op: str, cu_seqlens: Tensor, T: int, states: Tensor | None
) -> list[tuple[slice, Tensor | None]]:
    """The tokens of each sequence in a row of T, and its one of `states` [N, ...], as [1, ...]."""
    bounds = boundaries(op, cu_seqlens, T)
    each = [None] * (len(bounds) - 1) if states is None else states.split(1)
    return [(slice(start, end), state) for (start, end), state in zip(pairwise(bounds), each)]
