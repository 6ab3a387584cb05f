"""The feed-forward blocks of layers: by the names of their weights, and in a model that runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix

import torch
from torch import Tensor, nn

from growth.architecture import Architecture, Linear
from growth.errors import refuse
from growth.plan import Source


@dataclass(frozen=True)
class Block:
    """The feed-forward block of a layer, by the names of its weights; gate is "" where there is none."""

    layer: int
    up: str
    gate: str
    down: str


def blocks_of(model: Architecture, wires: set[str]) -> Iterator[Block]:
    """The blocks whose neurons are these wires."""
    for stack in model.stacks.values():
        for layer, kind in enumerate(stack.kinds):
            linear = [op for op in stack.blocks[kind] if isinstance(op, Linear)]
            for wire in sorted(wires & {op.reads for op in linear}):
                writers = [op.name for op in linear if op.writes == wire]
                gates = [name for name in writers if name.endswith(".gate")]
                (up,) = (name for name in writers if name not in gates)
                (down,) = (op.name for op in linear if op.reads == wire)
                yield Block(layer, f"{up}.weight", f"{gates[0]}.weight" if gates else "", f"{down}.weight")


class Live:
    """The block of that name in a model in memory."""

    def __init__(self, model: nn.Module, source: Source, names: Block):
        paths = source.model.modules(name for name, _ in model.named_parameters(remove_duplicate=False))
        at = {
            name: paths[source.place[name, names.layer][0]]
            for name in filter(None, (names.gate, names.up, names.down))
        }
        self.model, self.names, self.at = model, names, at
        self.up, self.down = (model.get_submodule(at[name]) for name in (names.up, names.down))
        self.D, self.F = (
            source.model.architecture.wires[source.model.architecture.layered[name].wires[-1]].size
            for name in (names.up, names.down)
        )

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Filled, as the model runs: what the block reads, and what takes the gradient of what it writes."""
        seen: list[Tensor] = []

        def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.insert(0, inputs[0].detach())

        def written(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen.append(torch.zeros_like(output, requires_grad=True))
            return output + seen[-1]

        hooks = self.up.register_forward_pre_hook(read), self.down.register_forward_hook(written)
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def given(self, before: dict[str, Tensor], seen: list[Tensor]) -> Iterator[None]:
        """The block's modules give these numbers, whatever they read; what down is to read is seen, and there
        the model stops."""

        def filled(parts: list[Tensor], module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return torch.cat([x.expand(*output.shape[:-1], -1) for x in parts], -1)

        def told(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])
            raise _Seen

        fused: dict[str, list[Tensor]] = {}  # gate and up may lie in one module, in this order
        for name, x in before.items():
            fused.setdefault(self.at[name], []).append(x)
        hooks = [
            self.model.get_submodule(path).register_forward_hook(partial(filled, parts))
            for path, parts in fused.items()
        ]
        hooks.append(self.down.register_forward_pre_hook(told))
        try:
            yield
        except _Seen:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def activated(self, before: Tensor) -> Tensor:
        """[N, k]: the gate's activation of each number, as the block's own module computes it."""
        paths = [path.split(".") for path in self.at.values()]
        block, parts = self.model.get_submodule(".".join(commonprefix(paths))), []
        for part in before.split(self.F, 1):
            seen: list[Tensor] = []
            gate = nn.functional.pad(part, (0, self.F - part.shape[1]))
            with self.given({self.names.gate: gate, self.names.up: torch.ones_like(gate)}, seen):
                block(part.new_zeros(len(part), self.D))
            parts.append(seen[0][:, : part.shape[1]])
        return torch.cat(parts, 1)


class _Seen(Exception):
    """Enough was computed."""


@torch.no_grad()
def refuse_shifting(model: nn.Module, block: Live, batch: dict[str, Tensor]) -> None:
    """Raises Refusal where neurons that read nothing give something: an activation that is not 0 at 0."""
    if block.names.gate:
        return
    seen: list[Tensor] = []
    with block.given({block.names.up: next(model.parameters()).new_zeros(1)}, seen):
        model(**{name: x[:1] for name, x in batch.items()})
    if (found := seen[0].flatten()[0].item()) != 0.0:
        raise refuse("gradmax", "an activation that is 0 at 0", f"{found:.3g}", "choose method lemon")
