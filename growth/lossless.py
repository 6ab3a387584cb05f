"""Does a grown model compute the same function in exact arithmetic? One rule per kind of op, from maps alone.

A rule answers None, or a sentence that says what is lost. Identities are settled by random vectors, in O(T)
and with probability one.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from growth import apply, fresh
from growth.added import close, depth_lost, normal
from growth.architecture import (
    Architecture,
    Attention,
    Experts,
    Linear,
    Norm,
    Op,
    Output,
    Pointwise,
    Table,
    Tied,
    Vector,
    Wire,
)
from growth.maps import Copies, Maps, grouped
from growth.mixtures import mixed

MASKED = "masks closed, as growth train begins, it is the source; open, it has what never trained"


def lost(old: Architecture, new: Architecture, maps: Maps) -> list[str]:
    """What is lost, a sentence for each kind of loss; nothing where the function is preserved.

    A norm of a norm is the norm but for O(eps): layers are added losslessly to a model whose norms stand
    after the sum where its eps does not show in nine digits.
    """
    if maps.fresh:
        return [MASKED] if fresh.closed(old, new, maps) else []
    judged = [_rule(_Wires(old, new, maps, None), op) for op in old.ops]
    for prefix, stack in old.stacks.items():
        kinds = new.stacks[prefix].kinds
        alike = {(kind, maps.at(layer)): layer for layer, kind in enumerate(kinds)}  # judged once
        for (kind, _), layer in alike.items():
            judged += [_rule(_Wires(old, new, maps, layer), op) for op in stack.blocks.get(kind, ())]
            ops = stack.blocks.get(kind) or stack.blocks[stack.kinds[layer]]
            judged += mixed(old, new.stacks[prefix], maps, ops, layer)
        judged.append(depth_lost(old, maps, prefix, stack))
        own = ((weight, i) for i, kind in enumerate(kinds) for weight in stack.weights.get(kind, ()))
        if any(maps.further(weight, i) for weight, i in own):
            judged.append(f"{prefix}layers: units beyond the source's are those of the layer above")
    # As --learn has names, and as growth inspect prints them.
    return list(dict.fromkeys(why.replace("{}", "*") for why in judged if why))


class _Wires:
    """The maps of one layer's wires, and random vectors that stand for what the narrow ones carry."""

    def __init__(self, old: Architecture, new: Architecture, maps: Maps, layer: int | None):
        self.old, self.new, self.maps, self.layer = old, new, maps, layer

    def map(self, wire: str) -> Any:
        return self.maps.of(wire, self.layer)

    def write(self, wire: str, x: Tensor) -> Tensor:
        return _write(self.map(wire), x)

    def probe(self, wire: str, which: int = 0) -> Tensor:
        return _random(self.old.wires[wire].size, which)

    def same(self, *wires: str) -> bool:
        """None of them grows: nothing can be lost."""
        return all(self.map(wire) is None for wire in wires if wire)

    def units(self, wire: str, scaled: bool = False) -> tuple[int, ...] | None:
        """The unit that each wide one copies, -1 where it is zero; None where some is neither. scaled: or
        copies, all times one number."""
        of = self.map(wire)
        if scaled and isinstance(of, Copies) and not isinstance(of.scale, tuple):
            of = replace(of, scale=1.0)
        return _units(of, self.old.wires[wire])

    def scale(self, wire: str) -> float | tuple[float, ...]:
        return getattr(self.map(wire), "scale", 1.0)


def _write(of: Any, x: Tensor) -> Tensor:
    return x if of is None else apply.write(of, x)


@lru_cache(maxsize=64)
def _random(size: int, which: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(which))


def _units(of: Any, wire: Wire) -> tuple[int, ...] | None:
    if of is None:
        return tuple(range(wire.units))
    if isinstance(of, Copies):
        copies = of.scale == 1.0 and (of.rest == "zero" or -1 not in of.index)
        return of.index if copies else None
    narrow = _random(wire.size, 0)
    places = {tuple(unit): i for i, unit in enumerate(narrow.view(-1, wire.width).tolist())}
    places[(0.0,) * wire.width] = -1
    found = tuple(places.get(tuple(unit)) for unit in apply.write(of, narrow).view(-1, wire.width).tolist())
    return None if None in found else found


def linear(op: Linear, of: _Wires) -> str | None:
    """read^T write = 1 on the wire it reads."""
    reads = of.map(op.reads)
    if reads is None:
        return None
    unit, reader = of.probe(op.reads), of.probe(op.reads, 1)
    wide = apply.write(reads, unit)
    writes = of.map(op.writes)
    rows = [apply.read(reads, reader[None], writes, slice(t, t + 1)) for t in apply.rows_apart(writes)]
    if not close(torch.cat(rows) @ wide, (reader @ unit).expand(len(rows))):
        return f"{op.name}: its columns do not add up to the source's"
    hidden = apply.unseen(reads, _random(len(wide), 2).clone()) @ wide if reads.noise else unit[0] * 0
    if not close(hidden, unit[0] * 0):
        return f"{op.name}: what parts the copies is seen, for some units are no copies and not zero"
    return None


def tied(op: Tied, of: _Wires) -> str | None:
    """The table's columns are written, not read: write^T write = 1 between its wire and the one it reads."""
    before, after = of.old.table(op.table), of.new.table(op.table)
    if of.same(op.reads, before.writes):
        return None
    head = next(x for x in of.new.ops if isinstance(x, Tied))
    unit, reader = of.probe(op.reads), of.probe(op.reads, 1)
    row = of.write(before.writes, reader) * (before.scale / after.scale)
    if close(head.scale * (row @ of.write(op.reads, unit)), op.scale * (reader @ unit)):
        return None
    return f"{op.name}: the table that it shares with {op.table} reads copies more than once"


def norm(op: Norm, of: _Wires) -> str | None:
    """norm(write x) with the grown gain and eps is write norm(x)."""
    factor = of.maps.eps.get(op.eps, 1.0)
    if of.same(op.reads, op.writes, op.gain) and factor == 1.0:
        return None
    eps, wire = of.old.eps[op.eps], of.old.wires[op.reads]
    x = of.probe(op.reads)
    size = wire.width if op.per == "unit" else None
    gain = of.probe(op.gain, 1) if op.gain else torch.ones(size or wire.size, dtype=torch.float64)
    bias = of.probe(op.writes, 2) if op.bias else torch.zeros(wire.size, dtype=torch.float64)
    wide_gain = of.write(op.gain, gain) if op.gain else None
    want = of.write(op.writes, normal(op, x, gain, eps, size) + bias)
    wide = of.write(op.reads, x)
    if wide_gain is None:
        wide_gain = torch.ones(size or len(wide), dtype=torch.float64)
    got = normal(op, wide, wide_gain, eps * factor, size) + of.write(op.writes, bias)
    if got.shape == want.shape and close(got, want):
        return None
    if factor != 1.0 and of.same(op.reads, op.writes, op.gain):
        return f"{op.name}: it shares {op.eps} with norms whose eps has to change"
    S, T = len(x), len(wide)
    differ = (
        "mean and variance of {} channels are not those"
        if op.kind == "layer"
        else "mean square of {} channels is not that"
    )
    return f"{op.name}: the {differ.format(T)} of the source's {S}"


def pointwise(op: Pointwise, of: _Wires) -> str | None:
    """Its wires are copies, by one index."""
    if of.same(*op.wires):
        return None
    found = {of.units(wire) for wire in op.wires}
    if len(found) == 1 and None not in found and (op.zero or -1 not in found.pop()):
        return None
    return f"{' and '.join(op.wires)}: units are mixed before a function that is not linear"


def attention(op: Attention, of: _Wires) -> str | None:
    """All heads are copied, whole; copies of a query head read copies of the original's key and value head.

    What is mixed is linear in the values, so a factor passes through. A head of no unit gives zero where its
    keys and values are zero too, else something that no reader may be given noise for.
    """
    if of.same(op.query, op.key, op.value, op.mixed, *op.along):
        return None
    query, key, along = of.units(op.query), of.units(op.key), [of.units(wire) for wire in op.along]
    value, mixed = of.units(op.value, scaled=True), of.units(op.mixed, scaled=True)
    if None in (query, key, value, mixed):
        return f"attention: the heads of {op.query} and {op.key} are mixed, not copied"
    (Q, G), (P, H) = ((model.wires[op.query].units, model.wires[op.key].units) for model in (of.old, of.new))
    values = of.old.wires[op.value].units, of.new.wires[op.value].units
    own = values == (Q, P)  # a value for each head of query
    fits = P % H == 0 and query == mixed and all(units == query for units in along)
    fits = fits and of.scale(op.value) == of.scale(op.mixed) and set(query) >= set(range(Q))
    for t, q in enumerate(query if fits else ()):
        k, v = key[t // (P // H)], value[t if own else t // (P // H)]
        if q >= 0:
            fits = fits and k == q // (Q // G) and v == (q if own else q // (Q // G))
        else:
            fits = fits and (v < 0 or not getattr(of.map(op.mixed), "noise", 0.0))
    if not fits:
        return f"attention: {P} query heads do not divide among {H} key and value heads as {Q} do among {G}"
    in_turn = zip(query, grouped((Q, P), (G, H)), strict=True)
    if op.in_turn and any(q not in (-1, s) for q, s in in_turn):
        return f"attention: the heads of {op.query} are not in the configuration's order"
    return None


def output(op: Output, of: _Wires) -> str | None:
    """Every unit as often as every other: cosines between outputs stay."""
    wide = of.map(op.reads)
    if wide is None:
        return None
    a, b = of.probe(op.reads), of.probe(op.reads, 1)
    x, y = of.write(op.reads, a), of.write(op.reads, b)
    if close(x @ y / (x.norm() * y.norm()), a @ b / (a.norm() * b.norm())):
        return None
    return f"{op.reads}: some channels of the output stand there more often than others"


RULES: dict[type, Callable[[Any, _Wires], str | None]] = {
    Linear: linear,
    Tied: tied,
    Norm: norm,
    Pointwise: pointwise,
    Attention: attention,
    Output: output,
}


def _rule(of: _Wires, op: Op) -> str | None:
    return None if isinstance(op, Table | Vector | Experts) else RULES[type(op)](op, of)
