"""Packed sequences as a padded batch and back: [1, T, ...] with cu_seqlens <-> [N, longest, ...]."""

from itertools import pairwise

import torch
from torch import Tensor


def unpack(x: Tensor, bounds: list[int]) -> Tensor:
    """[1, T, ...] -> [N, longest, ...], zeros after each sequence's end."""
    longest = max(end - start for start, end in pairwise(bounds))
    out = x.new_zeros(len(bounds) - 1, max(longest, 1), *x.shape[2:])
    for row, (start, end) in zip(out, pairwise(bounds)):
        row[: end - start] = x[0, start:end]
    return out


def pack(x: Tensor, bounds: list[int]) -> Tensor:
    """[N, longest, ...] -> [1, T, ...]; what stood after each sequence's end is dropped."""
    return torch.cat([row[: end - start] for row, (start, end) in zip(x, pairwise(bounds))])[None]
