"""What a step of training makes, op by op: bytes that live, operations, the segments they fall in."""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from growth.training.flops import COUNTED

GROUPED, NUMBER = torch.ops.aten._grouped_mm, torch.ops.aten._local_scalar_dense


@dataclass
class Segment:
    """One stretch of a step, of which forward and backward are known apart.

    kept        bytes that its forward leaves for the backward
    forward     the most that its forward adds to what lived before it
    backward    the most that its backward holds besides that, its own gradients and what it kept among it
    flops       of both
    parameters  whose gradients it makes
    """

    kept: int = 0
    forward: int = 0
    backward: int = 0
    flops: int = 0
    parameters: int = 0


class Tape(TorchDispatchMode):
    """Bytes of the storages that were made inside and live, the most since `begin`, and operations of matrix
    products, as growth.training.flops counts them: without keeping what a checkpoint frees."""

    def __init__(self, held: Iterable[Tensor] = ()):
        """held: what was there before."""
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in held}
        self.live = self.most = self.flops = 0
        counted = {op: shape_wrapper(formula) for op, formula in COUNTED.items()}
        self.formulas = flop_registry | counted  # our ops are in the registry once they are imported

    def begin(self) -> int:
        """From here on `most` is anew; what lives now."""
        self.most = self.live
        return self.live

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named, op = named or {}, function._overloadpacket
        if op is NUMBER and isinstance(arguments[0], FakeTensor):
            return 1  # has none; to what is checked this says that all is well
        out = _grouped(*arguments, **named) if op is GROUPED else function(*arguments, **named)
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or x.device.type == "meta":
                continue
            if (storage := x.untyped_storage())._cdata not in self.known:
                key, size = storage._cdata, storage.nbytes()
                self.known.add(key)
                self.live += size
                weakref.finalize(storage, self._gone, key, size)
        self.most = max(self.most, self.live)
        if op in self.formulas:
            self.flops += self.formulas[op](*arguments, **named, out_val=out)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _grouped(left: Tensor, right: Tensor, offs: Tensor | None = None, bias=None, out_dtype=None) -> Tensor:
    """The shape of all experts' products, which torch tells for bfloat16 alone."""
    both = left.dim(), right.dim()
    groups = [len(offs)] if both == (2, 2) else [len(left)] if both == (3, 3) else []
    return left.new_empty(*groups, left.shape[-2], right.shape[-1], dtype=out_dtype)


class Cuts:
    """Cuts what a tape sees into segments: a stem, each of these layers as they run, a head.

    Gradients are put away when their segment is over, so that what lives is the segment's own.
    """

    def __init__(self, tape: Tape, network: nn.Module, layers: Sequence[nn.Module]):
        self.tape, self.network, self.last = tape, network, layers[-1]
        self.segments: list[Segment] = []
        self.base: list[int] = []  # what lived when each one's forward began
        self.flops, self.forwards = 0, True  # layers that are computed again are no new segments
        self.hooks: list[Any] = []
        for layer in layers:
            self.hooks.append(layer.register_forward_pre_hook(self._before))
            self.hooks.append(layer.register_forward_hook(self._behind))
        self.begin()

    def begin(self) -> None:
        """The next segment's forward begins."""
        self.end()
        self.base.append(self.tape.begin())
        self.segments.append(Segment())

    def end(self) -> None:
        """The forward of the running segment is over."""
        if self.segments:
            now = self.segments[-1]
            now.kept, now.forward = self.tape.live - self.base[-1], self.tape.most - self.base[-1]
            now.flops = self._since()

    def backward(self) -> None:
        """The backward begins."""
        self.end()
        self.forwards = False
        self.tape.begin()

    def over(self, index: int) -> None:
        """The backward of that segment is over, if it was not before."""
        now = self.segments[index]
        if now.backward:
            return
        now.backward = self.tape.most - self.base[index]
        now.flops += self._since()
        for x in self.network.parameters():
            if x.grad is not None:
                now.parameters += x.numel()
                x.grad = None
        self.tape.begin()

    def done(self) -> list[Segment]:
        """All segments, once the backward is over."""
        for index in (1, 0):
            self.over(index)
        for hook in self.hooks:
            hook.remove()
        return self.segments

    def _since(self) -> int:
        done, self.flops = self.tape.flops - self.flops, self.tape.flops
        return done

    def _before(self, layer: nn.Module, given: tuple) -> None:
        if self.forwards:
            self.begin()
            self._when_reached(given, len(self.segments) - 1)

    def _behind(self, layer: nn.Module, given: tuple, out: Any) -> None:
        if self.forwards and layer is self.last:
            self.begin()
            self._when_reached(out, len(self.segments) - 1)

    def _when_reached(self, x: Any, index: int) -> None:
        """The segment is over once the gradient of what it read, x or the first of x, is known."""
        first = x[0] if isinstance(x, tuple) and x else x
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(lambda grad: self.over(index))
