"""Mamba's scan, over [B, D, L]."""

from torch import Tensor

from lcikernels.compat.dtypes import alike
from lcikernels.compat.serving import serves
from lcikernels.ops import checks, selective_scan

MAPS = (
    "a map for each token, [B, N, L] or [B, G, N, L]; one for all, [D, N], takes the memory of [B, L, D, N]"
)


@serves(partly={"A": "real rates", "B": MAPS, "C": MAPS})
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's scan over [B, D, L].

        delta = softplus(delta + delta_bias)                   where asked
        h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t];     y[t] = (C[t] . h[t] + D u[t]) * silu(z[t])

    u, delta, z [B, D, L], A [D, N] real, B and C each [B, N, L], [B, G, N, L] or [D, N]; D, delta_bias [D].
    Returns y [B, D, L] in u's dtype, with return_last_state also h[L], float32 [B, D, N]. Raises ValueError
    where an argument does not fit.
    """
    y, state = scan("selective_scan_fn", u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, state) if return_last_state else y


def scan(
    op: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y [B, D, L] and the state [B, D, N]."""
    sizes: dict[str, int] = {}
    checks.shape(op, "u", u, "B D L", sizes)
    checks.shape(op, "delta", delta, "B D L", sizes)
    check_rates(op, A, "D N", sizes)
    for name, axes, given in (("D", "D", D), ("z", "B D L", z), ("delta_bias", "D", delta_bias)):
        if given is not None:
            checks.shape(op, name, given, axes, sizes)
    for name, M in (("B", B), ("C", C)):
        axes = {2: "D N", 4: "B G N L"}.get(checks.axes(op, name, M), "B N L")
        checks.shape(op, name, M, axes, {**sizes})
    checks.parameters(op, u, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    dtype = u.dtype
    B, C = per_token(op, B, C, u)
    u, delta, B, C, z = alike(u, delta, B, C, z)
    y, state = selective_scan(
        u.mT,
        delta.mT,
        A.to(checks.inner(u)),
        B,
        C,
        D,
        z=None if z is None else z.mT,
        dt_bias=delta_bias,
        dt_softplus=bool(delta_softplus),
        return_final_state=True,
    )
    return y.mT.to(dtype), state


def check_rates(op: str, A: Tensor, axes: str, sizes: dict[str, int]) -> None:
    """Refuse rates of another shape, and complex ones."""
    checks.shape(op, "A", A, axes, sizes)
    if A.is_complex():
        checks.refuse(op, "A", "real: complex rates are not computed here", A.dtype)


def per_token(op: str, B: Tensor, C: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """B and C as the op reads both: [B, L, N], or [B, L, G, N] of one G."""
    if B.dim() == C.dim() == 3:
        return B.mT, C.mT
    (batch, D, L), exact = u.shape, checks.inner(u)
    whole = []
    for M in (B, C):
        if M.dim() == 2:  # each channel a group of its own
            M = M.to(exact)[None, :, :, None].expand(batch, -1, -1, L)
        whole.append(M[:, None] if M.dim() == 3 else M)
    G = max(M.shape[1] for M in whole)
    for i, name in enumerate("BC"):
        checks.divides(op, name, whole[i].shape[1], D, "groups")
        checks.divides(op, name, whole[i].shape[1], G, "groups")
        if whole[i].shape[1] != G:
            whole[i] = whole[i].to(exact).repeat_interleave(G // whole[i].shape[1], 1)
    return whole[0].movedim(-1, 1), whole[1].movedim(-1, 1)
