"""The chain rule of grown weights, in every family, by every method."""

from dataclasses import fields

import pytest
import torch
from checkpoints import ALL
from grown_gradients import agree

import growth
from growth.loading import quiet
from growth.methods import METHODS, Lemon, Net2Net, StackBert
from growth.sizes import Sizes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> the folder of such a checkpoint, in float64."""
    found = {}

    def make(name):
        if name not in found:
            with quiet():
                found[name] = ALL[name](tmp_path_factory.mktemp("source") / "src", torch.float64)
        return found[name]

    return make


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_what_grew_are_those_of_its_source_under_the_dual_maps(made, tmp_path, name):
    wide = Sizes(hidden=128)
    deep = wide if name.startswith("t5") else Sizes(hidden=128, layers=5)
    with quiet():
        agree(made(name), tmp_path / "net2net", Net2Net(noise=0.0), wide)
        agree(made(name), tmp_path / "lemon", Lemon(noise=0.0), deep)
        agree(made(name), tmp_path / "stack", StackBert(noise=0.0), wide)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "olmo2", "lci inside WRS"])
def test_so_are_they_where_channels_remain_that_are_zero(made, tmp_path, name):
    """RMSNorms: the mean of a LayerNorm would move gradients by what no moment tells."""
    with quiet():
        agree(made(name), tmp_path / "lemon", Lemon(noise=0.0), Sizes(hidden=160))


@pytest.mark.parametrize(
    "method", [x for x in METHODS if x not in ("upcycle", "gradmax", "ligo", "mango", "msg")]
)
def test_every_method_that_is_lossless_without_noise_carries_gradients_exactly(made, tmp_path, method):
    """Those that learn their maps, or hide units behind masks, carry estimates, or none."""
    kind = METHODS[method]
    of = kind(noise=0.0) if "noise" in {field.name for field in fields(kind)} else kind()
    for sizes in (Sizes(hidden=128), Sizes(layers=6)):
        with quiet():
            report = growth.grow(made("gpt_neox"), tmp_path / f"{sizes.hidden}", sizes, of, dry_run=True)
            if report.lossless:
                agree(made("gpt_neox"), tmp_path / f"{sizes.hidden}", of, sizes)
