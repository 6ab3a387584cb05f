"""Whether an answer is right: asked of every side before it is timed."""

from collections.abc import Callable

import torch
from tolerance import max_error
from torch import Tensor

SAME_FUNCTION = 1e-3  # of the largest element, or 4 ulps: a rival's rounding is its own affair


def agree(
    name: str, got: Tensor, truth: Tensor, plain: Tensor, ours: bool, products: torch.dtype | None = None
) -> None:
    """Ours by the rule of tests/tolerance.py; that a rival computes the same function at all."""
    exact = products or got.dtype
    largest, eps = truth.abs().max().item(), torch.finfo(exact).eps
    budget = max(SAME_FUNCTION, 4 * eps) * largest
    if ours:
        budget = 2 * max(max_error(plain.to(exact), truth), eps * largest)
    error = max_error(got, truth)
    where = f"{got.dtype}, largest {largest:.2e}"
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e} ({where})"


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
