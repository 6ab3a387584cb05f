"""Entering an op in torch's dispatcher: schema, implementation, fake, autograd formula, and what it refuses.

`Library.define` and not `torch.library.custom_op`: 39 against 55 us a call without gradients, 64 against 102
with, and no 1.6 s import of the compiler on the first call.

An op has first derivatives in reverse mode, by `torch.autograd`, and no others. A kernel in front of
autograd's says so: without it torch gives 0 for a forward-mode derivative.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import has_tangent


class Library(torch.library.Library):
    """Where every kernel for autograd refuses derivatives that it does not compute, whoever registers it."""

    def impl(self, name: str, kernel: Callable, key: str = "", **options) -> None:
        super().impl(name, only_reverse_mode(name, kernel) if key == "Autograd" else kernel, key, **options)


# An op lives as long as the Library that defined it.
LIBRARY = Library("lcikernels", "FRAGMENT")


def define(schema: str, impl: Callable, fake: Callable) -> None:
    """Register `lcikernels::<schema>` for every device; `fake` gives the shapes without computing.

    The first argument of every op is a tensor.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, on_its_device(without_autocast(no_views(impl))), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lcikernels::{name}", no_views(fake), lib=LIBRARY)


def no_views(impl: Callable) -> Callable:
    """`impl`, none of whose results is known as a view of what it made inside: nobody could write to it."""

    def run(*arguments):
        results = impl(*arguments)
        if isinstance(results, Tensor):
            return results.data if results._is_view() else results
        return tuple(x.data if x._is_view() else x for x in results)

    return run


def without_autocast(impl: Callable) -> Callable:
    """`impl` in the dtypes it chose: autocast would turn the matrix products inside it to bfloat16."""

    def run(x, *arguments):
        device = x.device.type
        if not torch.is_autocast_enabled(device):  # 1 us; entering the context is 10
            return impl(x, *arguments)
        with torch.autocast(device, enabled=False):
            return impl(x, *arguments)

    return run


def on_its_device(impl: Callable) -> Callable:
    """`impl` where its first argument is: Triton launches on the current GPU, which may be another."""

    def run(x, *arguments):
        if not x.is_cuda:
            return impl(x, *arguments)
        with torch.cuda.device_of(x):
            return impl(x, *arguments)

    return run


def differentiate(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give `lcikernels::<name>` its formula. Gradients of outputs that nobody used arrive as None."""

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(f"lcikernels::{name}", backward, setup_context=setup, lib=LIBRARY)


def refuse_gradients(name: str) -> None:
    """Make differentiating `lcikernels::<name>` an error; without it PyTorch would record the inner steps."""

    def backward(ctx, *grads):
        raise RuntimeError(f"{name}: it has no gradient of its own; second derivatives are not supported")

    torch.library.register_autograd(f"lcikernels::{name}", backward, lib=LIBRARY)


def refuse_vmap(name: str) -> None:
    """Of an op that writes to an argument, which vmap cannot repeat; every other is called slice by slice."""

    def batched(*arguments):
        raise NotImplementedError(f"{name}: vmap cannot map it; its first axis is a batch: call it once")

    LIBRARY.impl(name, batched, "FuncTorchBatched")


def only_reverse_mode(name: str, kernel: Callable) -> Callable:
    """`kernel`, or a refusal where forward mode or torch.func asks for a derivative."""

    def run(keys, *arguments):
        if forward_ad._current_level >= 0 and any(map(has_tangent, arguments)):
            why = "it has no forward-mode derivative; torch.autograd.grad and backward() are reverse mode"
            raise NotImplementedError(f"{name}: {why}")
        if torch._C._are_functorch_transforms_active() and torch._C._any_requires_grad(*arguments):
            why = "torch.func does not differentiate it; torch.autograd.grad and backward() do"
            raise NotImplementedError(f"{name}: {why}")
        return kernel(keys, *arguments)

    return run
