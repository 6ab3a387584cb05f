"""Mamba2 is transformers' Mamba2Mixer, which keeps some float64 inputs in float32: here that is undone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tolerance import Float64Kept, assert_agrees, max_error
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import softplus
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from lcikernels.layers import Mamba2, mamba2

SIZES = {
    "one group": {},
    "two groups": {"mamba2_n_groups": 2},
    "a group for each head": {"mamba2_n_groups": 6},
    "one head": {"mamba2_num_heads": 1},
    "more states than channels": {"mamba2_num_heads": 12, "mamba2_state_size": 17},
    "steps clamped on both sides": {"time_step_limit": (0.3, 0.9)},
    "two taps": {"conv_kernel": 2},
}
CHUNK = 8  # of transformers' mixer
EXACT = {"rtol": 0, "atol": 1e-11}  # float64, outputs of about 1


def published(sizes: SimpleNamespace) -> Mamba2Mixer:
    """transformers' mixer with weights that all matter."""
    config = Mamba2Config(
        hidden_size=sizes.hidden_size,
        num_heads=sizes.mamba2_num_heads,
        head_dim=sizes.expand * sizes.hidden_size // sizes.mamba2_num_heads,
        state_size=sizes.mamba2_state_size,
        n_groups=sizes.mamba2_n_groups,
        expand=sizes.expand,
        conv_kernel=sizes.conv_kernel,
        layer_norm_epsilon=sizes.layer_norm_eps,
        time_step_limit=sizes.time_step_limit,
        chunk_size=CHUNK,
        num_hidden_layers=1,
    )
    mixer = Mamba2Mixer(config, layer_idx=0)
    with torch.no_grad():
        for weight in (mixer.D, mixer.norm.weight, mixer.conv1d.bias):
            weight.add_(torch.randn_like(weight) / 2)
        mixer.dt_bias.normal_()  # steps of about 0.7
    return mixer


def ours_like(mixer: Mamba2Mixer, sizes: SimpleNamespace) -> Mamba2:
    """Ours with the mixer's weights."""
    ours = Mamba2.from_config(sizes, 0).to(mixer.D.dtype)
    ours.load_state_dict(mixer.state_dict(), strict=True)
    return ours


def run(mixer: Mamba2Mixer, x: Tensor, **options) -> Tensor:
    with Float64Kept():
        return mixer(x, **options)


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("T", [1, 2, 21])
def test_the_layer_is_transformers_mamba2_mixer(sizes, changes, T):
    vars(sizes).update(changes)
    theirs = published(sizes).double()
    ours = ours_like(theirs, sizes)
    x = torch.randn(2, T, sizes.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        want, got = run(theirs, x), ours(x)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES.keys())
def test_outputs_and_gradients_are_as_exact_as_transformers(sizes, changes):
    vars(sizes).update(changes)
    theirs = published(sizes)
    ours, shape = Mamba2.from_config(sizes, 0), theirs.conv1d.weight.shape
    weights = dict(theirs.named_parameters())
    weights["conv1d.weight"] = weights["conv1d.weight"].squeeze(1)

    def mixer(x, **weights):
        weights["conv1d.weight"] = weights["conv1d.weight"].view(shape)
        with Float64Kept():
            return functional_call(theirs, weights, (x,))

    x = torch.randn(2, 21, sizes.hidden_size, requires_grad=True)
    assert_agrees(lambda x, **weights: functional_call(ours, weights, (x,)), mixer, x=x, **weights)


# float16 on a CPU is Triton's interpreter: half a second a seed.
@pytest.mark.parametrize("dtype, seeds", [(torch.bfloat16, 4), (torch.float16, 1)])
def test_in_16_bits_the_layer_is_as_close_to_the_truth_as_transformers(sizes, dtype, seeds):
    for seed in range(seeds):
        torch.manual_seed(seed)
        theirs = published(sizes).to(dtype)
        ours, exact = ours_like(theirs, sizes), copy.deepcopy(theirs).double()
        x = torch.randn(2, 64, sizes.hidden_size).to(dtype)
        with torch.no_grad():
            truth = run(exact, x.double())
            errors = [max_error(mixer(x), truth) for mixer in (ours, theirs)]
        assert errors[0] <= 2 * errors[1], (seed, errors)


def test_a_bfloat16_layer_has_float32_decays(sizes, monkeypatch):
    ours, seen = ours_like(published(sizes).bfloat16(), sizes), []
    monkeypatch.setattr(mamba2, "retain", lambda *args, **_: seen.append(args[3]) or args[2:5:2])
    x = torch.randn(2, 21, sizes.hidden_size).bfloat16()
    with torch.no_grad():
        ours(x)
        dt = ours.in_proj(x)[..., -sizes.mamba2_num_heads :]
        want = -ours.A_log.float().exp() * softplus(dt.float() + ours.dt_bias.float())
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_reach_a_token_nor_a_state(sizes, side):
    """transformers' mixer knows padding at the ends; what it computes at padding itself means nothing."""
    theirs = published(sizes).double()
    ours = ours_like(theirs, sizes)
    x = torch.randn(2, 21, sizes.hidden_size, dtype=torch.float64)
    keep = torch.ones(2, 21, dtype=torch.bool)
    keep[0, : 5 if side == "left" else 21] = side == "right"
    keep[0, 16:] = side == "left"
    with torch.no_grad():
        want = run(theirs, x, attention_mask=keep.long())
        got, padded = ours(x, keep=keep, return_state=True)
        _, alone = ours(x[:1, keep[0]], return_state=True)
    torch.testing.assert_close(got[keep], want[keep], **EXACT)
    torch.testing.assert_close(padded.conv[:1], alone.conv, **EXACT)
    torch.testing.assert_close(padded.recurrent[:1], alone.recurrent, **EXACT)


@pytest.mark.parametrize("groups", [1, 2])
def test_decoding_is_transformers_decoding(sizes, groups):
    sizes.mamba2_n_groups = groups
    theirs = published(sizes).double()
    ours = ours_like(theirs, sizes)
    x = torch.randn(2, 30, sizes.hidden_size, dtype=torch.float64)
    state, cache = None, DynamicCache(config=Mamba2Config(num_hidden_layers=1))
    with torch.no_grad():
        for piece in x.split([17] + [1] * 13, dim=1):
            want = run(theirs, piece, cache=cache)
            if state is None:
                got, state = ours(piece, return_state=True)
            else:
                got = ours.step(piece[:, 0], state)[:, None]
            torch.testing.assert_close(got, want, **EXACT)


def test_steps_are_clamped_in_decoding_too(sizes):
    """transformers' are not, so there the same text has other logits when it is decoded."""
    sizes.time_step_limit = (0.3, 0.9)
    ours = ours_like(published(sizes).double(), sizes)
    x = torch.randn(2, 12, sizes.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        first, state = ours(x[:, :5], return_state=True)
        tokens = [ours.step(token, state) for token in x[:, 5:].unbind(1)]
        torch.testing.assert_close(torch.cat([first, torch.stack(tokens, 1)], 1), ours(x), **EXACT)


def test_a_fresh_layer_starts_as_published(sizes):
    sizes.hidden_size, sizes.mamba2_num_heads = 256, 512
    layer = Mamba2.from_config(sizes, 0)
    rates, dt = layer.A_log.exp(), softplus(layer.dt_bias)
    assert 1 <= rates.min() < 1.2 and 15.8 < rates.max() <= 16.001 and 7.5 < rates.mean() < 9.5
    assert 0.99e-3 < dt.min() < 1.1e-3 and 0.09 < dt.max() < 0.101 and -4.9 < dt.log().mean() < -4.3
    assert torch.equal(layer.D, torch.ones(512)) and torch.equal(layer.norm.weight, torch.ones(512))
    assert not layer.conv1d.bias.any() and 0.49 < layer.conv1d.weight.abs().max() <= 0.5
    assert 0.99 / 16 < layer.in_proj.weight.abs().max() <= 1 / 16


def test_the_names_and_shapes_of_mamba_ssm_load():
    """As its Mamba2(d_model=24, d_state=5, headdim=8, ngroups=2) has them."""
    shapes = {
        "in_proj.weight": (2 * 48 + 2 * 2 * 5 + 6, 24),
        "conv1d.weight": (48 + 2 * 2 * 5, 1, 4),
        "conv1d.bias": (48 + 2 * 2 * 5,),
        "dt_bias": (6,),
        "A_log": (6,),
        "D": (6,),
        "norm.weight": (48,),
        "out_proj.weight": (24, 48),
    }
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    layer = Mamba2(24, state_size=5, head_dim=8, num_groups=2)
    layer.load_state_dict(weights)
    for name, x in layer.state_dict().items():
        assert torch.equal(x, weights[name].view(x.shape)), name
