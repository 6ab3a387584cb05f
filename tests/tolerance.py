"""The one tolerance: at most twice as wrong as PyTorch computed in float32 and rounded to the dtype.

    error(op) <= 2 max(error(plain), ulp)

An error is the largest one of all draws, for the op and for PyTorch alike, and an ulp is that of the largest
element of all draws: a draw whose sum happens to cancel has ulps of its own that measure nothing.

`plain` is PyTorch's answer to inputs that are off by one float32 ulp each, up or down: 1e-7 of each, and what
that makes of a result. To the inputs as they are PyTorch may be exact by luck, on one processor and not on
another, where a sum is short, where its order suits the numbers, or where an exp happens to round well; but a
kernel that rounds each input's product once, and sums in an order of its own, is off by that much anywhere.

What a reference says of the same inputs is computed once for all backends and instruction sets.
"""

import ctypes
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The largest of a few numbers is luck: where 4 draws do not pass, 32 decide.
FEW, MANY = 4, 32

# Answers of references, the latest last, to 1 MiB of inputs at most.
ANSWERS: OrderedDict[Hashable, tuple[dict, dict]] = OrderedDict()
KEPT, LARGEST = 256, 1 << 20


class Float64Kept(TorchFunctionMode):
    """For references that compute in float32 whatever they are given: what is float64 stays float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        to_float32 = function is Tensor.float or (function is Tensor.to and torch.float32 in args)
        if to_float32 and args[0].dtype == torch.float64:
            return args[0]
        return function(*args, **(kwargs or {}))


def largest(x: Tensor) -> float:
    """The largest absolute number; NaN where there is one, 0 where there is none."""
    return x.abs().max().item() if x.numel() else 0.0


def max_error(got: Tensor, truth: Tensor) -> float:
    """The largest absolute difference."""
    return largest(got.double() - truth)


def assert_agrees(
    op: Callable, reference: Callable, products: torch.dtype | None = None, few: int = FEW, **inputs: object
) -> None:
    """Outputs of `op`, and the gradients of its differentiable inputs, against its reference in float64.

    The first output has the dtype of the first input, a state is float32, a gradient is like its input;
    float64 inputs make all of them float64. products: what is multiplied is rounded to this dtype, so float32
    sums of it are held to its ulps. few: so many draws that pass are enough.
    """
    activation = next(iter(inputs.values())).dtype
    dtypes = {"output 0": activation, "output 1": torch.promote_types(activation, torch.float32)}
    dtypes |= {f"gradient of {name}": x.dtype for name, x in inputs.items() if isinstance(x, Tensor)}
    worst: dict[str, Errors] = {}
    question = asked(reference, inputs)
    for draw in range(MANY):
        got = outputs_and_grads(op, inputs, lambda x: x, draw)
        truth, plain = answers(reference, inputs, draw, question)
        assert got.keys() == truth.keys()
        for what, x in got.items():
            assert (x.shape, x.dtype) == (truth[what].shape, dtypes[what]), what
            assert x.isfinite().all(), what
            errors = Errors.of(x, truth[what], plain[what], products)
            worst[what] = errors if draw == 0 else worst[what].with_draw(errors)
        if draw + 1 >= few and all(errors.agree for errors in worst.values()):
            return
    what = max(worst, key=lambda what: worst[what].error / worst[what].budget)
    raise AssertionError(f"{what}: {worst[what]} ({got[what].dtype})")


def assert_as_torch(op: Callable, equation: Callable, inputs: dict[str, object]) -> None:
    """Of a function that rounds between its parts: at most twice as wrong as PyTorch in the same dtypes.

    `equation` computes in the dtypes that it is given, and rounds where the function says that it does.
    """
    worst: dict[str, tuple[float, float]] = {}
    for draw in range(MANY):
        got, truth, plain = (
            outputs_and_grads(f, inputs, cast, draw)
            for f, cast in ((op, lambda x: x), (equation, Tensor.double), (equation, lambda x: x))
        )
        for what, x in got.items():
            assert (x.shape, x.dtype) == (plain[what].shape, plain[what].dtype), what
            ulp = torch.finfo(x.dtype).eps * truth[what].abs().max().item()
            errors = max_error(x, truth[what]), max(max_error(plain[what], truth[what]), ulp)
            worst[what] = tuple(map(max, errors, worst.get(what, errors)))
    for what, (error, budget) in worst.items():
        assert error <= 2 * budget, f"{what}: {error:.2e}, budget {2 * budget:.2e}"


class Errors(NamedTuple):
    """Of one tensor: the op's and PyTorch's largest, the largest element, the eps that both are held to."""

    error: float
    plain: float
    largest: float
    eps: float

    @classmethod
    def of(cls, got: Tensor, truth: Tensor, plain: Tensor, products: torch.dtype | None = None) -> "Errors":
        exact = products or got.dtype
        rounded = max_error(plain.to(exact), truth)
        return cls(max_error(got, truth), rounded, largest(truth), torch.finfo(exact).eps)

    def with_draw(self, other: "Errors") -> "Errors":
        return Errors(*map(max, self, other))

    @property
    def ulp(self) -> float:
        return self.eps * self.largest or self.eps * torch.finfo(torch.float32).tiny

    @property
    def budget(self) -> float:
        return 2 * max(self.plain, self.ulp)

    @property
    def agree(self) -> bool:
        return self.error <= self.budget

    def __str__(self) -> str:
        return f"{self.error / self.ulp:.2f} ulps, budget {self.budget / self.ulp:.2f}"


def off_by_an_ulp(x: Tensor) -> Tensor:
    """In float32, every element one ulp up or down; the same elements the same way each time."""
    up = torch.rand(x.shape, generator=torch.Generator().manual_seed(x.numel())) < 0.5
    return x.float() * (1 + torch.finfo(torch.float32).eps * (2.0 * up.to(x.device) - 1))


def answers(
    reference: Callable, inputs: dict, draw: int, question: Hashable | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's in float64, and PyTorch's."""
    kept = ANSWERS.pop((question, draw), None) if question else None
    if kept is None:
        casts = Tensor.double, off_by_an_ulp
        kept = tuple(outputs_and_grads(reference, inputs, cast, draw) for cast in casts)
    if question:
        ANSWERS[question, draw] = kept
        if len(ANSWERS) > KEPT:
            ANSWERS.popitem(last=False)
    return kept


def asked(reference: Callable, inputs: dict[str, object]) -> Hashable | None:
    """What tells apart what a reference is asked; None where that cannot be told, or is too large to keep."""
    options: dict[str, object] = {}
    while isinstance(reference, partial) and not reference.args:
        reference, options = reference.func, reference.keywords | options
    whole = options | inputs
    tensors = [x for x in whole.values() if isinstance(x, Tensor)]
    plain = all(x is None or isinstance(x, Tensor | bool | int | float | str) for x in whole.values())
    within = "<" in getattr(reference, "__qualname__", "<")  # a function: what it holds may change
    if within or not plain or sum(x.numel() * x.element_size() for x in tensors) > LARGEST:
        return None
    said = [torch.get_float32_matmul_precision()]
    for name, x in whole.items():
        of = (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x
        said.append((name, of))
    digest = hashlib.sha256(repr(said).encode())
    for x in tensors:
        whole = x.detach().cpu().contiguous().resolve_neg()
        digest.update(ctypes.string_at(whole.data_ptr(), whole.nbytes))  # without numpy, which may be missing
    return reference, digest.digest()


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
        out, cotangents = zip(*[(x, dx) for x, dx in zip(out, cotangents) if x.requires_grad])
        grads = torch.autograd.grad(out, list(leaves.values()), cotangents)
        results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
    return results


def drawn_leaf(x: object, generator: torch.Generator, cast: Callable[[Tensor], Tensor]) -> object:
    """A floating tensor times noise from 0.5 to 1.5, so that signs and zeros stay; anything else as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    noise = 0.5 + torch.rand(x.shape, generator=generator).to(x.dtype)
    return cast(x.detach() * noise).requires_grad_(x.requires_grad)
