"""Whether an answer is right: asked of every side before it is timed."""

from collections.abc import Callable

import torch
from tolerance import Errors
from torch import Tensor

SAME_FUNCTION = 1e-3  # of the largest element, or 4 ulps: a rival's rounding is its own affair


def agree(
    name: str, got: Tensor, truth: Tensor, plain: Tensor, ours: bool, products: torch.dtype | None = None
) -> None:
    """Ours by the rule of tests/tolerance.py, `plain` as there; that a rival computes the same function."""
    errors = Errors.of(got, truth, plain, products)
    budget = errors.budget if ours else max(SAME_FUNCTION, 4 * errors.eps) * errors.largest
    where = f"{got.dtype}, largest {errors.largest:.2e}"
    assert errors.error <= budget, f"{name}: error {errors.error:.2e}, budget {budget:.2e} ({where})"


def wrong(check: Callable, *arguments: object) -> str:
    """What a check that fails says in one line, else nothing. The side is timed all the same, and marked."""
    try:
        check(*arguments)
    except AssertionError as error:
        return str(error).partition("\n")[0] or "wrong"
    return ""


def exchange(u: Tensor, swap: bool) -> Tensor:
    return u.transpose(1, 2) if swap else u


def exchanged(u: Tensor, swap: bool) -> Tensor:
    """A copy, laid out so."""
    return exchange(u, swap).clone(memory_format=torch.contiguous_format)
