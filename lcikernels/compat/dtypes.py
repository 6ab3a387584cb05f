"""Tensors of several dtypes, which other libraries take and the ops do not."""

import torch
from torch import Tensor


def exact(*tensors: Tensor | None) -> torch.dtype:
    """What they are computed in: float32, or float64 where one of them is."""
    double = any(u is not None and u.dtype == torch.float64 for u in tensors)
    return torch.float64 if double else torch.float32


def alike(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as they are where they share one dtype, else in what they are computed in."""
    first = tensors[0].dtype
    if all(u is None or u.dtype == first for u in tensors):
        return tensors
    dtype = exact(*tensors)
    return tuple(u if u is None else u.to(dtype) for u in tensors)
