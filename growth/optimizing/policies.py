"""What becomes of an optimizer's state (optimizing.carried), and which units and layers are new."""

from pathlib import Path
from typing import Any, Literal, get_args

from growth.errors import refuse
from growth.families.table import Model
from growth.maps import Copies, Maps, Row

Policy = Literal["copy-scaled", "asymmetric-reset", "reset"]


def refuse_odd_policy(policy: str, optimizer: str | Path | None) -> None:
    if policy not in get_args(Policy):
        raise refuse("policy", f"one of {', '.join(get_args(Policy))}", policy, "choose one of these")
    if optimizer is None and policy != "copy-scaled":
        raise refuse(
            "policy", "none without an optimizer's state", policy, "pass --optimizer, or leave it out"
        )


def told_new(old: Model, new: Model, maps: Maps) -> dict[str, Any]:
    """growth.json's `new`: the units of wider wires and the layers that are no first copy of an old one.

    wires: of each, [first, how many] of every stretch; one entry with {} for layers that are alike. layers:
    of each stack, by the prefix of its names.
    """
    wires: dict[str, list[list[int]]] = {}
    before = old.architecture.wires
    for name, wire in new.architecture.wires.items():
        stack = new.architecture.stack_of(name)[1] if "{}" in name else None
        found = [
            _stretches(maps.of(name, i), before[name].units if name in before else wire.units, wire.units)
            for i in (range(stack.layers) if stack else [None])
        ]
        if all(x == found[0] for x in found):
            found, names = found[:1], [name]
        else:
            names = [name.format(i) for i in range(len(found))]
        wires |= {x: of for x, of in zip(names, found, strict=True) if of}
    layers = {}
    for prefix, stack in new.architecture.stacks.items():
        of_sum = {w.name for kind in stack.blocks for op in stack.after_sum(kind) for w in op.weights()}
        own = (name for name in maps.depth if new.architecture.stack_of(name)[0] == prefix)
        rows = [maps.depth[name] for name in own if name not in of_sum]
        first = _first_layers(rows, stack.layers)
        layers[prefix] = [i for i in range(stack.layers) if i not in first]
    return {"wires": wires, "layers": layers}


def _stretches(of: Any, old: int, new: int) -> list[list[int]]:
    if of is None:
        return []
    index = of.index if isinstance(of, Copies) else tuple(range(old)) + (-1,) * (new - old)
    seen: set[int] = set()
    stretches: list[list[int]] = []
    for t, s in enumerate(index):
        if s >= 0 and s not in seen:
            seen.add(s)
        elif stretches and sum(stretches[-1]) == t:
            stretches[-1][1] += 1
        else:
            stretches.append([t, 1])
    return stretches


def _first_layers(depth: list[tuple[Row, ...]], layers: int) -> set[int]:
    """The layers of the target of which every weight is one old layer's, that stands there first."""
    seen: set[int] = set()
    found = set()
    for i in range(layers):
        rows = {rows[i] for rows in depth}
        whole = [row[0][0] for row in rows if len(row) == 1 and row[0][1] == 1.0]
        if len(rows) == len(whole) == 1 and whole[0] not in seen:
            found.add(i)
            seen.add(whole[0])
    return found
