"""LEMON: lossless growth of transformers.  Wang et al., ICLR 2024 (2310.07999).

With k = T // S whole copies and a remainder of T - k S units, s = k S / T:

    residual stream  [x; ..; x; mean(x)] where a LayerNorm reads it: its mean stays, its variance becomes
                     s var(x);  [x; ..; x; 0] where an RMSNorm does: its mean square becomes s times itself
    norm             gain sqrt(s) [g; ..; g; mean(g)], bias [b; ..; b; 0], eps s eps: it gives [y; ..; y; 0]
    readers          k column blocks that sum to W; the columns of the remainder are free
    heads, neurons   copied round-robin, heads whole and inside their groups; their readers' columns sum to W
                     per original
    tied head        the last norm's gain and bias, divided by k
    norms that share eps with the stream's but whose own wire did not grow like it, such as those of queries
                     and keys: what they read is multiplied by sqrt(s), which an eps of s eps cancels
    added layers     a copy of the layer below that adds nothing to the stream

Preserves the function exactly for any T >= S, where no norm that takes the mean away writes the stream
itself, as BERT's do: the stream then holds no means of its channels, and T has to be k S. Copies would stay
equal for ever if their readers did (Adam does not see a difference of scale), so readers tell them apart by
what is invisible at the start, R being a fresh initialisation of the wide matrix:

    projection  each reader column gets noise times R minus the mean of R over the copies of its unit
    comp        the first copy's is W minus noise times the R of all others, each other's is noise times R
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

from growth.architecture import Architecture, Attention
from growth.maps import Copies, Maps, copies, evenly
from growth.methods.copying import Copying, evened, indices, needs_mean, per_layer, tied_factors
from growth.methods.identities import identities
from growth.methods.option import option


@dataclass(frozen=True)
class Lemon(Copying):
    """Lossless: copies, with norms, readers and added layers made to fit.  Wang et al., ICLR 2024."""

    noise: float | None = option(
        None, "how far copies differ, in units of a fresh matrix", usual="1.0 or with comp 0.1"
    )

    name: ClassVar[str] = "lemon"
    lossless: ClassVar[bool] = True

    def __post_init__(self):
        if self.noise is None:
            object.__setattr__(self, "noise", 0.1 if self.symmetry == "comp" else 1.0)
        super().__post_init__()

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`."""
        index, means = evened(old, indices(old, new)), needs_mean(old)
        maps = {
            name: copies(
                of, old.wires[name], "mean" if name in means else "zero", 1.0, self.noise, self.parting
            )
            for name, of in index.items()
        }
        for wire, factor in tied_factors(old, new).items():
            maps[wire] = replace(maps[wire], scale=shared_out(maps[wire], factor))
        eps = {}
        for norm in old.norms:
            if not scalable(old, norm.reads):
                eps.setdefault(norm.eps, _spread(maps.get(norm.reads)))
        for norm in old.norms:
            own = _spread(maps.get(norm.reads)) if norm.per == "wire" else 1.0
            if norm.gain in maps:
                writes = maps[norm.writes].scale
                maps[norm.gain] = replace(maps[norm.gain], scale=times(writes, math.sqrt(own)), rest="mean")
            shift = math.sqrt(eps.get(norm.eps, 1.0) / own)
            if scalable(old, norm.reads) and not math.isclose(shift, 1.0):
                for wire in written_for(old, norm.reads):
                    maps[wire] = replace(maps.get(wire) or _same(old, wire), scale=shift)
        for op in old.all_ops:
            if isinstance(op, Attention) and _own_heads(old, maps, op):
                maps[op.mixed] = replace(maps[op.mixed], noise=0.0)
        depth, constants = identities(old, new, self.layers)
        eps = {field: factor for field, factor in eps.items() if factor != 1.0}
        return Maps(per_layer(new, maps), depth, constants, eps)


def shared_out(of: Copies, factor: float) -> float | tuple[float, ...]:
    """The scale at which all copies of a unit together count 1 / factor; one number where one is enough."""
    share = evenly(of.index)
    shares = {x for x in share if x}
    return shares.pop() / factor if len(shares) == 1 else tuple(x / factor for x in share)


def times(scale: float | tuple[float, ...], factor: float) -> float | tuple[float, ...]:
    return tuple(x * factor for x in scale) if isinstance(scale, tuple) else scale * factor


def _same(old: Architecture, wire: str) -> Copies:
    return copies(tuple(range(old.wires[wire].units)), old.wires[wire])


def _spread(of: Copies | None) -> float:
    """s: the variance, or the mean square, of what this map writes, over that of what it is given; 1 where
    units are copied unlike often, for it depends on the input there."""
    if of is None:
        return 1.0
    count = Counter(i for i in of.index if i >= 0)
    return sum(count.values()) / len(of.index) if len(set(count.values())) == 1 else 1.0


def scalable(old: Architecture, wire: str) -> bool:
    """May all that is written there be multiplied by a number, with a norm as its only reader?"""
    return "{}" in wire and all(norm.writes != wire for norm in old.norms)


def written_for(old: Architecture, wire: str) -> list[str]:
    """The wire, and the values where attention mixes them into it: linear in them, whatever the scores."""
    values = [op.value for op in old.all_ops if isinstance(op, Attention) and op.mixed == wire]
    return [wire, *values]


def _own_heads(old: Architecture, maps: dict[str, Copies], op: Attention) -> bool:
    """Are there query heads of their own whose values are not? They mix what nobody may read."""
    if op.mixed not in maps:
        return False
    heads = maps[op.mixed].index
    values = maps[op.value].index if op.value in maps else (0,) * old.wires[op.value].units
    return any(i < 0 <= values[t * len(values) // len(heads)] for t, i in enumerate(heads))
