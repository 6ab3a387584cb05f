"""transformers' models with and without `patch()`: the same outputs, gradients and texts."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from compat.families import CONFIGS, build
from lcikernels.compat import transformers as compat
from tolerance import Float64Kept, assert_agrees

IDS = torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(4), 0)  # 4 places of padding in front of the first row
MASK[1] = 1
BATCHES = {"whole": {"input_ids": IDS}, "padded": {"input_ids": IDS, "attention_mask": MASK}}
PACKED = ["mamba2", "bamba", "zamba2", "nemotron_h", "granitemoehybrid", "falcon_h1", "lfm2"]


@pytest.fixture(autouse=True)
def quiet(caplog):
    """The unpatched model says that it is slow, which is why there is this module."""
    yield
    compat.unpatch()


def logits(model: PreTrainedModel, batch: dict):
    """A function of the model's parameters, p0, p1, ..., and these by those names."""
    names = [name for name, _ in model.named_parameters()]

    def run(**parameters):
        out = functional_call(model, dict(zip(names, parameters.values())), kwargs=batch | {"use_cache": False})
        kept = batch.get("attention_mask")
        return out.logits if kept is None else out.logits * kept[..., None]

    return run, {f"p{i}": p for i, p in enumerate(model.parameters())}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", CONFIGS)
def test_outputs_and_gradients_are_those_of_the_unpatched_model(family, batch):
    model = build(family).train()
    run, parameters = logits(model, BATCHES[batch])

    def unpatched(**parameters):
        with Float64Kept():
            return run(**parameters)

    def patched(**parameters):
        with compat.patch():
            return run(**parameters)

    assert_agrees(patched, unpatched, **parameters)
