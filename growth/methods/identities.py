"""Added layers that change nothing at first."""

from collections.abc import Callable

from growth.architecture import Architecture
from growth.depth import added, ends, firsts, originals, rows
from growth.maps import Row


def identities(
    old: Architecture, new: Architecture, layers: Callable[[int, int], tuple[int, ...]]
) -> tuple[dict[str, tuple[Row, ...]], dict[str, tuple[float, ...]]]:
    """Depth and constants: a layer that stands again in the order keeps its inside and writes nothing.

    Where norms stand after the sum, a norm of a norm is the norm but for O(eps): from the last norm of the
    layer below added ones on, all have gain 1 and bias 0, and the very last has what that one had.
    """
    depth, constants = {}, {}
    for prefix, stack in old.stacks.items():
        inside = layers(stack.layers, new.stacks[prefix].layers)
        active, last = firsts(inside), ends(inside)
        for kind, ops in stack.blocks.items():
            after = stack.after_sum(kind)
            for op in ops:
                order = inside
                if op in after:
                    order = last if op is after[-1] else active
                elif stack.adds(op):
                    order = active
                for weight in op.weights():
                    depth[weight.name] = rows(order)
                    if op in after and weight.name.endswith(".weight"):
                        constants[weight.name] = tuple(0.0 if row else 1.0 for row in rows(order))
    return depth, constants


def rearranged(
    old: Architecture, new: Architecture, order: Callable[[int, int], tuple[int, ...]]
) -> dict[str, tuple[Row, ...]]:
    """Depth of layers that are whole copies of others."""
    orders = {prefix: order(stack.layers, new.stacks[prefix].layers) for prefix, stack in old.stacks.items()}
    return {name: rows(orders[old.stack_of(name)[0]]) for name in old.layered}


def all_but_added(
    old: Architecture, new: Architecture, layers: Callable[[int, int], tuple[int, ...]]
) -> frozenset[int] | None:
    """Maps.still of a method whose added layers are to train alone first; None where there are none."""
    orders = [layers(stack.layers, new.stacks[prefix].layers) for prefix, stack in old.stacks.items()]
    return next((originals(order) for order in orders if added(order)), None)
