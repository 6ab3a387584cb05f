import pytest
import torch
from tolerance import assert_agrees
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import silu

from lcikernels.layers import Retention
from lcikernels.layers.retention import retnet_log_decay
from lcikernels.layers.rotary import rotary_angles


def test_the_decays_are_those_of_retnet():
    got = retnet_log_decay(4).double().exp()
    want = 1 - torch.tensor([1 / 32, 1 / 64, 1 / 128, 1 / 256], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("log_decay", [None, [-0.3, -0.01, -2.0]], ids=["RetNet's decays", "given decays"])
def test_the_layer_is_the_papers_parallel_form(sizes, log_decay):
    """RetNet eq. 5, 7, 8: (q k^T * D) v, q and k turned as complex numbers; then norm, gate, projection."""
    torch.manual_seed(0)
    B, T, H, K, P = 2, 11, 3, 8, 2
    sizes.retention_log_decay = log_decay
    layer = Retention.from_config(sizes, 0).double()
    x = torch.randn(B, T, sizes.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        got = layer(x)
        q, k, v = (proj(x).view(B, T, H, K) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        angles = torch.arange(T).double()[:, None, None] * 100.0 ** -(torch.arange(P) / P)
        turn = torch.polar(torch.ones_like(angles), angles)
        (q, q_rest), (k, k_rest) = (
            (torch.complex(y[..., :P], y[..., P : 2 * P]) * turn, y[..., 2 * P :]) for y in (q, k)
        )
        scores = torch.einsum("bthp,bshp->bhts", q, k.conj()).real
        scores += torch.einsum("bthk,bshk->bhts", q_rest, k_rest)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        gamma = 1 - 2.0 ** (-5 - torch.arange(H).double())
        if log_decay:
            gamma = torch.tensor(log_decay, dtype=torch.float64).exp()
        decay = torch.where(distance >= 0, gamma[:, None, None] ** distance, 0.0)
        o = torch.einsum("bhts,bshv->bthv", scores * decay / K**0.5, v)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * silu(layer.g_proj(x)).view(B, T, H, K)
        want = layer.o_proj(o.flatten(2))
    # The layer's decays and angles are float32: 1e-7 relative over 11 tokens.
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * want.abs().max().item())


@pytest.mark.parametrize("per", ["head", "all"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_queries_and_keys_are_normed_before_they_rotate(per, zero_centered):
    """What the layer makes of weights, a layer without norms makes of projections that are normed by hand."""
    H, Hk, K, eps = 4, 2, 6, 0.01
    options = {"num_kv_heads": Hk, "expand_v": 1, "norm_eps": eps, "dtype": torch.float64}
    norms = {"qk_norm": per, "zero_centered_norms": zero_centered}
    layer, plain = Retention(24, H, **norms, **options), Retention(24, H, **options)
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    with torch.no_grad():
        for norm in (layer.q_norm, layer.k_norm):
            assert torch.equal(norm.weight, torch.full_like(norm.weight, 0.0 if zero_centered else 1.0))
            norm.weight.normal_()
        plain.load_state_dict(
            {n: w for n, w in layer.state_dict().items() if "q_norm" not in n and "k_norm" not in n}
        )
        for name, heads in (("q", H), ("k", Hk)):
            y = getattr(layer, f"{name}_proj")(x).view(1, 9, heads, K)
            axes = -1 if per == "head" else (-2, -1)
            gain = getattr(layer, f"{name}_norm").weight + zero_centered
            normed = y / (y.square().mean(axes, keepdim=True) + eps).sqrt()
            normed = normed * (gain if per == "head" else gain.view(heads, K))
            setattr(plain, f"{name}_proj", Given(normed.flatten(2)))
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-12)


class Given(torch.nn.Module):
    """Gives y whatever it is given."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.y = y

    def forward(self, x: Tensor) -> Tensor:
        return self.y


@pytest.mark.parametrize("given", [None, [-0.3, -0.01, -2.0]], ids=["RetNet's decays", "given decays"])
def test_learned_decays_start_where_fixed_ones_stay(given):
    fixed = Retention(24, 3, log_decay=given, dtype=torch.float64)
    layer = Retention(24, 3, log_decay=given, learned_decay=True, dtype=torch.float64)
    torch.testing.assert_close(layer.log_decay.float(), fixed.log_decay, rtol=1e-6, atol=0)
    missing, unexpected = layer.load_state_dict(fixed.state_dict(), strict=False)
    assert (missing, unexpected) == (["A_log"], []) and "log_decay" not in dict(layer.named_buffers())
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), fixed(x), rtol=0, atol=1e-6)


def test_the_gradient_of_a_learned_decay_is_that_of_finite_differences():
    layer = Retention(8, 2, log_decay=[-0.3, -0.05], learned_decay=True, dtype=torch.float64)
    x = torch.randn(1, 7, 8, dtype=torch.float64)

    def outputs(A_log: Tensor) -> Tensor:
        return functional_call(layer, {"A_log": A_log}, (x,))

    assert torch.autograd.gradcheck(outputs, layer.A_log)


def test_a_learned_decay_learns_and_stays_float32_in_16_bits():
    layer = Retention(24, 3, learned_decay=True).to(torch.bfloat16)
    before, x = layer.log_decay.detach().clone(), torch.randn(2, 9, 24, dtype=torch.bfloat16)
    layer(x).float().square().sum().backward()
    assert layer.A_log.dtype == layer.A_log.grad.dtype == layer.log_decay.dtype == torch.float32
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert (layer.log_decay != before).all() and (layer.log_decay < 0).all()
    saved = {name: w.clone() for name, w in layer.state_dict().items()}
    other = Retention(24, 3, learned_decay=True, dtype=torch.bfloat16)
    other.load_state_dict(saved)
    assert torch.equal(other.log_decay, layer.log_decay)


def test_without_rotation_a_state_has_no_positions():
    layer = Retention(24, 3, rotary_dims=0, dtype=torch.float64)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    with torch.no_grad():
        y, state = layer(x, return_state=True)
        assert state.position is None and layer.allocate_state(2).position is None
        still = rotary_angles(torch.zeros(1, 9, dtype=torch.long), 8, 10000.0, torch.float64)
        torch.testing.assert_close(Retention.forward(layer, x, rotary=still), y, rtol=0, atol=1e-12)


def fla_formula(x: Tensor, eps: float, H: int, Hk: int, **w: Tensor) -> Tensor:
    """What fla's MultiScaleRetention computes, in the dtype of x, by the parallel form."""
    B, T, _ = x.shape
    K, V, places = w["q_proj.weight"].shape[0] // H, w["o_proj.weight"].shape[1] // H, torch.arange(T)
    q = (x @ w["q_proj.weight"].mT).view(B, T, H, K)
    k = (x @ w["k_proj.weight"].mT).view(B, T, Hk, K)
    v = (x @ w["v_proj.weight"].mT).view(B, T, Hk, V).repeat_interleave(H // Hk, 2)
    angles = places[:, None, None].to(x.dtype) * 10000.0 ** -(torch.arange(0, K, 2).to(x.dtype) / K)

    def turn(y: Tensor) -> Tensor:
        one, other = y.chunk(2, -1)
        return torch.cat(
            (one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()), -1
        )

    q, k = turn(q), turn(k).repeat_interleave(H // Hk, 2)
    log_decay = torch.log1p(-torch.exp2(-5 - torch.arange(H).to(x.dtype)))
    distance = places[:, None] - places
    decay = torch.where(distance >= 0, (log_decay[:, None, None] * distance).exp(), 0)
    o = torch.einsum("bthk,bshk,hts,bshv->bthv", q, k, decay, v) * K**-0.5
    o = o / (o.square().mean(-1, keepdim=True) + eps).sqrt() * w["g_norm.weight"]
    return (o.flatten(2) * silu(x @ w["g_proj.weight"].mT)) @ w["o_proj.weight"].mT


@pytest.mark.parametrize("Hk", [4, 2])
@pytest.mark.parametrize("norm", ["g_norm_swish_gate", "g_norm"])
def test_flas_weights_load_and_compute_what_fla_computes(Hk, norm):
    """Its MultiScaleRetention(hidden_size=24, num_heads=4), keys as wide as x, values twice as wide."""
    H, eps = 4, 1e-5
    shapes = {"q": (24, 24), "k": (24 * Hk // H, 24), "v": (48 * Hk // H, 24), "g": (48, 24), "o": (24, 48)}
    weights = {f"{name}_proj.weight": torch.randn(shape) / 4 for name, shape in shapes.items()}
    weights[f"{norm}.weight"] = torch.rand(12) + 0.5
    layer = Retention(24, H, num_kv_heads=Hk, norm_weight=True, norm_eps=eps)
    layer.load_state_dict(weights, strict=True)
    for name, x in layer.state_dict().items():
        assert torch.equal(x, weights[f"{norm}.weight" if "norm" in name else name])
    leaves = {name: x.requires_grad_() for name, x in weights.items() if "norm" not in name}
    leaves["g_norm.weight"] = weights[f"{norm}.weight"].requires_grad_()

    def ours(x: Tensor, **w: Tensor) -> Tensor:
        w["norm.weight"] = w.pop("g_norm.weight")
        return functional_call(layer, w, (x,))

    x = torch.randn(2, 19, 24, requires_grad=True)
    assert_agrees(ours, lambda x, **w: fla_formula(x, eps, H, Hk, **w), x=x, **leaves)


def test_positions_are_the_layers_own_or_the_callers():
    """Only differences count, so a caller that counts from 7 gets what the layer gives that counts from 0."""
    layer = Retention(24, 3, dtype=torch.float64)
    x, places = torch.randn(2, 9, 24, dtype=torch.float64), torch.arange(7, 16)[None]
    with torch.no_grad():
        want, state = layer(x, return_state=True)
        got, theirs = layer(x, rotary=rotary_angles(places, 8, 10000.0, torch.float64), return_state=True)
        others = layer(x, rotary=rotary_angles(places * 2, 8, 10000.0, torch.float64))
        assert state.position.tolist() == [9, 9] and theirs.position is None
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * want.abs().max().item())
        assert (others - want).abs().max() > 1e-3 * want.abs().max()
        with pytest.raises(ValueError, match="rotary must be given, as it was where the state comes from"):
            layer(x, theirs)


def test_decays_are_given_a_head_or_retnets(sizes):
    given = [-1 / 3, 0.0, -2.0]
    layer = Retention(24, 3, log_decay=given, dtype=torch.bfloat16)
    assert torch.equal(layer.log_decay, torch.tensor(given))
    assert torch.equal(layer.double().log_decay, torch.tensor(given))
    assert torch.equal(Retention(24, 3).log_decay, retnet_log_decay(3))
    assert "log_decay" not in layer.state_dict()


def test_a_fresh_layer_starts_as_published():
    """torchscale's: Xavier's matrices, by 2 ** -2.5, the last by 1/2."""
    layer = Retention(64, 4, norm_weight=True, bias=True)
    for name, gain in (("q", 2**-2.5), ("v", 2**-2.5), ("o", 0.5)):
        weight = getattr(layer, f"{name}_proj").weight
        bound = gain * (6 / sum(weight.shape)) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
    assert torch.equal(layer.norm.weight, torch.ones(32)) and not layer.q_proj.bias.any()
