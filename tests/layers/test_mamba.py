from types import SimpleNamespace

import pytest
import torch
from tolerance import Float64Kept, assert_agrees
from torch.func import functional_call
from torch.nn.functional import softplus
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from lcikernels.layers import Mamba
from lcikernels.layers.conv1d import masked_conv1d
from lcikernels.ops import causal_conv1d


def published(sizes: SimpleNamespace, **changes: bool) -> MambaMixer:
    """transformers' mixer with weights that all matter."""
    config = MambaConfig(
        hidden_size=sizes.hidden_size,
        state_size=sizes.state_size,
        conv_kernel=sizes.conv_kernel,
        expand=sizes.expand,
        time_step_rank=sizes.time_step_rank,
        num_hidden_layers=1,
        **changes,
    )
    mixer = MambaMixer(config, layer_idx=0)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(torch.randn_like(weight) / 4)
    return mixer


@pytest.mark.parametrize("changes", [{}, {"use_bias": True, "use_conv_bias": False}], ids=["usual", "biases"])
@pytest.mark.parametrize("T", [1, 2, 21])
def test_the_layer_is_transformers_mamba_mixer(sizes, changes, T):
    theirs = published(sizes, **changes).double()
    biases = {"bias": changes.get("use_bias", False), "conv_bias": changes.get("use_conv_bias", True)}
    own = {"state_size": sizes.state_size, "time_step_rank": sizes.time_step_rank}
    ours = Mamba(sizes.hidden_size, **own, **biases, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, T, sizes.hidden_size, dtype=torch.float64)
    with torch.no_grad(), Float64Kept():
        want, got = theirs(x), ours(x)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_outputs_and_gradients_are_as_exact_as_transformers(sizes):
    theirs, ours = published(sizes), Mamba.from_config(sizes, 0)
    weights, shape = dict(theirs.named_parameters()), theirs.conv1d.weight.shape
    weights["conv1d.weight"] = weights["conv1d.weight"].squeeze(1)

    def mixer(x, **weights):
        weights["conv1d.weight"] = weights["conv1d.weight"].view(shape)
        with Float64Kept():
            return functional_call(theirs, weights, (x,))

    x = torch.randn(2, 21, sizes.hidden_size, requires_grad=True)
    assert_agrees(lambda x, **weights: functional_call(ours, weights, (x,)), mixer, x=x, **weights)


def test_the_names_and_shapes_of_mamba_ssm_load():
    """As its Mamba(d_model=24, d_state=5) has them."""
    shapes = {
        "A_log": (48, 5),
        "D": (48,),
        "in_proj.weight": (96, 24),
        "conv1d.weight": (48, 1, 4),
        "conv1d.bias": (48,),
        "x_proj.weight": (12, 48),
        "dt_proj.weight": (48, 2),
        "dt_proj.bias": (48,),
        "out_proj.weight": (24, 48),
    }
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    layer = Mamba(24, state_size=5)
    layer.load_state_dict(weights)
    for name, x in layer.state_dict().items():
        assert torch.equal(x, weights[name].view(x.shape)), name
    assert weights["conv1d.weight"].shape == (48, 1, 4)  # the caller's are as they were


def test_a_fresh_layer_starts_as_published():
    layer = Mamba(256, state_size=16)
    dt = softplus(layer.dt_proj.bias)
    assert torch.equal(layer.A_log, torch.arange(1.0, 17.0).log().expand(512, 16))
    assert torch.equal(layer.D, torch.ones(512)) and not layer.conv1d.bias.any()
    assert 0.99e-3 < dt.min() < 1.1e-3 and 0.09 < dt.max() < 0.101 and -4.9 < dt.log().mean() < -4.3
    assert 0.2 < layer.dt_proj.weight.abs().max() <= 0.25 and 0.49 < layer.conv1d.weight.abs().max() <= 0.5
    assert 0.99 / 16 < layer.in_proj.weight.abs().max() <= 1 / 16


@pytest.mark.parametrize("W", [1, 2, 4])
def test_a_masked_convolution_sees_the_kept_tokens_alone(W):
    torch.manual_seed(0)
    B, T, D = 3, 12, 5
    x, weight, bias = torch.randn(B, T, D), torch.randn(D, W), torch.randn(D)
    past = torch.randn(B, D, W - 1)
    keep = torch.rand(B, T) < 0.5
    keep[0], keep[1] = False, True
    y, state = masked_conv1d(x, weight, bias, keep, past)
    for row in range(1, B):
        tokens = x[row : row + 1, keep[row]]
        options = {"initial_state": past[row : row + 1], "return_final_state": True}
        want, end = causal_conv1d(tokens, weight, bias, activation="silu", **options)
        torch.testing.assert_close(y[row : row + 1, keep[row]], want)
        torch.testing.assert_close(state[row : row + 1], end)
    torch.testing.assert_close(state[0], past[0])
