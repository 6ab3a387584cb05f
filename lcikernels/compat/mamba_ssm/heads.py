"""mamba-ssm's functions for Mamba-2, as published in 2.3. A head is a retention whose rate follows the token:

    dt = clamp(softplus(dt + dt_bias), *dt_limit)
    S[t] = exp(dt[t] A) S[t-1] + B[t] (x) dt[t] x[t];     y[t] = (C[t] . S[t] + D x[t]) * silu(z[t])

All is computed in float32 (float64 where an argument is) and rounded once, to the dtype of x: 16 bits between
C . S and D x would double the error. A GPU multiplies 16 bits as such, and does round there. Gradients reach
every floating argument, from all results.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu, softplus

from lcikernels.compat.causal_conv1d import NAMED, activation_of, causal_conv1d_fn
from lcikernels.compat.dtypes import exact
from lcikernels.compat.indices import begins, check_numbers
from lcikernels.compat.serving import serves
from lcikernels.ops import checks, gated_rms_norm, retention

CHUNKS = {
    "chunk_size": "chunks are the op's own business",
    "state_dtype": "states are float32",
}


@serves(
    free=CHUNKS,
    partly={
        "seq_idx": "a sequence begins where the number changes; initial_states are those of number 0",
        "cu_seqlens": "with return_varlen_states, where it must agree with seq_idx",
        "return_varlen_states": "with cu_seqlens and seq_idx, without initial_states",
    },
)
def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The retention of Mamba-2's heads, as the equation above.

    x, z [B, L, H, P], dt [B, L, H], A [H], B, C [B, L, G, N], D [H] or [H, P], dt_bias [H]. dt_limit: the
    least and the most. initial_states [B, H, P, N]. seq_idx int32 or int64 [B, L], the number of each token's
    sequence: no token sees another sequence. cu_seqlens int32 or int64 [S+1], B = 1, the same sequences as
    seq_idx. Returns y [B, L, H, P] in x's dtype; with return_final_states also the state after the last
    token, float32 [B, H, P, N]; with return_varlen_states then also that of every sequence, float32
    [S, H, P, N]. Raises ValueError where an argument does not fit.
    """
    op = "mamba_chunk_scan_combined"
    y, final, each = scan(
        op,
        *(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial_states, seq_idx, cu_seqlens),
        return_varlen_states,
    )
    if z is not None:
        checks.shape(op, "z", z, "B L H P", dict(zip("BLHP", x.shape)))
        checks.parameters(op, x, z=z)
        y = y * silu(z.to(y.dtype))
    results = (y.to(x.dtype), *([final.contiguous()] if return_final_states else []))
    results = (*results, each.contiguous()) if return_varlen_states else results
    return results if len(results) > 1 else results[0]


def scan(
    op: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None = None,
    return_varlen_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [B, L, H, P] in what is computed in, without z; the states [B, H, P, N] and [S, H, P, N]."""
    sizes: dict[str, int] = {}
    checks.shape(op, "x", x, "B L H P", sizes)
    checks.shape(op, "dt", dt, "B L H", sizes)
    checks.shape(op, "A", A, "H", sizes)
    checks.shape(op, "B", B, "B L G N", sizes)
    checks.shape(op, "C", C, "B L G N", sizes)
    checks.divides(op, "B", sizes["G"], sizes["H"], "groups")
    if D is not None:
        checks.shape(op, "D", D, "H" if checks.axes(op, "D", D) == 1 else "H P", sizes)
    if dt_bias is not None:
        checks.shape(op, "dt_bias", dt_bias, "H", sizes)
    if initial_states is not None:
        checks.shape(op, "initial_states", initial_states, "B H P N", sizes)
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias}
    checks.parameters(op, x, **tensors, initial_states=initial_states)
    check_packing(op, x, seq_idx, cu_seqlens, return_varlen_states, initial_states, sizes)
    if not isinstance(dt_limit, tuple | list) or len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        checks.refuse(op, "dt_limit", "(least, most) with least <= most", dt_limit)

    dtype = exact(*tensors.values())
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias
    dt = softplus(dt) if dt_softplus else dt
    if not dt_softplus or tuple(dt_limit) != (0.0, float("inf")):
        dt = dt.clamp(*dt_limit)
    log_decay = dt * A
    packed = cu_seqlens if return_varlen_states else None
    if seq_idx is not None and packed is None:
        starts = begins(seq_idx)
        if initial_states is not None:  # a row may go on with sequence 0, but with no other
            starts = torch.cat([seq_idx[:, :1] != 0, starts[:, 1:]], 1)
        log_decay = log_decay.masked_fill(starts[..., None], -torch.inf)
    products = multiplied(x, dtype)
    y, state = retention(
        C.to(products),
        B.to(products),
        (dt[..., None] * x).to(products),
        log_decay,
        scale=1.0,
        initial_state=None if initial_states is None else initial_states.mT.to(dtype),
        cu_seqlens=packed,
        return_final_state=True,
    )
    if D is not None:
        y = y.to(dtype).addcmul_(x.to(dtype), (D[:, None] if D.dim() == 1 else D).to(dtype))
    each = state.mT
    if packed is None:
        return y, each, None
    last = (packed[:-1] < x.shape[1]).sum() - 1  # the last sequence that has tokens
    return y, each.index_select(0, last[None]), each


def multiplied(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What the retention multiplies: on a GPU 16 bits as such, an H200's data sheet has 15 times the rate."""
    return x.dtype if x.is_cuda and x.element_size() == 2 else dtype


def check_packing(op, x, seq_idx, cu_seqlens, return_varlen_states, initial_states, sizes) -> None:
    """Refuse sequences that are told in part, or twice and differently."""
    if seq_idx is not None:
        check_numbers(op, seq_idx, x, sizes)
    if return_varlen_states:
        for name, u in (("cu_seqlens", cu_seqlens), ("seq_idx", seq_idx)):
            if u is None:
                checks.refuse(op, name, "given with return_varlen_states", "None")
        if initial_states is not None:
            checks.refuse(op, "initial_states", "None with return_varlen_states", "a tensor")
    if cu_seqlens is None:
        return
    if not return_varlen_states:
        expected = "left out without return_varlen_states: seq_idx keeps sequences apart"
        checks.refuse(op, "cu_seqlens", expected, "a tensor")
    checks.packing(op, cu_seqlens, x)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = checks.boundaries(op, cu_seqlens, sizes["L"])
        starts = begins(seq_idx)[0].nonzero()[:, 0].tolist()
        if sorted({*bounds[:-1]} - {sizes["L"]}) != starts:
            checks.refuse(op, "cu_seqlens", f"where seq_idx changes, {[*starts, sizes['L']]}", bounds)


@serves(
    free=CHUNKS,
    partly={
        "seq_idx": "a sequence begins where the number changes; initial_states are those of number 0",
        "activation": NAMED.partition(";")[0],
        "outproj_bias": "with outproj_weight",
    },
)
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 layer between its projections: convolution, the scan with softplus, gate or gated norm.

        m, z, u, dt = zxbcdt;     x, B, C = activation(conv1d(u));     y = the scan of x, dt, A, B, C, D
        y = y * silu(z), or norm(y) * silu(z), or norm(y * silu(z));     [silu(m1) * m2, y] outproj_weight^T

    zxbcdt [B, L, 2 M + 2 H P + 2 G N + H], with M = 0 where there is no m; conv1d_weight [H P + 2 G N, W],
    conv1d_bias [H P + 2 G N]; dt_bias, A [H], D [H] with headdim = P, or [H, P]. initial_states [B, H, P, N].
    seq_idx as in `mamba_chunk_scan_combined`. rmsnorm_weight [H P]: an RMS norm of each of `ngroups` groups
    of channels, before the gate or after. outproj_weight [out, M + H P], outproj_bias [out]. Returns y [B, L,
    M + H P or out], with return_final_states also the state after the last token, float32 [B, H, P, N].
    Raises ValueError where an argument does not fit.
    """
    op = "mamba_split_conv1d_scan_combined"
    activation = activation_of(op, activation)
    sizes: dict[str, int] = {}
    checks.shape(op, "zxbcdt", zxbcdt, "B L width", sizes)
    checks.shape(op, "conv1d_weight", conv1d_weight, "channels W", sizes)
    checks.shape(op, "D", D, "H" if checks.axes(op, "D", D) == 1 else "H P", sizes)
    H, P = sizes["H"], sizes.get("P", headdim)
    if headdim != P if headdim is not None else P is None:
        checks.refuse(op, "headdim", "an int, or left out with D [H, P]" if P is None else P, headdim)
    inner = H * P
    maps = sizes["channels"] - inner
    if ngroups < 1 or H % ngroups or maps < 2 * ngroups or maps % (2 * ngroups):
        expected = f"[{inner} + 2 G N, W] with G={ngroups}, a divisor of H={H}"
        checks.refuse(op, "conv1d_weight", expected, tuple(conv1d_weight.shape))
    beside = sizes["width"] - (2 * inner + maps + H)
    if beside < 0 or beside % 2:
        expected = f"[B, L, 2 M + {2 * inner + maps + H}]"
        checks.refuse(op, "zxbcdt", expected, tuple(zxbcdt.shape))
    if rmsnorm_weight is not None:
        checks.shape(op, "rmsnorm_weight", rmsnorm_weight, "H*P", {"H*P": inner})
    if outproj_weight is None and outproj_bias is not None:
        checks.refuse(op, "outproj_bias", "given with outproj_weight", "it alone")
    m, z, u, dt = zxbcdt.split((beside, inner, inner + maps, H), -1)
    u = causal_conv1d_fn(u.mT, conv1d_weight, conv1d_bias, seq_idx, activation=activation).mT
    x, B, C = u.split((inner, maps // 2, maps // 2), -1)
    x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))
    y, final, _ = scan(op, x, dt, A, B, C, D, dt_bias, True, dt_limit, initial_states, seq_idx)
    y = y.flatten(-2)
    if rmsnorm_weight is None:
        y = y * silu(z.to(y.dtype))
    else:
        options = {"groups": ngroups, "norm_before_gate": bool(norm_before_gate)}
        y = gated_rms_norm(y, z.to(y.dtype), rmsnorm_weight, eps=rmsnorm_eps, **options)
    y = y.to(zxbcdt.dtype)
    if beside:
        gate, value = m.chunk(2, -1)
        y = torch.cat([silu(gate) * value, y], -1)
    if outproj_weight is not None:
        y = project(op, y, "outproj_weight", outproj_weight, "outproj_bias", outproj_bias)
    return (y, final.contiguous()) if return_final_states else y


def project(
    op: str, y: Tensor, name: str, weight: Tensor, bias_name: str = "", bias: Tensor | None = None
) -> Tensor:
    """y weight^T + bias in y's dtype, or autocast's; a bias of another dtype is not rounded."""
    sizes = {"in": y.shape[-1]}
    checks.shape(op, name, weight, "out in", sizes)
    if bias is not None:
        checks.shape(op, bias_name, bias, "out", sizes)
    checks.parameters(op, y, **{name: weight, bias_name: bias})
    if torch.is_autocast_enabled(y.device.type):
        return linear(y, weight, bias)
    if weight.dtype != y.dtype:
        checks.refuse(op, name, f"{y.dtype} like the layer's input, or under autocast", weight.dtype)
    if bias is None or bias.dtype == y.dtype:
        return linear(y, weight, bias)
    return (linear(y, weight) + bias).to(y.dtype)
