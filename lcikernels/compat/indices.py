"""Tensors of indices: which sequence a token is of, which state a row has."""

import torch
from torch import Tensor

from lcikernels.ops import checks


def check_numbers(op: str, seq_idx: Tensor, x: Tensor, sizes: dict[str, int]) -> None:
    """Refuse what is no number for each token of [B, L]."""
    checks.shape(op, "seq_idx", seq_idx, "B L", sizes)
    if seq_idx.dtype not in checks.INDICES:
        checks.refuse(op, "seq_idx", "int32 or int64", seq_idx.dtype)
    checks.same_device(op, x, [("seq_idx", seq_idx)])


def begins(seq_idx: Tensor) -> Tensor:
    """bool [B, L]: the first token of each sequence, which is where the number changes, or a row begins."""
    first = torch.ones_like(seq_idx[:, :1], dtype=torch.bool)
    return torch.cat([first, seq_idx[:, 1:] != seq_idx[:, :-1]], 1)


def check_rows(op: str, argument: str, indices: Tensor, x: Tensor, S: int, sizes: dict[str, int]) -> None:
    """Refuse what does not choose one of S states, or none, for each row of x; values on a CPU alone."""
    checks.integers(op, argument, indices, x, sizes)
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.in_range(op, indices, S, argument)
