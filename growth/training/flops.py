"""What a training step computes, counted on the real forward and backward of a real batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepFlops:
    """Operations of a step: `total`, and of these those in each of some modules, by name and kind of product:
    "forward aten.mm", "backward aten.bmm". No module lies in another."""

    total: int
    modules: Mapping[str, Mapping[str, int]]

    def times(self, n: int) -> "StepFlops":
        """Of a step of n such batches."""
        modules = {name: {kind: n * x for kind, x in kinds.items()} for name, kinds in self.modules.items()}
        return StepFlops(n * self.total, modules)

    def shared(self, names: Collection[str], share: Callable[[str], float]) -> "StepFlops":
        """Of a step in which these modules compute that share of each kind of product."""
        changed = {
            name: {kind: round(n * share(kind)) for kind, n in self.modules.get(name, {}).items()}
            for name in names
        }
        saved = sum(sum(self.modules.get(name, {}).values()) - sum(x.values()) for name, x in changed.items())
        return StepFlops(self.total - saved, {**self.modules, **changed})

    def without(self, names: Collection[str]) -> "StepFlops":
        """Of a step that leaves these modules out."""
        return self.shared(names, lambda kind: 0.0)

    def without_backward(self, names: Collection[str]) -> "StepFlops":
        return self.shared(names, lambda kind: float(kind.startswith("forward")))

    def on_tokens(self, names: Collection[str], share: float) -> "StepFlops":
        """Of a step in which these modules see a share of the tokens: attention's products are quadratic."""
        return self.shared(names, lambda kind: share**2 if "attention" in kind or "bmm" in kind else share)


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
    with torch.random.fork_rng(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        loss = model(**batch).loss
        forward = _by_module(counter, model, modules)
        loss.backward()
    model.zero_grad(set_to_none=True)
    for name, value in needed.items():
        parameters[name].requires_grad_(value)
    both = _by_module(counter, model, modules)
    parts = {
        name: {f"forward {kind}": n for kind, n in forward[name].items()}
        | {f"backward {kind}": n - forward[name].get(kind, 0) for kind, n in both[name].items()}
        for name in modules
    }
    return StepFlops(counter.get_total_flops(), parts)


def _by_module(
    counter: FlopCounterMode, model: nn.Module, modules: Collection[str]
) -> dict[str, dict[str, int]]:
    """What was counted so far in each module, by the kind of product."""
    counted, root = counter.get_flop_counts(), type(model).__name__
    return {name: {str(kind): n for kind, n in counted[f"{root}.{name}"].items()} for name in modules}


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
