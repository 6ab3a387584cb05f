"""The one tolerance: at most twice as wrong as PyTorch computed in float32 and rounded to the dtype.

An error is the largest one in the tensor, in ulps of its largest element, averaged over a few draws: among
few numbers one draw says little, and PyTorch's error may be zero by luck.
"""

from collections.abc import Callable

import torch
from torch import Tensor

DRAWS = 4


def max_error(got: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; NaN where there is one."""
    return (got.double() - truth).abs().max().item()


def assert_agrees(op: Callable, reference: Callable, **inputs: object) -> None:
    """Outputs of `op`, and the gradients of its differentiable inputs, against its reference in float64."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for draw in range(DRAWS):
        got, truth, plain = (
            outputs_and_grads(f, inputs, cast, draw)
            for f, cast in ((op, lambda x: x), (reference, Tensor.double), (reference, Tensor.float))
        )
        assert got.keys() == truth.keys()
        for what, x in got.items():
            assert x.shape == truth[what].shape, (
                f"{what}: {tuple(x.shape)}, expected {tuple(truth[what].shape)}"
            )
            ulp = torch.finfo(x.dtype).eps * truth[what].abs().max().item()
            rounded = max_error(plain[what].to(x.dtype), truth[what])
            ulp = ulp or torch.finfo(x.dtype).tiny
            errors.setdefault(what, []).append((max_error(x, truth[what]) / ulp, rounded / ulp))
    for what, x in got.items():
        error, rounded = torch.tensor(errors[what]).mean(0).tolist()
        budget = 2 * max(rounded, 1.0)
        assert error <= budget, f"{what}: {error:.2f} ulps, budget {budget:.2f} ({x.dtype}, {tuple(x.shape)})"


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
