"""Tensors as callers have them: the same numbers, lying otherwise, among NaN that nobody may read."""

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """A copy in the order of the axes."""
    return x.clone(memory_format=torch.contiguous_format)


def along_tokens(x: Tensor) -> Tensor:
    """[B, T, ..., D] of memory that is [B, ..., D, T]."""
    return dense(x.movedim(1, -1)).movedim(-1, 1)


def half(x: Tensor) -> Tensor:
    """The second half of a projection's outputs."""
    return torch.cat((torch.full_like(x, torch.nan), x), -1)[..., x.shape[-1] :]


def transposed(x: Tensor) -> Tensor:
    return dense(x.mT).mT


def spaced(x: Tensor) -> Tensor:
    """Every other element of every axis."""
    wide = torch.full([2 * n for n in x.shape], torch.nan, dtype=x.dtype)
    return wide[(slice(1, None, 2),) * x.dim()].copy_(x)
