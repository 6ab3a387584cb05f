"""selective_scan_fn and mamba_inner_fn against their equations, token by token, in mamba-ssm's layout."""

import pytest
import torch
from tolerance import assert_agrees, assert_as_torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from lcikernels.compat.mamba_ssm import mamba_inner_fn, selective_scan_fn

B, D, L, N, G = 2, 6, 7, 3, 2
MAPS = {"constant": (D, N), "a token's": (B, N, L), "of groups": (B, G, N, L)}


def scan_equation(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """The recurrence, a channel's maps spelled out."""
    (batch, channels, length), states = u.shape, A.shape[1]
    B, C = (of_channels(M, batch, channels, length) for M in (B, C))
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = softplus(delta) if delta_softplus else delta
    h, ys = u.new_zeros(batch, channels, states), []
    for t in range(length):
        dt = delta[:, :, t, None]
        h = (dt * A).exp() * h + dt * B[..., t] * u[:, :, t, None]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u
    y = y if z is None else y * silu(z)
    return (y, h) if return_last_state else y


def of_channels(M: Tensor, batch: int, channels: int, length: int) -> Tensor:
    """[B, D, N, L]."""
    if M.dim() == 2:
        return M[None, :, :, None].expand(batch, -1, -1, length)
    M = M[:, None] if M.dim() == 3 else M
    return M.repeat_interleave(channels // M.shape[1], 1)


def leaf(*shape, dtype=torch.float32, scale=1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


def rates(*shape, dtype=torch.float32) -> Tensor:
    return (-torch.rand(*shape) - 0.1).to(dtype).requires_grad_()


def inputs(dtype=torch.float32, maps=None, parameters=None, b=(B, N, L), c=(B, N, L)) -> dict[str, Tensor]:
    """All arguments; dtypes of the activations, of B and C, of A, D and delta_bias."""
    maps, parameters = maps or dtype, parameters or torch.promote_types(dtype, torch.float32)
    return {
        "u": leaf(B, D, L, dtype=dtype),
        "delta": leaf(B, D, L, dtype=dtype),
        "A": rates(D, N, dtype=parameters),
        "B": leaf(*b, dtype=maps),
        "C": leaf(*c, dtype=maps),
        "D": leaf(D, dtype=parameters),
        "z": leaf(B, D, L, dtype=dtype),
        "delta_bias": leaf(D, dtype=parameters),
    }


@pytest.mark.parametrize("b", MAPS.values(), ids=[f"B {name}" for name in MAPS])
@pytest.mark.parametrize("c", MAPS.values(), ids=[f"C {name}" for name in MAPS])
def test_every_shape_of_the_maps(b, c):
    options = {"delta_softplus": True, "return_last_state": True}
    assert_agrees(selective_scan_fn, scan_equation, **inputs(b=b, c=c), **options)


@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias"])
def test_what_may_be_left_out(left_out):
    assert_agrees(selective_scan_fn, scan_equation, **inputs() | {left_out: None}, delta_softplus=True)


def test_steps_without_softplus():
    given = inputs()
    given["delta"] = given["delta"].detach().abs().requires_grad_()
    given["delta_bias"] = given["delta_bias"].detach().abs().requires_grad_()
    assert_agrees(selective_scan_fn, scan_equation, **given, return_last_state=True)


BF, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MIXED = {
    "bfloat16": (BF, BF, F32),
    "bfloat16, maps in float32": (BF, F32, F32),
    "bfloat16 with its rates": (BF, BF, BF),
    "float16, maps in bfloat16": (F16, BF, F32),
    "float32, maps in bfloat16": (F32, BF, F32),
    "float64": (F64, F64, F64),
    "float64, rates in float32": (F64, F64, F32),
}


@pytest.mark.parametrize("b", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_every_mix_of_dtypes_is_as_exact_as_float32(dtypes, b):
    given = inputs(*dtypes, b=b)
    assert_agrees(selective_scan_fn, scan_equation, **given, delta_softplus=True, return_last_state=True)


def test_the_gate_and_the_step_may_be_of_other_dtypes():
    given = inputs(BF) | {"z": leaf(B, D, L), "delta": leaf(B, D, L)}
    assert_agrees(selective_scan_fn, scan_equation, **given, delta_softplus=True)


def test_halves_of_a_projection_are_read_where_they_are():
    xz = torch.randn(B, 2 * D, L)
    u, z = xz.chunk(2, 1)
    given = {name: x.detach() for name, x in inputs().items()} | {"u": u, "z": z}
    apart = given | {"u": u.clone(), "z": z.clone()}
    y = selective_scan_fn(**given, delta_softplus=True)
    assert torch.equal(y, selective_scan_fn(**apart, delta_softplus=True))


R, OUT = 3, 4


def inner_equation(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):
    """The layer in the dtype of its input."""
    (length, states), (rank, taps) = (
        (xz.shape[2], A.shape[1]),
        (delta_proj_weight.shape[1], conv1d_weight.shape[2]),
    )
    u, z = xz.chunk(2, 1)
    whole = torch.nn.functional.pad(u, (taps - 1, 0))
    u = sum(conv1d_weight[:, :, w] * whole[..., w : w + length] for w in range(taps))
    u = silu(u if conv1d_bias is None else u + conv1d_bias[:, None]).to(xz.dtype)
    low = torch.einsum("rd,bdl->brl", x_proj_weight, u)
    delta = torch.einsum("dr,brl->bdl", delta_proj_weight, low[:, :rank])

    def norm(x, weight):
        return weight[:, None] * x * (x.square().mean(1, keepdim=True) + b_c_dt_rms_eps).rsqrt()

    if B is None:
        B = low[:, rank : rank + states]
        B = B if B_proj_bias is None else B + B_proj_bias[:, None]
        B = B if b_rms_weight is None else norm(B, b_rms_weight)
    if C is None:
        C = low[:, -states:]
        C = C if C_proj_bias is None else C + C_proj_bias[:, None]
        C = C if c_rms_weight is None else norm(C, c_rms_weight)
    delta = delta if dt_rms_weight is None else norm(delta, dt_rms_weight)
    y = scan_equation(u, delta, A, B, C, D, z, delta_bias, delta_softplus).to(xz.dtype)
    y = torch.einsum("od,bdl->blo", out_proj_weight, y)
    return y if out_proj_bias is None else (y + out_proj_bias).to(xz.dtype)


def layer(dtype=F32, rows=R + 2 * N, bias=None) -> dict[str, Tensor]:
    """The arguments that every layer has."""
    return {
        "xz": leaf(B, 2 * D, L, dtype=dtype),
        "conv1d_weight": leaf(D, 1, 4, dtype=dtype),
        "conv1d_bias": leaf(D, dtype=dtype),
        "x_proj_weight": leaf(rows, D, dtype=dtype),
        "delta_proj_weight": leaf(D, R, dtype=dtype),
        "out_proj_weight": leaf(OUT, D, dtype=dtype),
        "out_proj_bias": leaf(OUT, dtype=bias or dtype),
        "A": rates(D, N, dtype=torch.promote_types(dtype, F32)),
        "D": leaf(D, dtype=torch.promote_types(dtype, F32)),
        "delta_bias": leaf(D, dtype=torch.promote_types(dtype, F32)),
    }


LAYERS = {
    "as Mamba's": {},
    "no biases": {"conv1d_bias": None, "out_proj_bias": None, "delta_bias": None},
    "no D": {"D": None},
    "norms": {"b_rms_weight": (N,), "c_rms_weight": (N,), "dt_rms_weight": (D,), "b_c_dt_rms_eps": 1e-2},
    "biases of the maps": {"B_proj_bias": (N,), "C_proj_bias": (N,)},
    "biases and norms": {
        "B_proj_bias": (N,),
        "c_rms_weight": (N,),
        "C_proj_bias": (N,),
        "b_rms_weight": (N,),
    },
    "either level of checkpoints": {"checkpoint_lvl": 0},
}


def with_options(given: dict, options: dict) -> dict:
    return given | {name: leaf(*u) if isinstance(u, tuple) else u for name, u in options.items()}


def without_level(checkpoint_lvl=1, **given):
    return inner_equation(**given)


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_the_inner_function_is_its_equation(options):
    assert_agrees(mamba_inner_fn, without_level, **with_options(layer(), options))
    exact = {name: x.detach().double().requires_grad_() for name, x in layer().items()}
    assert_agrees(mamba_inner_fn, without_level, **exact)


GIVEN = {"B constant": ("B",), "C for each token": ("C",), "both": ("B", "C")}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_maps_that_are_given_are_not_projected(given):
    shapes = {"B": (D, N), "C": (B, G, N, L)}
    inputs = layer(rows=R + N * (2 - len(given)))
    assert_agrees(
        mamba_inner_fn, inner_equation, **with_options(inputs, {name: shapes[name] for name in given})
    )


def test_a_layer_without_softplus():
    given = layer()
    for name in ("delta_bias", "delta_proj_weight", "x_proj_weight"):
        given[name] = (0.1 * given[name].detach()).requires_grad_()
    assert_agrees(mamba_inner_fn, inner_equation, **given, delta_softplus=False)


@pytest.mark.parametrize("bias", [BF, F32], ids=str)
def test_a_layer_in_bfloat16_is_at_most_twice_as_wrong_as_pytorch_in_bfloat16(bias):
    """Between its parts a layer rounds, so it is held to the same parts in torch."""
    assert_as_torch(mamba_inner_fn, inner_equation, layer(BF, bias=bias))


def test_under_autocast_the_projections_are_in_its_dtype():
    given = {name: x.detach() for name, x in layer().items()}
    given["xz"] = given["xz"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = mamba_inner_fn(**given)
    narrow = given | {name: u.bfloat16() for name, u in given.items() if "proj" in name}
    assert y.dtype == BF and torch.equal(y, mamba_inner_fn(**narrow))


REFUSED = {
    "complex rates": ("A", torch.ones(D, N, dtype=torch.complex64), "A must be real"),
    "no step": ("delta", None, "delta must be a torch.Tensor, got None"),
    "no tokens": ("u", torch.ones(B, D, 0), "u must be .* with L at least 1"),
    "a sparse step": ("delta", torch.ones(B, D, L).to_sparse(), "delta must be dense"),
    "an array": ("B", [[1.0]], "B must be a torch.Tensor, got <class 'list'>"),
    "a map of other states": ("B", torch.ones(B, N + 1, L), "B must be .* with N=3"),
    "a map without tokens": ("C", torch.ones(N), "C must be"),
    "complex maps": ("B", torch.ones(B, N, 2 * L), "B must be .* with L=7"),
    "groups that do not divide": ("C", torch.ones(B, 4, N, L), "C must be such that its groups divide"),
    "a gate of another length": ("z", torch.ones(B, D, L + 1), "z must be .* with L=7"),
    "a bias elsewhere": ("delta_bias", torch.ones(D, device="meta"), "delta_bias must be on cpu"),
    "integers": ("D", torch.ones(D, dtype=torch.int64), "D must be float32"),
}


@pytest.mark.parametrize("name, wrong, sentence", REFUSED.values(), ids=REFUSED)
def test_the_scan_refuses_by_name(name, wrong, sentence):
    with pytest.raises(ValueError, match=f"selective_scan_fn: {sentence}"):
        selective_scan_fn(**inputs() | {name: wrong})


REFUSED_LAYERS = {
    "complex rates": ({"A": torch.ones(D, N, dtype=torch.complex64)}, "A must be real"),
    "a bias of a map that is given": ({"B": torch.ones(D, N), "B_proj_bias": torch.ones(N)}, ""),
    "a weight of another dtype": (
        {"out_proj_weight": torch.ones(OUT, D).double()},
        "out_proj_weight must be",
    ),
    "a weight without its axis of 1": ({"conv1d_weight": torch.ones(D, 4)}, "conv1d_weight must be"),
    "too few rows": ({"x_proj_weight": torch.ones(R + N, D)}, "x_proj_weight must be"),
    "a norm of other channels": ({"dt_rms_weight": torch.ones(R)}, "dt_rms_weight must be"),
    "channels in no halves": ({"xz": torch.ones(B, 2 * D + 1, L)}, "xz must be"),
}


@pytest.mark.parametrize("wrong, sentence", REFUSED_LAYERS.values(), ids=REFUSED_LAYERS)
def test_the_layer_refuses_by_name(wrong, sentence):
    rows = R + N * (1 if "B" in wrong else 2)
    given = layer(rows=rows) | wrong
    with pytest.raises(ValueError, match=f"mamba_inner_fn: {sentence or 'B_proj_bias must be None'}"):
        mamba_inner_fn(**given)
