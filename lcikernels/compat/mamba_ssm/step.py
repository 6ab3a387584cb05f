"""One token of Mamba's scan, or of the heads of Mamba-2."""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from lcikernels.compat.dtypes import alike, exact
from lcikernels.compat.indices import check_rows
from lcikernels.compat.mamba_ssm.scan import check_rates
from lcikernels.compat.serving import serves
from lcikernels.ops import checks, retention_step, selective_scan_step


@serves(partly={"state": "whose elements are its own; it is updated in place"})
@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of the scan; `state` is updated in place. It has no gradient.

        dt = softplus(dt + dt_bias)                              where asked
        state <- exp(dt A) state + dt x B;     y = (C . state + D x) * silu(z)

    state [B, D, N], x, dt, z [B, D], A [D, N], D, dt_bias [D]; or with heads: state [B, H, P, N], x, dt, z
    [B, H, P], A [H, P, N], D, dt_bias [H, P]. B, C [B, N] or [B, G, N]. Where A, dt and dt_bias are expanded,
    one number a head, as Mamba-2 has them, the step is that of a retention. state_batch_indices int32 or
    int64 [B]: row b has the state state[state_batch_indices[b]], -1 is padding, which gives 0 and has none.
    Returns y shaped like x, in its dtype. Raises ValueError where an argument does not fit.
    """
    op, sizes = "selective_state_update", {}
    heads = checks.axes(op, "x", x) == 3
    channels = "H P" if heads else "D"
    checks.shape(op, "x", x, f"B {channels}", sizes)
    checks.shape(op, "dt", dt, f"B {channels}", sizes)
    check_rates(op, A, f"{channels} N", sizes)
    for name, M in (("B", B), ("C", C)):
        checks.shape(op, name, M, "B N" if checks.axes(op, name, M) == 2 else "B G N", sizes)
    for name, axes, given in (("D", "", D), ("z", "B ", z), ("dt_bias", "", dt_bias)):
        if given is not None:
            checks.shape(op, name, given, f"{axes}{channels}", sizes)
    lead = "B" if state_batch_indices is None else "states"
    checks.shape(op, "state", state, f"{lead} {channels} N", sizes)
    checks.written(op, state=state)
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    checks.parameters(op, x, **tensors, state=state)
    options = {}
    if state_batch_indices is not None:
        check_rows(op, "state_batch_indices", state_batch_indices, x, sizes["states"], sizes)
        options["state_indices"] = state_batch_indices
    B, C = (M[:, None] if M.dim() == 2 else M for M in (B, C))
    checks.divides(op, "B", B.shape[1], x.shape[1], "groups")
    if heads and one_a_head(A, 2) and one_a_head(dt, 1) and (dt_bias is None or one_a_head(dt_bias, 1)):
        return retained(state, x, dt[..., 0], A[..., 0, 0], B, C, D, z, dt_bias, dt_softplus, options)
    whole, dtype = state, x.dtype
    if heads:
        state, A = state.flatten(1, 2), A.flatten(0, 1)
        x, dt, z = (u if u is None else u.flatten(1) for u in (x, dt, z))
        D, dt_bias = (u if u is None else u.flatten() for u in (D, dt_bias))
    x, dt, B, C, z = alike(x, dt, B, C, z)
    y = selective_scan_step(
        *(x, dt, A.to(checks.inner(x)), B, C, D),
        state=state,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=bool(dt_softplus),
        **options,
    )
    if not heads:
        return y.to(dtype)
    one = 1 in whole.shape[1:3]  # whose stride says nothing
    if not one and whole.stride(1) != whole.shape[2] * whole.stride(2):  # flatten made a copy
        whole.copy_(state.view(whole.shape))
    return y.view(-1, *whole.shape[1:3]).to(dtype)


def one_a_head(u: Tensor, axes: int) -> bool:
    """Whether the last axes of u are one element, expanded."""
    return all(n == 1 or stride == 0 for n, stride in zip(u.shape[-axes:], u.stride()[-axes:]))


def retained(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    options: dict[str, Tensor],
) -> Tensor:
    """The step of heads x [B, H, P] that have one dt [B, H] and A [H] each."""
    dtype = exact(x, dt, A, B, C, D, z, dt_bias)
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias[:, 0]
    dt = softplus(dt) if dt_softplus else dt
    y = retention_step(
        *(C.to(dtype), B.to(dtype), x * dt[..., None], dt * A), state=state.mT, scale=1.0, **options
    )
    y = y if D is None else torch.addcmul(y, x.to(dtype), D.to(dtype))
    y = y if z is None else y * silu(z.to(dtype))
    if "state_indices" in options:
        y = y.masked_fill((options["state_indices"] < 0)[:, None, None], 0)
    return y.to(x.dtype)
