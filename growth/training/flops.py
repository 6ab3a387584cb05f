"""What a training step computes, counted on the real forward and backward of a real batch."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepFlops:
    """Operations of a step: `total`, and of these those in each of some modules, by name and kind of product.
    No module lies in another."""

    total: int
    modules: Mapping[str, Mapping[str, int]]

    def without(self, names: Collection[str]) -> "StepFlops":
        """Of a step that leaves these modules out."""
        return self.scaled({name: 0.0 for name in names})

    def times(self, n: int) -> "StepFlops":
        """Of a step of n such batches."""
        modules = {name: {kind: n * x for kind, x in kinds.items()} for name, kinds in self.modules.items()}
        return StepFlops(n * self.total, modules)

    def scaled(
        self, shares: Mapping[str, float], attention: Mapping[str, float] | None = None
    ) -> "StepFlops":
        """Of a step in which each of these modules computes a share of what it does, `attention` of what is
        quadratic in the tokens (default: the same share)."""
        changed = {
            name: {
                kind: round(n * ((attention or shares) if _quadratic(kind) else shares)[name])
                for kind, n in self.modules.get(name, {}).items()
            }
            for name in shares
        }
        saved = sum(sum(self.modules.get(name, {}).values()) - sum(x.values()) for name, x in changed.items())
        return replace(self, total=self.total - saved, modules={**self.modules, **changed})


class Saving(ABC):
    """A callback that changes what a step computes."""

    @abstractmethod
    def spent(self, flops: StepFlops) -> StepFlops:
        """Operations of the step that has begun, where they would be `flops` without this callback."""


def count_flops(model: nn.Module, batch: Batch, frozen: Collection[str] = ()) -> int:
    """Operations of the matrix products in one forward and one backward of `model(**batch).loss`.

    A multiply-add is two operations. Elementwise work and the optimizer are not counted; attention counts as
    if it were not causal, whichever kernel computes it. The gradients of parameters named `frozen` are
    neither computed nor counted. Gradients are cleared; all else stays as it was.
    """
    return step_flops(model, batch, frozen).total


def step_flops(
    model: nn.Module, batch: Batch, frozen: Collection[str] = (), modules: Collection[str] = ()
) -> StepFlops:
    """The same, with the part that each of these modules has in it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    needed = {name: parameters[name].requires_grad for name in frozen}
    for name in frozen:
        parameters[name].requires_grad_(False)
    with torch.random.fork_rng(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    for name, value in needed.items():
        parameters[name].requires_grad_(value)
    counted = counter.get_flop_counts()
    root = type(model).__name__
    parts = {name: counted.get(f"{root}.{name}", {}) for name in modules}
    named = {name: {str(kind): n for kind, n in part.items()} for name, part in parts.items()}
    return StepFlops(counter.get_total_flops(), named)


def _quadratic(kind: str) -> bool:
    """Products of activations with each other: attention's."""
    return "attention" in kind or "bmm" in kind


def _attention(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _attention_backward(grad_shape, query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs):
    return sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)


# torch counts its GPU attention kernels but not the CPU one.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
