"""The gated norms of mamba_ssm.ops.triton.layernorm_gated."""

from torch import Tensor

from lcikernels.compat.dtypes import alike
from lcikernels.compat.serving import serves
from lcikernels.ops import checks, gated_rms_norm


@serves()
def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """norm(x) * weight + bias, times silu(z), or with norm_before_gate=False the same norm of x * silu(z).

    x, z [..., D], weight, bias [D]; the norm divides by the root of the mean square of each `group_size`
    channels, of all unless given. Returns y like x. Raises ValueError where an argument does not fit.
    """
    return norm("rmsnorm_fn", "rms", x, weight, bias, z, eps, group_size, norm_before_gate)


@serves()
def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """As `rmsnorm_fn`, of x less the mean of its group, unless is_rms_norm."""
    kind = "rms" if is_rms_norm else "layer"
    return norm("layernorm_fn", kind, x, weight, bias, z, eps, group_size, norm_before_gate)


def norm(
    op: str,
    kind: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
) -> Tensor:
    checks.axes(op, "x", x)
    D, dtype = x.shape[-1], x.dtype
    for name, u in (("weight", weight), ("bias", bias)):
        if u is not None or name == "weight":
            checks.shape(op, name, u, "D", {"D": D})
    if z is not None and z.shape != x.shape:
        checks.refuse(op, "z", f"shaped like x {tuple(x.shape)}", tuple(z.shape))
    checks.parameters(op, x, x=x, weight=weight, bias=bias, z=z)
    group_size = D if group_size is None else group_size
    if not isinstance(group_size, int) or group_size < 1 or D % group_size:
        checks.refuse(op, "group_size", f"None or a divisor of D={D}", repr(group_size))
    x, z = alike(x, z)
    options = {"groups": D // group_size, "norm_before_gate": bool(norm_before_gate), "kind": kind}
    return gated_rms_norm(x, z, weight, bias, eps=eps, **options).to(dtype)
