"""mamba_chunk_scan_combined and mamba_split_conv1d_scan_combined against their equations, token by token."""

import pytest
import torch
from tolerance import assert_agrees, assert_as_torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from lcikernels.compat.mamba_ssm import heads, mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

B, L, H, P, G, N, W = 2, 11, 4, 3, 2, 5, 4
BF, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INF = float("inf")


def equation(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, INF),
    return_final_states=False,
    cu_seqlens=None,
    return_varlen_states=False,
):
    """The recurrence of each head, begun anew where the number of the sequence changes."""
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    B, C = (M.repeat_interleave(heads // groups, 2) for M in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    S = x.new_zeros(batch, heads, width, states) if initial_states is None else initial_states
    ys, each, before = [], [], torch.zeros(batch, dtype=torch.int64)
    for t in range(length):
        if seq_idx is not None:
            S = torch.where((seq_idx[:, t] == before)[:, None, None, None], S, 0)
            before = seq_idx[:, t]
        written = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        S = (dt[:, t] * A).exp()[..., None, None] * S + written
        ys.append((S * C[:, t, :, None]).sum(-1))
        each.append(S)
    y = torch.stack(ys, 1)
    y = y if D is None else y + x * (D[:, None] if D.dim() == 1 else D)
    y = y if z is None else y * silu(z)
    if return_varlen_states:
        ends = zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist())
        own = torch.stack([each[end - 1][0] if end > start else 0 * S[0] for start, end in ends])
        return (y, S, own) if return_final_states else (y, own)
    return (y, S) if return_final_states else y


def chunked(chunk_size=4, **given):
    return mamba_chunk_scan_combined(chunk_size=chunk_size, **given)


def leaf(*shape, dtype=F32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def inputs(dtype=F32, step=None, parameters=None, batch=B) -> dict[str, Tensor]:
    """All arguments; dtypes of x, B, C, z, of dt, and of A, D, dt_bias."""
    step, parameters = step or dtype, parameters or torch.promote_types(dtype, F32)
    return {
        "x": leaf(batch, L, H, P, dtype=dtype),
        "dt": leaf(batch, L, H, dtype=step),
        "A": (-torch.rand(H) - 0.1).to(parameters).requires_grad_(),
        "B": leaf(batch, L, G, N, dtype=dtype),
        "C": leaf(batch, L, G, N, dtype=dtype),
        "D": leaf(H, dtype=parameters),
        "z": leaf(batch, L, H, P, dtype=dtype),
        "dt_bias": leaf(H, dtype=parameters),
    }


CASES = {
    "all": {},
    "D for each channel": {"D": (H, P)},
    "no D": {"D": None},
    "no gate": {"z": None},
    "no bias": {"dt_bias": None},
    "limits": {"dt_limit": (0.3, 1.1)},
    "without softplus": {"dt_softplus": False},
    "without softplus, limits": {"dt_softplus": False, "dt_limit": (-0.1, 0.7)},
    "one group": {"B": (B, L, 1, N), "C": (B, L, 1, N)},
    "a group a head": {"B": (B, L, H, N), "C": (B, L, H, N)},
    "from a state": {"initial_states": (B, H, P, N)},
    "chunks of another size": {"chunk_size": 256, "state_dtype": BF},
}


def of_equation(chunk_size=None, state_dtype=None, **given):
    return equation(**given)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_every_argument_of_the_scan(options):
    options = {name: leaf(*u) if shaped(name, u) else u for name, u in options.items()}
    given = inputs() | {"dt_softplus": True, "return_final_states": True} | options
    assert_agrees(chunked, of_equation, **given)


def shaped(name: str, u: object) -> bool:
    return isinstance(u, tuple) and name != "dt_limit"


MIXED = {
    "bfloat16": (BF, BF, F32),
    "bfloat16, steps in float32": (BF, F32, F32),
    "bfloat16 with its parameters": (BF, BF, BF),
    "float16": (F16, F16, F32),
    "float32, parameters in bfloat16": (F32, F32, BF),
    "float64": (F64, F64, F64),
}


@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_every_mix_of_dtypes_is_as_exact_as_float32(dtypes):
    given = inputs(*dtypes) | {"dt_softplus": True, "return_final_states": True}
    assert_agrees(chunked, equation, **given)


@pytest.mark.parametrize("dtype", [BF, F16], ids=str)
def test_16_bits_that_are_multiplied_as_such_are_as_exact_as_their_products(dtype, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(heads, "multiplied", lambda x, exact: x.dtype)
    given = inputs(dtype, F32) | {"dt_softplus": True, "return_final_states": True}
    assert_agrees(chunked, equation, products=dtype, **given)


def test_maps_may_be_of_another_dtype_than_x():
    given = inputs(BF) | {"B": leaf(B, L, G, N), "C": leaf(B, L, G, N), "z": leaf(B, L, H, P)}
    assert_agrees(chunked, equation, **given, dt_softplus=True)


@pytest.mark.parametrize("dtype", [BF, F16, F32], ids=str)
def test_a_state_to_begin_with_may_have_16_bits(dtype):
    given = inputs() | {"initial_states": leaf(B, H, P, N, dtype=dtype)}
    assert_agrees(chunked, equation, **given, dt_softplus=True, return_final_states=True)


NUMBERS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 3], [4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 5]])


@pytest.mark.parametrize("state", [None, (B, H, P, N)], ids=["", "from a state"])
def test_numbered_sequences_do_not_see_each_other(state):
    """A state goes on in sequence 0; a row that begins with another number begins at zero."""
    given = inputs() | {"initial_states": state and leaf(*state)}
    for kind in (torch.int32, torch.int64):
        options = {"seq_idx": NUMBERS.to(kind), "dt_softplus": True, "return_final_states": True}
        assert_agrees(chunked, equation, **given, **options)


@pytest.mark.parametrize("bounds", [[0, 3, 7, 8, 11], [0, 0, 3, 7, 8, 11, 11]], ids=["", "empty ones"])
@pytest.mark.parametrize("final", [False, True], ids=["", "and the last"])
def test_the_state_of_every_sequence(bounds, final):
    packed = {"seq_idx": NUMBERS[:1], "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    options = {"return_varlen_states": True, "return_final_states": final, "dt_softplus": True}

    def states_in_one(f):
        def run(**given):
            y, *states = f(**given)
            assert len(states) == 1 + final
            return y, torch.cat(states)

        return run

    sides = states_in_one(chunked), states_in_one(equation)
    assert_agrees(*sides, **inputs(batch=1), **packed, **options)


def split_equation(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size=None,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, INF),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
    state_dtype=None,
):
    """The layer in the dtype of its input."""
    heads, width = D.shape[0], headdim if D.dim() == 1 else D.shape[1]
    dim, length, taps = heads * width, zxbcdt.shape[1], conv1d_weight.shape[1]
    maps = (conv1d_weight.shape[0] - dim) // 2
    beside = zxbcdt.shape[2] - 2 * dim - 2 * maps - heads
    m, z, u, dt = zxbcdt.split([beside, dim, dim + 2 * maps, heads], -1)
    whole = pad(u, (0, 0, taps - 1, 0))
    sums = 0
    for w in range(taps):
        part = conv1d_weight[:, w] * whole[:, w : w + length]
        if seq_idx is not None:
            before = pad(seq_idx, (taps - 1, 0), value=-9)[:, w : w + length]
            part = torch.where((before == seq_idx)[..., None], part, 0)
        sums = sums + part
    u = sums if conv1d_bias is None else sums + conv1d_bias
    u = (u if activation is None else silu(u)).to(zxbcdt.dtype)
    x, B, C = u.split([dim, maps, maps], -1)
    x = x.unflatten(-1, (heads, width))
    B, C = (M.unflatten(-1, (ngroups, -1)) for M in (B, C))
    options = {"dt_limit": dt_limit, "return_final_states": True, "dt_softplus": True}
    y, S = equation(x, dt, A, B, C, D, None, dt_bias, initial_states, seq_idx, **options)
    y = y.flatten(-2)

    def norm(y):
        parts = y.unflatten(-1, (ngroups, -1))
        return (parts * (parts.square().mean(-1, keepdim=True) + rmsnorm_eps).rsqrt()).flatten(-2)

    if rmsnorm_weight is None:
        y = y * silu(z)
    else:
        y = rmsnorm_weight * (norm(y) * silu(z) if norm_before_gate else norm(y * silu(z)))
    y = y.to(zxbcdt.dtype)
    if beside:
        first, second = m.chunk(2, -1)
        y = torch.cat([silu(first) * second, y], -1)
    if outproj_weight is not None:
        y = y @ outproj_weight.mT
        y = y if outproj_bias is None else y + outproj_bias
    return (y, S) if return_final_states else y


def split(dtype=F32, ngroups=G, beside=0) -> dict:
    """The arguments that every layer has."""
    parameters, channels = torch.promote_types(dtype, F32), H * P + 2 * ngroups * N
    return {
        "zxbcdt": leaf(B, L, beside + H * P + channels + H, dtype=dtype),
        "conv1d_weight": leaf(channels, W, dtype=dtype),
        "conv1d_bias": leaf(channels, dtype=dtype),
        "dt_bias": leaf(H, dtype=parameters),
        "A": (-torch.rand(H) - 0.1).to(parameters).requires_grad_(),
        "D": leaf(H, dtype=parameters),
        "chunk_size": 4,
        "headdim": P,
        "ngroups": ngroups,
    }


SPLIT = {
    "gated": {},
    "no activation": {"activation": None},
    "swish": {"activation": "swish"},
    "no bias": {"conv1d_bias": None},
    "D for each channel": {"D": (H, P), "headdim": None},
    "D for each channel, named": {"D": (H, P)},
    "limits": {"dt_limit": (0.3, 1.1)},
    "from a state": {"initial_states": (B, H, P, N)},
    "numbered": {"seq_idx": NUMBERS.to(torch.int32)},
    "numbered, from a state": {"seq_idx": NUMBERS, "initial_states": (B, H, P, N)},
    "norm, then gate": {"rmsnorm_weight": (H * P,), "rmsnorm_eps": 1e-2},
    "gate, then norm": {"rmsnorm_weight": (H * P,), "norm_before_gate": False},
    "projected": {"outproj_weight": (7, H * P)},
    "projected, with a bias": {"outproj_weight": (7, H * P), "outproj_bias": (7,)},
    "all": {
        "rmsnorm_weight": (H * P,),
        "norm_before_gate": False,
        "outproj_weight": (7, H * P),
        "outproj_bias": (7,),
        "seq_idx": NUMBERS,
        "state_dtype": BF,
    },
}


@pytest.mark.parametrize("ngroups", [1, G])
@pytest.mark.parametrize("options", SPLIT.values(), ids=SPLIT)
def test_every_argument_of_the_layer(options, ngroups):
    options = {name: leaf(*u) if shaped(name, u) else u for name, u in options.items()}
    given = split(ngroups=ngroups) | {"return_final_states": True} | options
    assert_agrees(mamba_split_conv1d_scan_combined, split_equation, **given)


@pytest.mark.parametrize("norm", [None, (H * P,)], ids=["gated", "normed"])
def test_channels_beside_the_scan_are_gated_by_each_other(norm):
    given = split(beside=6) | {"rmsnorm_weight": norm and leaf(*norm), "outproj_weight": leaf(7, 3 + H * P)}
    assert_agrees(mamba_split_conv1d_scan_combined, split_equation, **given)


def test_a_layer_in_float64():
    given = split(F64) | {"rmsnorm_weight": leaf(H * P, dtype=F64), "return_final_states": True}
    assert_agrees(mamba_split_conv1d_scan_combined, split_equation, **given)


@pytest.mark.parametrize("norm_before_gate", [True, False], ids=["norm, then gate", "gate, then norm"])
def test_a_layer_in_bfloat16_is_at_most_twice_as_wrong_as_pytorch_in_bfloat16(norm_before_gate):
    given = split(BF) | {"rmsnorm_weight": leaf(H * P, dtype=BF), "outproj_weight": leaf(7, H * P, dtype=BF)}
    given |= {"initial_states": leaf(B, H, P, N), "norm_before_gate": norm_before_gate}
    assert_as_torch(mamba_split_conv1d_scan_combined, split_equation, given | {"return_final_states": True})


ONES = torch.ones(1, L, dtype=torch.int32)
REFUSED = {
    "no rates": ({"A": None}, "A must be a torch.Tensor, got None"),
    "no tokens": ({"x": torch.ones(1, 0, H, P)}, "x must be .* with L at least 1"),
    "groups that do not divide": (
        {"B": torch.ones(1, L, 3, N), "C": torch.ones(1, L, 3, N)},
        "B must be such that its groups divide 4",
    ),
    "a gate of another width": ({"z": torch.ones(1, L, H, P + 1)}, "z must be .* with P=3"),
    "a state of another order": ({"initial_states": torch.ones(1, H, N, P)}, "initial_states must be"),
    "numbers of another length": ({"seq_idx": ONES[:, 1:]}, "seq_idx must be .* with L=11"),
    "numbers that are none": ({"seq_idx": ONES.float()}, "seq_idx must be int32 or int64"),
    "a bias elsewhere": ({"dt_bias": torch.ones(H, device="meta")}, "dt_bias must be on cpu"),
    "no limits": ({"dt_limit": None}, "dt_limit must be .least, most."),
    "limits that cross": ({"dt_limit": (0.5, 0.1)}, "dt_limit must be .least, most. with least <= most"),
    "sequences told twice": (
        {"seq_idx": ONES, "cu_seqlens": torch.tensor([0, L])},
        "cu_seqlens must be left out without return_varlen_states: seq_idx keeps",
    ),
    "sequences told once": ({"cu_seqlens": torch.tensor([0, L])}, "cu_seqlens must be left out without"),
    "states of no sequences": ({"return_varlen_states": True, "seq_idx": ONES}, "cu_seqlens must be given"),
    "states of unnumbered sequences": (
        {"return_varlen_states": True, "cu_seqlens": torch.tensor([0, L])},
        "seq_idx must be given with return_varlen_states",
    ),
    "sequences told differently": (
        {"seq_idx": ONES, "cu_seqlens": torch.tensor([0, 4, L], dtype=torch.int32)}
        | {"return_varlen_states": True},
        r"cu_seqlens must be where seq_idx changes, \[0, 11\], got \[0, 4, 11\]",
    ),
    "sequences past the end": (
        {"seq_idx": ONES, "cu_seqlens": torch.tensor([0, L + 1], dtype=torch.int32)}
        | {"return_varlen_states": True},
        "cu_seqlens must be 0 first, T=11 last",
    ),
    "states and a state": (
        {
            "seq_idx": ONES,
            "cu_seqlens": torch.tensor([0, L], dtype=torch.int32),
            "return_varlen_states": True,
            "initial_states": torch.ones(1, H, P, N),
        },
        "initial_states must be None with return_varlen_states",
    ),
}


@pytest.mark.parametrize("wrong, sentence", REFUSED.values(), ids=REFUSED)
def test_the_scan_refuses_by_name(wrong, sentence):
    with pytest.raises(ValueError, match=f"mamba_chunk_scan_combined: {sentence}"):
        chunked(**inputs(batch=1) | wrong)


REFUSED_LAYERS = {
    "gelu": ({"activation": "gelu"}, "activation must be None or 'silu' or 'swish', got 'gelu'"),
    "no D": ({"D": None}, "D must be a torch.Tensor, got None"),
    "no width": ({"headdim": None}, "headdim must be an int"),
    "two widths": ({"D": torch.ones(H, P), "headdim": P + 1}, "headdim must be 3, got 4"),
    "channels that do not fit": ({"conv1d_weight": torch.ones(H * P + 3, W)}, "conv1d_weight must be"),
    "groups that do not divide": ({"ngroups": 3}, "conv1d_weight must be"),
    "too few channels": ({"zxbcdt": torch.ones(B, L, 40)}, "zxbcdt must be"),
    "a norm of other channels": ({"rmsnorm_weight": torch.ones(P)}, "rmsnorm_weight must be"),
    "a bias of no projection": ({"outproj_bias": torch.ones(7)}, "outproj_bias must be given with"),
    "a projection of other channels": ({"outproj_weight": torch.ones(7, P)}, "outproj_weight must be"),
    "one of another dtype": ({"outproj_weight": torch.ones(7, H * P).double()}, "outproj_weight must be"),
}


@pytest.mark.parametrize("wrong, sentence", REFUSED_LAYERS.values(), ids=REFUSED_LAYERS)
def test_the_layer_refuses_by_name(wrong, sentence):
    with pytest.raises(ValueError, match=f"mamba_split_conv1d_scan_combined: {sentence}"):
        mamba_split_conv1d_scan_combined(**split() | wrong)
