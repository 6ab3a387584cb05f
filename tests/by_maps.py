"""What grow, shrink and transfer should write, worked out again by dense matrices in float64.

Each function compares a result with its source, in float64, weight by weight, and returns how many numbers
were compared. What starts at random is not: units of none of `fresh` maps, what is drawn, parted or learned.
"""

import json
import re

import torch
from torch import Tensor

from growth.architecture import Tied
from growth.checkpoint import Checkpoint
from growth.expand import Copy, Expand
from growth.growing import Growth
from growth.maps import Copies, numbered
from growth.plan import Plan, Source

EXPERT = r"(^expert|\.experts\.)(\d+)"
CLOSE = 1e-12


def opened(folder) -> Source:
    return Source(Checkpoint(folder))


def agree(name: str, got: Tensor, want: Tensor, eps: float = CLOSE, size: float = 0.0) -> int:
    """size: of the numbers that were added up to these."""
    apart, largest = (x.abs().max().item() if x.numel() else 0.0 for x in (got.double() - want, want))
    allowed = eps * max(largest, size)
    assert got.shape == want.shape and apart <= allowed, f"{name}: {apart} apart of {largest}"
    return want.numel()


def eps_of(row) -> float:
    """Of a tensor that was rounded once to the dtype of its row."""
    return max(CLOSE, torch.finfo(getattr(torch, row.dtype)).eps)


def grown(of: Growth, folder, plan: Plan) -> int:
    """A result of grow, against its maps."""
    made, rows = opened(folder), {row.name: row for row in plan.rows}
    count = 0
    for name, (entry, layer) in made.table.items():
        by_copies = isinstance(rows[name].recipe, Copy | Expand)  # not learned, nor drawn
        for weight in entry.weights if by_copies else ():
            if plain(of, weight, layer):
                got = made.raw(weight.name, layer).double()
                count += expanded(of, weight, layer, got, eps_of(rows[name]))
    return count


def plain(of: Growth, weight, layer) -> bool:
    """Is it made of the source's, with no noise that shows?"""
    new = of.maps.fresh and layer is not None and not of.maps.depth[weight.name][layer]
    return not (new or of.maps.apart(weight.name, layer))


def expanded(of: Growth, weight, layer, got: Tensor, eps: float) -> int:
    """One weight: got = write . (depth . old) . read^T; where noise parts copies, they are added up first."""
    maps, old = of.maps, of.source.model.architecture
    made_of = maps.source(weight.name)
    x, size = mixed(of, weight, layer) * (old.scale(made_of) / weight.scale), got.abs().max().item()
    for axis, wire in enumerate(weight.wires):
        copied = maps.of(wire, layer)
        if copied is None:
            continue
        if weight.reads and axis == len(weight.wires) - 1:
            parted = copied.noise or copied.parting == "blocks"
            share = torch.tensor(copied.share, dtype=torch.float64)
            read = per_entry(copied, one_hot(copied) * share[:, None])
            seen = per_entry(copied, one_hot(copied))
            got, x = (got @ seen, x @ (read.T @ seen)) if parted else (got, x @ read.T)
            if maps.fresh:
                got = got * taken(copied, got.shape[-1])
        else:
            further = axis == 0 and maps.further(weight, layer)
            other = mixed(of, weight, layer, further) * (old.scale(made_of) / weight.scale) if further else x
            x = written(copied, x, other, axis)
            if maps.fresh:
                keeps = taken(copied, x.shape[axis]).view(-1, *[1] * (x.ndim - 1 - axis))
                x, got = x * keeps, got * keeps
    return agree(f"{weight.name}, layer {layer}", got, x, eps, size)


def mixed(of: Growth, weight, layer, row=None) -> Tensor:
    """sum_j depth[i, j] old[j] + constant."""
    name, maps = of.maps.source(weight.name), of.maps
    if layer is None:
        return of.source.raw(name, None).double()
    row = maps.depth[weight.name][layer] if row is None else row
    some = next(j for found, j in of.source.place if found == name)
    x = torch.zeros_like(of.source.raw(name, some), dtype=torch.float64)
    for j, share in row:
        x = x + share * of.source.raw(name, j).double()
    return x + (maps.constants[weight.name][layer] if weight.name in maps.constants else 0.0)


def one_hot(of: Copies) -> Tensor:
    """[T, S] of units; a row of zeros where there is no copy."""
    out = torch.zeros(len(of.index), of.sources, dtype=torch.float64)
    for t, s in enumerate(of.index):
        if s >= 0:
            out[t, s] = 1.0
    return out


def per_entry(of: Copies, units: Tensor) -> Tensor:
    return torch.kron(units, torch.eye(of.width, dtype=torch.float64))


def taken(of: Copies, size: int) -> Tensor:
    """1 of each entry that is a copy."""
    keeps = torch.tensor([float(s >= 0) for s in of.index]).double().repeat_interleave(of.width)
    return keeps if len(keeps) == size else torch.ones(size, dtype=torch.float64)


def written(of: Copies, x: Tensor, other: Tensor, axis: int) -> Tensor:
    """Along an axis; `other`: what the second copy of a unit and all later ones are made of."""
    x, other = x.movedim(axis, 0), other.movedim(axis, 0)
    units, others = (y.reshape(of.sources, of.width, *y.shape[1:]) for y in (x, other))
    rest = x.mean(0).expand(of.width, *x.shape[1:]) if of.rest == "mean" else torch.zeros_like(units[0])
    scales = of.scale if isinstance(of.scale, tuple) else (of.scale,) * len(of.index)
    rows = [
        scale * (rest if s < 0 else others[s] if copy else units[s])
        for s, (copy, _), scale in zip(of.index, numbered(of.index), scales, strict=True)
    ]
    return torch.cat(rows).movedim(0, axis)


def shrunk(src: Source, folder, plan: Plan) -> int:
    """A result of shrink: every weight that was not fitted to data has the units that growth.json names."""
    made, rows = opened(folder), {row.name: row for row in plan.rows}
    record, count = json.loads((folder / "growth.json").read_text()), 0
    stacks = {x["stack"]: x["kept"] for x in record["layers"]}
    kept = {(wire, x["layer"]): x["kept"] for x in record["units"] for wire in x["wires"]}
    for name, (entry, layer) in made.table.items():
        for weight in entry.weights if rows[name].origin != "fitted" else ():
            j = layer if layer is None else stacks[made.model.architecture.stack_of(weight.name)[0]][layer]
            of_weight = selected(src, made, weight, j, kept)
            count += agree(name, made.raw(weight.name, layer), of_weight, eps_of(rows[name]))
    return count


def selected(src: Source, made: Source, weight, layer, kept) -> Tensor:
    old, new = src.model.architecture, made.model.architecture
    experts = kept.get(("experts.{}", layer))

    def origin(name: str) -> str:
        found = re.search(EXPERT, name)
        return re.sub(EXPERT, rf"\g<1>{experts[int(found[2])]}", name) if experts and found else name

    made_of = origin(weight.name)
    x = src.raw(made_of, layer).double() * (old.scale(made_of) / weight.scale)
    for axis, wire in enumerate(weight.wires):
        reads = weight.reads and axis == len(weight.wires) - 1
        wire = origin(wire)
        index = kept.get((wire, layer), kept.get((wire, None)))
        if index is not None:
            x = of_units(x.movedim(axis, 0), old, new, wire, index).movedim(0, axis)
        if not reads:
            x = x * for_tied(old, new, wire)
    return x


def of_units(x: Tensor, old, new, wire: str, index: list[int]) -> Tensor:
    """Those units of the first axis; the means of neighbours, where heads of keys are not enough for them."""
    units = x.reshape(old.wires[wire].units, -1, *x.shape[1:])
    for op in (op for op in old.all_ops if hasattr(op, "key") and wire in (op.key, op.value)):
        (Q, G), (P, H) = ([m.wires[of].units for of in (op.query, op.key)] for m in (old, new))
        if P // H > Q // G and wire != op.query:
            return units.unflatten(0, (H, G // H)).mean(1).flatten(0, 1)
    return units[index].flatten(0, 1)


def for_tied(old, new, wire: str) -> float:
    """What the gain in front of a tied head is multiplied by, whose own scale and whose table's follow the
    width."""
    for small, less in zip(old.ops, new.ops, strict=True):
        if not isinstance(small, Tied):
            continue
        gains = {x.gain for x in old.norms if x.writes == small.reads} - {""}
        if wire in {small.reads, *gains} and old.wires[wire] != new.wires[wire]:
            tables = [model.table(small.table).scale for model in (old, new)]
            return (small.scale / tables[0]) / (less.scale / tables[1])
    return 1.0


def transferred(src: Source, folder, plan: Plan) -> int:
    """A result of transfer in our own format: what is said to be copied is as it was."""
    made, rows, count = opened(folder), {row.name: row for row in plan.rows}, 0
    for name, (entry, layer) in made.table.items():
        for weight in entry.weights if rows[name].origin == "copied" else ():
            assert rows[name].sources == (src.where(weight.name, layer),), name
            count += agree(name, made.raw(weight.name, layer), src.raw(weight.name, layer).double())
    return count
