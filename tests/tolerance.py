"""The one tolerance: at most twice as wrong as PyTorch computed in float32 and rounded to the dtype.

An error is the largest one in the tensor, in ulps of its largest element, and the worst of all draws, for the
op and for PyTorch alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# PyTorch may be exact by luck in a few draws of a small tensor: where 4 do not pass, 32 decide.
FEW, MANY = 4, 32


class Float64Kept(TorchFunctionMode):
    """For references that compute in float32 whatever they are given: what is float64 stays float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        to_float32 = function is Tensor.float or (function is Tensor.to and torch.float32 in args)
        if to_float32 and args[0].dtype == torch.float64:
            return args[0]
        return function(*args, **(kwargs or {}))


def max_error(got: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; NaN where there is one."""
    return (got.double() - truth).abs().max().item()


def assert_agrees(
    op: Callable, reference: Callable, products: torch.dtype | None = None, **inputs: object
) -> None:
    """Outputs of `op`, and the gradients of its differentiable inputs, against its reference in float64.

    The first output has the dtype of the first input, a state is float32, a gradient is like its input;
    float64 inputs make all of them float64. products: what is multiplied is rounded to this dtype, so float32
    sums of it are held to its ulps.
    """
    activation = next(iter(inputs.values())).dtype
    dtypes = {"output 0": activation, "output 1": torch.promote_types(activation, torch.float32)}
    dtypes |= {f"gradient of {name}": x.dtype for name, x in inputs.items() if isinstance(x, Tensor)}
    worst: dict[str, tuple[float, float]] = {}  # in ulps, the op's and PyTorch's
    for draw in range(MANY):
        got, truth, plain = (
            outputs_and_grads(f, inputs, cast, draw)
            for f, cast in ((op, lambda x: x), (reference, Tensor.double), (reference, Tensor.float))
        )
        assert got.keys() == truth.keys()
        for what, x in got.items():
            assert (x.shape, x.dtype) == (truth[what].shape, dtypes[what]), what
            assert x.isfinite().all(), what
            exact = products or x.dtype
            ulp = torch.finfo(exact).eps * truth[what].abs().max().item() or torch.finfo(exact).tiny
            rounded = max_error(plain[what].to(exact), truth[what]) / ulp
            before = worst.get(what, (0.0, 1.0))
            worst[what] = max(before[0], max_error(x, truth[what]) / ulp), max(before[1], rounded)
        if draw + 1 >= FEW and all(error <= 2 * rounded for error, rounded in worst.values()):
            return
    what = max(worst, key=lambda what: worst[what][0] / worst[what][1])
    error, rounded = worst[what]
    raise AssertionError(f"{what}: {error:.2f} ulps, budget {2 * rounded:.2f} ({got[what].dtype})")


def outputs_and_grads(
    op: Callable, inputs: dict, cast: Callable[[Tensor], Tensor], draw: int
) -> dict[str, Tensor]:
    """Run `op` on the draw's inputs, and backward from random cotangents, the same whatever the dtype."""
    generator = torch.Generator().manual_seed(draw)
    drawn = {name: drawn_leaf(x, generator, cast) for name, x in inputs.items()}
    out = op(**drawn)
    out = out if isinstance(out, tuple) else (out,)
    results = {f"output {i}": x.detach() for i, x in enumerate(out)}
    leaves = {name: x for name, x in drawn.items() if isinstance(x, Tensor) and x.requires_grad}
    if leaves:
        cotangents = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in out]
        grads = torch.autograd.grad(out, list(leaves.values()), cotangents)
        results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
    return results


def drawn_leaf(x: object, generator: torch.Generator, cast: Callable[[Tensor], Tensor]) -> object:
    """A floating tensor times noise from 0.5 to 1.5, so that signs and zeros stay; anything else as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    noise = 0.5 + torch.rand(x.shape, generator=generator).to(x.dtype)
    return cast(x.detach() * noise).requires_grad_(x.requires_grad)
