"""Entering an op in torch's dispatcher: schema, implementation, fake, autograd formula.

`Library.define` and not `torch.library.custom_op`: 39 against 55 us a call without gradients, 64 against 102
with, and no 1.6 s import of the compiler on the first call.
"""

from collections.abc import Callable

import torch

# An op lives as long as the Library that defined it.
LIBRARY = torch.library.Library("lcikernels", "FRAGMENT")


def define(schema: str, impl: Callable, fake: Callable) -> None:
    """Register `lcikernels::<schema>` for every device; `fake` gives the shapes without computing.

    The first argument of every op is a tensor.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, on_its_device(without_autocast(impl)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lcikernels::{name}", fake, lib=LIBRARY)


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
