import pytest
import torch
from tolerance import Float64Kept, assert_agrees
from torch.func import functional_call
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from lcikernels.layers import LightningAttention
from lcikernels.layers.lightning import slopes

LAYERS = 5


def published(layer_idx: int, dtype: torch.dtype, head_dim: int | None = None) -> MiniMaxLightningAttention:
    """transformers' layer with weights that all matter, whose decays are computed in `dtype`."""
    config = MiniMaxConfig(
        hidden_size=24,
        num_attention_heads=3,
        head_dim=head_dim,
        num_hidden_layers=LAYERS,
        block_size=8,
        layer_types=["linear_attention"] * LAYERS,
    )
    torch.set_default_dtype(dtype)
    layer = MiniMaxLightningAttention(config, layer_idx)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(torch.randn_like(weight) / 4)
    return layer


@pytest.mark.parametrize("layer_idx", [0, 2, 4])
@pytest.mark.parametrize("head_dim", [None, 6])
def test_outputs_and_gradients_are_as_exact_as_transformers(layer_idx, head_dim):
    theirs = {dtype: published(layer_idx, dtype, head_dim) for dtype in (torch.float32, torch.float64)}
    weights = dict(theirs[torch.float32].named_parameters())
    ours = LightningAttention.from_config(
        MiniMaxConfig(hidden_size=24, num_attention_heads=3, head_dim=head_dim, num_hidden_layers=LAYERS),
        layer_idx,
    )
    ours.load_state_dict(theirs[torch.float32].state_dict(), strict=True)

    def layer(x, **weights):
        with Float64Kept():
            return functional_call(theirs[x.dtype], weights, (x, None, None))[0]

    x = torch.randn(2, 21, 24, requires_grad=True)
    assert_agrees(lambda x, **weights: functional_call(ours, weights, (x,)), layer, x=x, **weights)


def test_slopes_are_alibis_in_the_first_layer_and_almost_none_in_the_last():
    first, last = slopes(8, 0, LAYERS), slopes(8, LAYERS - 1, LAYERS)
    torch.testing.assert_close(first.double(), 0.5 ** torch.arange(1, 9).double(), rtol=2e-5, atol=0)
    assert (last > 0).all() and (last < 2e-5 * first).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decays_of_another_layer_do_not_load(dtype):
    weights = {name: x.to(dtype) for name, x in published(2, torch.float32).state_dict().items()}
    LightningAttention(24, 3, layer_idx=2, num_layers=LAYERS).load_state_dict(weights)
    for layer_idx, num_layers in ((1, LAYERS), (2, LAYERS + 1)):
        layer = LightningAttention(24, 3, layer_idx=layer_idx, num_layers=num_layers)
        with pytest.raises(ValueError, match=f"slope_rate must be the slopes of layer_idx={layer_idx} of"):
            layer.load_state_dict(weights)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            {"num_heads": 5},
            "num_heads must be a divisor of hidden_size=24 where .*, got 5",
        ),
        ({"num_heads": 3, "layer_idx": 1}, "layer_idx must be from 0 to num_layers - 1 = 0, got 1"),
        ({"num_heads": 3, "head_dim": 0}, "head_dim must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        LightningAttention(24, **sizes)
