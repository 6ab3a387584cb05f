"""The gated norms of fla.modules."""

import torch
from torch import Tensor

from lcikernels.compat.dtypes import alike, exact
from lcikernels.compat.serving import serves
from lcikernels.ops import checks, gated_rms_norm

ACTIVATIONS = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}


@serves()
def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """The RMS norm of x + residual, times weight, plus bias, times activation(g): see `norm_gated`."""
    arguments = (x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps)
    return norm_gated("rms_norm_gated", "rms", *arguments)


@serves()
def layer_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """The layer norm of x + residual, times weight, plus bias, times activation(g): see `norm_gated`."""
    arguments = (x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps)
    return norm_gated("layer_norm_gated", "layer", *arguments)


def norm_gated(
    op: str,
    kind: str,
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
    eps: float,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (norm(x + residual) * weight + bias) * activation(g), refused under the name of the function `op`.

    x, g, residual [..., D], weight and bias [D], of any floating dtypes; the sum is not rounded before it is
    normed. activation: "swish", which is "silu", or "sigmoid". Returns y in x's dtype, with prenorm also the
    sum: in residual's dtype, or where there is none x itself, with residual_in_fp32 as float32. Gradients
    reach every tensor, from both. Raises ValueError where a shape, dtype, device or activation does not fit.
    """
    checks.one_of(op, "activation", activation, tuple(ACTIVATIONS))
    sizes: dict[str, int] = {}
    axes = " ".join([*(f"axis{i}" for i in range(checks.axes(op, "x", x) - 1)), "D"])
    checks.shape(op, "x", x, axes, sizes)
    checks.shape(op, "g", g, axes, sizes)
    if residual is not None:
        checks.shape(op, "residual", residual, axes, sizes)
    for name, u in (("weight", weight), ("bias", bias)):
        if u is not None:
            checks.shape(op, name, u, "D", sizes)
    checks.parameters(op, x, x=x, g=g, residual=residual, weight=weight, bias=bias)

    total = x
    if residual is not None:
        inner = exact(x, residual)
        total = x.to(inner) + residual.to(inner)
    options = {"eps": eps, "activation": ACTIVATIONS[activation], "kind": kind}
    y = gated_rms_norm(*alike(total, g), weight, bias, **options).to(x.dtype)
    if not prenorm:
        return y
    if residual is not None:
        return y, total.to(residual.dtype)
    return y, x.to(torch.float32) if residual_in_fp32 else x
