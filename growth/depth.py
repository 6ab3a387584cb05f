"""Depth matrices [L_new, L_old]: which old layers each new layer is a mix of."""

import torch
from torch import Tensor


def rearranged(order: list[int], old: int) -> Tensor:
    """Row i is one-hot at order[i]; -1 gives a row of zeros."""
    depth = torch.zeros(len(order), old, dtype=torch.float64)
    for i, j in enumerate(order):
        if j >= 0:
            depth[i, j] = 1
    return depth


def stacked(old: int, new: int) -> list[int]:
    """0 1 2 0 1 2: the whole model again on top of itself."""
    return [i % old for i in range(new)]


def interpolated(old: int, new: int) -> list[int]:
    """0 0 1 1 2 2: every layer next to its copies."""
    return [i * old // new for i in range(new)]


def with_identities(old: int, new: int) -> tuple[list[int], list[int], list[int]]:
    """Every old layer once, the added ones after it, the upper layers first to receive one.

    Returns the layer that each new layer takes its inside from, the same with -1 where the new layer must add
    nothing to the stream, and the same with -1 where another one follows that takes its inside there too. For
    new <= 2 old this is LEMON's order; beyond, layers receive several.
    """
    each, more = divmod(new - old, old)
    inside, active, last = [], [], []
    for j in range(old):
        added = each + (j >= old - more)
        inside += [j] * (1 + added)
        active += [j] + [-1] * added
        last += [-1] * added + [j]
    return inside, active, last
