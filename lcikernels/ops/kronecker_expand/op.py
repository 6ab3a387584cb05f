"""LiGO's expansion: contract, dispatcher entry, autograd formula, backends."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ... import backends, extension
from .. import checks
from ..library import define, differentiate, refuse_gradients

OP = "kronecker_expand"


def on_cuda(x: Tensor) -> str | None:
    """Why the compiled CUDA kernels cannot compute with a weight like `x`, or None."""
    return extension.on_cuda(f"{OP}_forward", x)


HERE = "lcikernels.ops.kronecker_expand"
backends.table(
    OP,
    {
        "cuda": backends.Backend(f"{HERE}.cuda", on_cuda),
        "cpp": backends.Backend(f"{HERE}.cpp", extension.on_cpu),
        "torch": backends.Backend(f"{HERE}.blocked", backends.anywhere),
    },
)


def kronecker_expand(
    weight: Tensor,
    write: Tensor,
    read: Tensor,
    depth: Tensor | None = None,
    *,
    added: bool = False,
    backend: str | None = None,
) -> Tensor:
    """New layers out of old ones, wider on both sides; the Kronecker product is never in memory, and of the
    wide old layers the forward has a few rows at a time.

        out[i] = sum_j depth[i, j] write[j] · weight[j] · read[j]ᵀ
        vec(out) = (depth ⊗ I) blockdiag_j(write[j] ⊗ read[j]) vec(weight)

    weight [L1, m, n]; write [M, m] and read [N, n], or one for each old layer, [L1, M, m] and [L1, N, n];
    depth [L2, L1], the identity unless given. All share one dtype: float32, float64, bfloat16 or float16;
    sums are float32 at least. Returns out [L2, M, N], or [L1, M, N], like weight. Gradients reach all four.

    added: the old units stay as they are, and write [M - m, m] and read [N - n, n], shared by all layers, are
    the maps of new ones below: [I; write] and [I; read] are multiplied, and the identities cost nothing.

    Raises ValueError where a shape, dtype or device does not fit, RuntimeError where `backend` cannot run.
    Wang et al. 2023 (LiGO), eq. 6.
    """
    sizes: dict[str, int] = {}
    checks.flags(OP, added=added)
    checks.shape(OP, "weight", weight, "L1 m n", sizes)
    if added:  # none of them may be new, which is why their number is told beforehand
        for name, axis, u in (("write", "M-m", write), ("read", "N-n", read)):
            sizes[axis] = u.shape[0] if checks.axes(OP, name, u) else 1
        checks.shape(OP, "write", write, "M-m m", sizes)
        checks.shape(OP, "read", read, "N-n n", sizes)
    else:
        checks.shape(OP, "write", write, "M m" if checks.axes(OP, "write", write) == 2 else "L1 M m", sizes)
        checks.shape(OP, "read", read, "N n" if checks.axes(OP, "read", read) == 2 else "L1 N n", sizes)
    if depth is not None:
        checks.shape(OP, "depth", depth, "L2 L1", sizes)
    checks.activations(OP, weight=weight, write=write, read=read, depth=depth)
    name = backends.choose(OP, backend, weight)
    return torch.ops.lcikernels.kronecker_expand(weight, write, read, depth, added, name)


def _forward_fake(weight, write, read, depth, added, backend):
    L1, m, n = weight.shape
    L = L1 if depth is None else depth.shape[0]
    return weight.new_empty(L, write.shape[-2] + m * added, read.shape[-2] + n * added)


def _backward_fake(grad_out, weight, write, read, depth, added, need_weight, backend):
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    ddepth = weight.new_empty(0 if depth is None else depth.shape)
    return dweight, write.new_empty(write.shape), read.new_empty(read.shape), ddepth


define(
    "kronecker_expand(Tensor weight, Tensor write, Tensor read, Tensor? depth, bool added, str backend)"
    " -> Tensor",
    backends.hand_over(OP, "forward"),
    _forward_fake,
)
define(
    "kronecker_expand_backward(Tensor grad_out, Tensor weight, Tensor write, Tensor read, Tensor? depth,"
    " bool added, bool need_weight, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    backends.hand_over(OP, "backward"),
    _backward_fake,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.added, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad_out):
    weight, write, read, depth = ctx.saved_tensors
    if grad_out is None:
        return None, None, None, None, None, None
    need_weight = ctx.needs_input_grad[0]
    dweight, dwrite, dread, ddepth = torch.ops.lcikernels.kronecker_expand_backward(
        grad_out, weight, write, read, depth, ctx.added, need_weight, ctx.backend
    )
    return dweight if need_weight else None, dwrite, dread, None if depth is None else ddepth, None, None


differentiate(OP, _autograd, _setup)
refuse_gradients("kronecker_expand_backward")


# Counted as the fewest products that a shared pair of maps needs: one side after the other, of new units
# alone where they are added, for mixed layers, or for old ones and then the mix. The backward has twice that.
@register_flop_formula(torch.ops.lcikernels.kronecker_expand)
def _flops(weight, write, read, depth, added, *args, **kwargs) -> int:
    (L1, m, n), more_m, more_n = weight, write[-2], read[-2]
    M, N = more_m + m * added, more_n + n * added
    widening = min(more_m * n * m + more_n * n * M, more_n * m * n + more_m * m * N)
    L2, mixing = (L1, 0) if depth is None else (depth[0], depth[0] * L1)
    return 2 * min(mixing * m * n + L2 * widening, mixing * M * N + L1 * widening)


@register_flop_formula(torch.ops.lcikernels.kronecker_expand_backward)
def _backward_flops(grad_out, weight, write, read, depth, added, *args, **kwargs) -> int:
    return 2 * _flops(weight, write, read, depth, added)
