import pytest
import torch
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from lcikernels.layers import Mamba
from lcikernels.layers.conv1d import masked_conv1d
from lcikernels.ops import causal_conv1d


@pytest.mark.parametrize("T", [1, 2, 40])
def test_the_layer_is_transformers_mamba_mixer(sizes, T):
    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=sizes.hidden_size,
        state_size=sizes.state_size,
        conv_kernel=sizes.conv_kernel,
        expand=sizes.expand,
        time_step_rank=sizes.time_step_rank,
        num_hidden_layers=1,
    )
    theirs, ours = MambaMixer(config, layer_idx=0).double(), Mamba(sizes, 0).double()
    weights = theirs.state_dict()
    weights["conv1d.weight"] = weights["conv1d.weight"].squeeze(1)
    weights["D"] += torch.randn_like(weights["D"])
    ours.load_state_dict(weights, strict=True)
    theirs.D.data.copy_(weights["D"])
    x = torch.randn(2, T, sizes.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        want, got = theirs(x), ours(x)
    # transformers computes exp(dt a) in float32 whatever the dtype.
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * want.abs().max().item())


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
