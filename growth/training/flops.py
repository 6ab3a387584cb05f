"""What a training step computes, counted on the real forward and backward of a real batch."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Batch = dict[str, Tensor]


def count_flops(model: nn.Module, batch: Batch, frozen: Collection[str] = ()) -> int:
    """Operations of the matrix products in one forward and one backward of `model(**batch).loss`.

    A multiply-add is two operations. Elementwise work and the optimizer are not counted; attention counts as
    if it were not causal, whichever kernel computes it. The gradients of parameters named `frozen` are
    neither computed nor counted. Gradients are cleared; all else stays as it was.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    needed = {name: parameters[name].requires_grad for name in frozen}
    for name in frozen:
        parameters[name].requires_grad_(False)
    with torch.random.fork_rng(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    for name, value in needed.items():
        parameters[name].requires_grad_(value)
    return counter.get_total_flops()


def _attention(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _attention_backward(grad_shape, query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs):
    return sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)


def _grouped(left, right, *args, out_shape=None, **kwargs):
    """Of matrices [rows, inner] and [inner, columns], shared out among the groups, or of a pair for each."""
    pairs = left[0] if len(left) == len(right) == 3 else 1
    return 2 * pairs * left[-2] * left[-1] * right[-1]


# torch counts its GPU attention kernels but not the CPU one.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
# Nor the products of all experts at once.
COUNTED = CPU_ATTENTION | {torch.ops.aten._grouped_mm: _grouped}
