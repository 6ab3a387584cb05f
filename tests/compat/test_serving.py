"""What is not served is refused by name, and the page tells what is."""

import inspect

import pytest
import torch

from lcikernels.compat import causal_conv1d, mamba_ssm
from lcikernels.compat.__main__ import PAGE, page
from lcikernels.compat.serving import TABLE, serves


@pytest.fixture
def served():
    """A function of six arguments, and what it was called with."""

    @serves(
        refused={"mode": "there is one", "mask": "nothing is masked", "rate": "it is fixed"},
        free={"chunk": "chunks change nothing"},
        partly={"name": "short ones"},
    )
    def example(x, mode=False, mask=None, chunk=64, *, rate=1.0, name="a"):
        return x, mode, mask, chunk, rate, name

    yield example
    del TABLE[__name__.split(".")[0]]


def test_a_served_argument_arrives_by_place_and_by_name(served):
    assert served(1, False, None, 3, name="b") == (1, False, None, 3, 1.0, "b")
    assert served(x=2, mask=None, chunk=5, rate=1) == (2, False, None, 5, 1, "a")


@pytest.mark.parametrize(
    "args, kwargs, sentence",
    [
        ((1, True), {}, "example: mode must be False (there is one), got True"),
        ((1,), {"mode": True}, "example: mode must be False (there is one), got True"),
        (
            (1, False, torch.ones(2, 3)),
            {},
            "example: mask must be None (nothing is masked), got a tensor of shape (2, 3)",
        ),
        ((1,), {"rate": 2.0}, "example: rate must be 1.0 (it is fixed), got 2.0"),
    ],
)
def test_a_refused_argument_is_named_with_the_reason(served, args, kwargs, sentence):
    with pytest.raises(ValueError) as refusal:
        served(*args, **kwargs)
    assert str(refusal.value) == sentence


def test_the_signature_stays(served):
    assert list(inspect.signature(served).parameters) == ["x", "mode", "mask", "chunk", "rate", "name"]


def test_a_guarded_function_is_traced_whole(served):
    traced = torch.compile(lambda x: served(x, False, chunk=7)[0] * 2, fullgraph=True, backend="eager")
    assert torch.equal(traced(torch.ones(3)), 2 * torch.ones(3))


@pytest.mark.parametrize(
    "said", [{"free": {"y": "no"}}, {"refused": {"x": "no"}}, {"free": {"z": ""}, "partly": {"z": ""}}]
)
def test_what_is_said_must_be_of_the_function(said):
    with pytest.raises(TypeError):
        serves(**said)(lambda x, z=1: x)


def test_the_page_is_the_one_that_is_generated():
    assert PAGE.read_text() == page(), "run python -m lcikernels.compat"


def test_the_page_has_every_argument_of_every_function():
    for package, module in (("causal_conv1d", causal_conv1d), ("mamba_ssm", mamba_ssm)):
        for name, rows in TABLE[package].items():
            assert list(rows) == list(inspect.signature(getattr(module, name)).parameters)
    assert TABLE["mamba_ssm"].keys() == set(mamba_ssm.__all__)
