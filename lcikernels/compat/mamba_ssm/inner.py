"""Mamba's layer, but for its first projection, as one function."""

from torch import Tensor

from lcikernels.compat.causal_conv1d import causal_conv1d_fn
from lcikernels.compat.mamba_ssm.heads import project
from lcikernels.compat.mamba_ssm.scan import MAPS, check_rates, scan
from lcikernels.compat.serving import serves
from lcikernels.ops import checks, gated_rms_norm


@serves(
    free={"checkpoint_lvl": "what is kept for the backward pass is the op's own business"},
    partly={
        "A": "real rates",
        "B": MAPS,
        "C": MAPS,
        "B_proj_bias": "where B is left out",
        "C_proj_bias": "where C is left out",
        "b_rms_weight": "where B is left out",
        "c_rms_weight": "where C is left out",
    },
)
def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba layer after its first projection.

        u, z = xz;   u = silu(conv1d(u));   low, B, C = x_proj_weight u;   delta = delta_proj_weight low
        B = norm(B + B_proj_bias),  C = norm(C + C_proj_bias),  delta = norm(delta)              where given
        y = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias);   y^T out_proj_weight^T + out_proj_bias

    xz [B, 2 D, L]; conv1d_weight [D, 1, W], conv1d_bias [D]; x_proj_weight [R + N + N, D], without the rows
    of a B or C that is given, as in `selective_scan_fn`; delta_proj_weight [D, R]; out_proj_weight [out, D],
    out_proj_bias [out] of any floating dtype; A, D, delta_bias as there; b_rms_weight, c_rms_weight [N] and
    dt_rms_weight [D], weights of RMS norms. Under autocast the three projections are in its dtype. Returns
    [B, L, out]. Raises ValueError where an argument does not fit.
    """
    op, sizes = "mamba_inner_fn", {}
    checks.shape(op, "xz", xz, "B 2D L", sizes)
    checks.divides(op, "xz", 2, sizes["2D"], "two halves")
    sizes["D"] = sizes["2D"] // 2
    checks.shape(op, "conv1d_weight", conv1d_weight, "D 1 W", {"1": 1, **sizes})
    check_rates(op, A, "D N", sizes)
    checks.shape(op, "delta_proj_weight", delta_proj_weight, "D R", sizes)
    R, N = sizes["R"], sizes["N"]
    sizes["rows"] = R + N * ((B is None) + (C is None))
    checks.shape(op, "x_proj_weight", x_proj_weight, "rows D", sizes)
    u, z = xz.chunk(2, 1)
    u = causal_conv1d_fn(u, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    low = project(op, u.mT, "x_proj_weight", x_proj_weight)
    delta = project(op, low[..., :R], "delta_proj_weight", delta_proj_weight)
    if dt_rms_weight is not None:
        checks.shape(op, "dt_rms_weight", dt_rms_weight, "D", sizes)
        delta = gated_rms_norm(delta, weight=dt_rms_weight, eps=b_c_dt_rms_eps)
    B = made(op, "B", B, low[..., R : R + N], B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    C = made(op, "C", C, low[..., -N:], C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    y, _ = scan(op, u, delta.mT, A, B, C, D, z, delta_bias, delta_softplus)
    return project(op, y.mT, "out_proj_weight", out_proj_weight, "out_proj_bias", out_proj_bias)


def made(
    op: str,
    name: str,
    given: Tensor | None,
    part: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    """B or C: the one that is given, or [B, N, L] of its part [B, L, N] of the projection."""
    for argument, u in ((f"{name}_proj_bias", bias), (f"{name.lower()}_rms_weight", weight)):
        if u is not None and given is not None:
            checks.refuse(op, argument, f"None where {name} is given", "a tensor")
    if given is not None:
        return given
    if bias is not None:
        checks.shape(op, f"{name}_proj_bias", bias, "N", {"N": part.shape[-1]})
        part = part + bias.to(part.dtype)
    if weight is not None:
        checks.shape(op, f"{name.lower()}_rms_weight", weight, "N", {"N": part.shape[-1]})
        part = gated_rms_norm(part, weight=weight, eps=eps)
    return part.mT
