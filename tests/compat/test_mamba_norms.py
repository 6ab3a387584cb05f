"""rmsnorm_fn and layernorm_fn against their equation."""

from functools import partial

import pytest
import torch
from tolerance import assert_agrees
from torch import Tensor
from torch.nn.functional import silu

from lcikernels.compat.mamba_ssm import layernorm_fn, rmsnorm_fn

D = 12
BF, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def equation(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True, is_rms_norm=True):
    """A group of channels after the other."""
    y = x if z is None or norm_before_gate else x * silu(z)
    parts = []
    for part in y.split(group_size or x.shape[-1], -1):
        part = part if is_rms_norm else part - part.mean(-1, keepdim=True)
        parts.append(part / (part.square().mean(-1, keepdim=True) + eps).sqrt())
    y = torch.cat(parts, -1) * weight
    y = y if bias is None else y + bias
    return y * silu(z) if z is not None and norm_before_gate else y


def inputs(*lead, dtype=F32, parameters=None, gate=None) -> dict[str, Tensor]:
    parameters = parameters or dtype
    return {
        "x": torch.randn(*lead, D).to(dtype).requires_grad_(),
        "weight": torch.randn(D).to(parameters).requires_grad_(),
        "bias": torch.randn(D).to(parameters).requires_grad_(),
        "z": torch.randn(*lead, D).to(gate or dtype).requires_grad_(),
    }


NORMS = {
    "rms": (rmsnorm_fn, equation),
    "layer": (layernorm_fn, partial(equation, is_rms_norm=False)),
    "layer, told rms": (partial(layernorm_fn, is_rms_norm=True), equation),
}
norms = pytest.mark.parametrize("norm, expected", NORMS.values(), ids=NORMS)
CASES = {
    "all": {},
    "no bias": {"bias": None},
    "no gate": {"z": None},
    "groups": {"group_size": 4},
    "the gate first": {"norm_before_gate": False},
    "the gate first, groups": {"norm_before_gate": False, "group_size": 3, "eps": 1e-2},
    "one group, named": {"group_size": D},
}


@norms
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_every_argument_of_a_norm(norm, expected, options):
    assert_agrees(norm, expected, **inputs(2, 5) | options)


MIXED = {
    "bfloat16": (BF, BF, BF),
    "bfloat16, weights in float32": (BF, F32, BF),
    "bfloat16, gate in float32": (BF, F32, F32),
    "float32, gate in bfloat16": (F32, BF, BF),
    "float16": (F16, F16, F16),
    "float64": (F64, F64, F64),
}


@norms
@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_every_mix_of_dtypes_is_as_exact_as_float32(norm, expected, dtypes):
    assert_agrees(norm, expected, **inputs(3, dtype=dtypes[0], parameters=dtypes[1], gate=dtypes[2]))


REFUSED = {
    "no weight": ({"weight": None}, "weight must be a torch.Tensor, got None"),
    "a weight of other channels": ({"weight": torch.ones(D + 1)}, "weight must be .* with D=12"),
    "a gate of another shape": ({"z": torch.ones(D)}, "z must be shaped like x"),
    "groups that do not divide": ({"group_size": 5}, "group_size must be None or a divisor of D=12, got 5"),
    "groups of nothing": ({"group_size": 0}, "group_size must be None or a divisor"),
    "a bias elsewhere": ({"bias": torch.ones(D, device="meta")}, "bias must be on cpu"),
    "no tensor": ({"x": None}, "x must be a torch.Tensor, got None"),
}


@pytest.mark.parametrize("wrong, sentence", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name(wrong, sentence):
    for norm in (rmsnorm_fn, layernorm_fn):
        with pytest.raises(ValueError, match=f"{norm.__name__}: {sentence}"):
            norm(**inputs(2, 3) | wrong)
