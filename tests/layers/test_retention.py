import pytest
import torch
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
    layer = Retention(sizes, 0).double()
    x = torch.randn(B, T, sizes.hidden_size, dtype=torch.float64)
    positions = torch.arange(T)[None]
    with torch.no_grad():
        got = layer(x, rotary_angles(positions, 2 * P, 100.0, torch.float64))
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
