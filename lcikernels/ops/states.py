"""The states that a step advances in place: which of them, in which dtype, wherever they lie in memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import checks


def check(
    op: str, like: Tensor, state: Tensor, axes: str, sizes: dict[str, int], state_indices: Tensor | None
) -> None:
    """Refuse a `state` [axes] that a step on `like` cannot advance. With `state_indices` its B is any S."""
    if state_indices is None:
        checks.shape(op, "state", state, axes, sizes)
    else:
        checks.shape(op, "state", state, axes.replace("B", "S", 1), sizes)
        checks.integers(op, "state_indices", state_indices, like, sizes)
    checks.states(op, like, state=state)
    checks.written(op, state=state)


def in_place(
    op: str,
    state: Tensor,
    state_indices: Tensor | None,
    dtype: torch.dtype,
    takes: Callable[[Tensor, torch.dtype], bool],
    step: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """What `step` returns, which advances the states that it is given, and row state_indices[b] for it, or b.

    Where a backend takes the states as they are, its step is given them and the indices: where one is
    negative it touches none and returns 0, and NaN where one that nobody looked at is of no state. Else it is
    given those that are used, dense and of `dtype`, and no indices; what comes of them is rounded once.
    """
    torch.autograd.graph.increment_version(state)
    if state_indices is None:
        if (state.dtype == dtype and state.is_contiguous()) or takes(state, dtype):
            return step(state, None)
        dense = state.to(dtype).contiguous()
        y = step(dense, None)
        state.copy_(dense)
        return y
    if checks.looked_at(state_indices):
        checks.in_range(op, state_indices, state.shape[0])
    if takes(state, dtype):
        return step(state, state_indices)
    S, wanted = state.shape[0], state_indices.long()
    used, rows = (0 <= wanted) & (wanted < S), wanted.clamp(0, S - 1)
    before = state.index_select(0, rows)
    after = before.to(dtype, copy=True).contiguous()
    y = step(after, None)
    after = torch.where(per_row(used, after), after.to(state.dtype), before)
    # A padded row writes what the first other one does, for it may name the state of any: no waiting for a
    # GPU to tell how many are used.
    writes = torch.where(used, torch.arange(len(rows), device=rows.device), used.byte().argmax())
    state.index_copy_(0, rows[writes], after[writes])
    y.masked_fill_(per_row(~used, y), 0)
    return y.masked_fill_(per_row(wanted >= S, y), torch.nan)


def per_row(mask: Tensor, x: Tensor) -> Tensor:
    """`mask` [B] as [B, 1, ...], with the axes of x."""
    return mask.view(-1, *[1] * (x.dim() - 1))


def all_as_they_are(state: Tensor, dtype: torch.dtype) -> bool:
    """Of a backend whose step takes states of every dtype and any strides."""
    return True


def none_as_they_are(state: Tensor, dtype: torch.dtype) -> bool:
    """Of a backend whose step takes dense states of the arithmetic's dtype: `in_place` makes them so."""
    return False


def native(state: Tensor, dtype: torch.dtype) -> bool:
    """Whether csrc computes with elements of `state` in `dtype`."""
    return state.dtype == dtype or (state.dtype == torch.bfloat16 and dtype == torch.float32)


def int64(indices: Tensor | None) -> Tensor | None:
    """As csrc reads them."""
    return indices if indices is None else indices.to(torch.int64).contiguous()
