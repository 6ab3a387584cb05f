"""The rule of tolerance.py lets a float32 sum in any order pass, and refuses what is computed wrong."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
from tolerance import FEW, assert_agrees
from torch import Tensor

from lcikernels.ops.retention.reference import retention

T = 9


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    q, k, v = (torch.randn(2, T, 2, 5, dtype=dtype, requires_grad=True) for _ in range(3))
    return dict(q=q, k=k, v=v, log_decay=-torch.rand(2) / 4)


def faded(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """0.1 % more of the memory is lost at each step."""
    return retention(q, k, v, log_decay - 1e-3)


def rounded(where: str, dtype: torch.dtype, **given: Tensor) -> Tensor:
    """One input, or the output, goes through a narrower dtype."""
    given[where] = given[where].to(dtype).to(given[where].dtype) if where in given else None
    out = retention(**{name: u for name, u in given.items() if u is not None})
    return out.to(dtype).to(out.dtype) if where == "output" else out


def test_the_reference_itself_passes():
    assert_agrees(retention, retention, **inputs())


def test_a_decay_that_is_off_by_a_thousandth_a_step_fails():
    with pytest.raises(AssertionError, match="ulps, budget"):
        assert_agrees(faded, retention, **inputs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v", "log_decay", "output"])
def test_one_rounding_to_16_bits_in_the_wrong_place_fails(where, dtype):
    with pytest.raises(AssertionError, match="ulps, budget"):
        assert_agrees(partial(rounded, where, dtype), retention, **inputs())


def test_a_reference_is_asked_once_and_again_for_other_inputs_and_options(monkeypatch):
    monkeypatch.setattr("tolerance.ANSWERS", OrderedDict())
    asked = []
    monkeypatch.setitem(globals(), "noted", asked.append)
    given = inputs()
    assert_agrees(retention, told, **given)
    once = len(asked)
    assert once == 2 * FEW
    assert_agrees(retention, told, **given)
    assert len(asked) == once
    others = given | {"q": given["k"]}, given | {"k": given["k"].detach()}, given | {"scale": 0.5}
    for count, other in enumerate(others, 2):
        assert_agrees(retention, told, **other)
        assert len(asked) == count * once
    assert_agrees(partial(retention, scale=0.25), partial(told, scale=0.25), **given)
    assert len(asked) == 5 * once
    with pytest.raises(AssertionError, match="ulps, budget"):
        assert_agrees(faded, told, **given)


def noted(_: Tensor) -> None:
    """Of each call of `told`."""


def told(q: Tensor, **others: object) -> Tensor:
    noted(q)
    return retention(q, **others)


def in_a_row(x: Tensor) -> Tensor:
    """A sum with one accumulator."""
    total = torch.zeros_like(x[0])
    for term in x:
        total = total + term
    return total


def test_a_sum_with_an_accumulator_of_16_bits_fails():
    x = torch.rand(512, 5).bfloat16()
    with pytest.raises(AssertionError, match="ulps, budget"):
        assert_agrees(in_a_row, lambda x: x.sum(0), x=x)


def test_another_order_of_a_sum_that_cancels_to_one_number_passes():
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(42, generator=generator, requires_grad=True) for _ in range(2))
        assert_agrees(lambda x, y: in_a_row(x * y), lambda x, y: torch.dot(x, y), x=x, y=y)
