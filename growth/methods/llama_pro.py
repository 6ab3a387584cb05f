"""LLaMA-Pro: added blocks that change nothing at first, and train alone.  Wu et al., ACL 2024 (2401.02415).

    layers in N groups of L / N;  after each the last layer of it again, whose output projections are zero:

        x + f(x), f a copy with zero in what writes the stream: the identity

The paper trains the added blocks alone, all that was there before held still: growth.json asks for that, and
`growth train --freeze transferred` does it, with `--unfreeze plateau` for as long as that helps. What is zero
is what writes the stream, not the gains of norms before it, under which nothing would get a gradient.

Preserves the function, by LEMON's rules where the width grows too (methods.lemon). The paper asks for L that
N divides; where it does not, groups differ by one layer.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from growth.architecture import Architecture
from growth.errors import refuse
from growth.maps import Maps
from growth.methods.identities import all_but_added
from growth.methods.lemon import Lemon
from growth.methods.option import option
from growth.methods.ordered import Index, layer_numbers, refuse_absent


@dataclass(frozen=True)
class LlamaPro(Lemon):
    """Layers that do nothing at first, to be trained alone.  Wu et al., ACL 2024.

    insert: the old layers after which a copy is put, such as (1, 3), or "1,3"; a layer named twice gets two.
    """

    insert: Index | None = option(None, "the old layers after which one is put, such as 1,3", str)

    name: ClassVar[str] = "llama-pro"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "insert", layer_numbers("insert", self.insert))
        if None not in (self.insert, self.order):
            raise refuse("insert", "none beside an order, which says it all", "both", "leave one out")

    def depth(self, wanted: int | None, old: int) -> int | None:
        """As many as the positions or the order ask for."""
        if self.insert is None:
            return super().depth(wanted, old)
        refuse_absent("insert", self.insert, old)
        return old + len(self.insert) if wanted is None else wanted

    def arranged(self, old: int, new: int) -> Index:
        """Every layer, and those of `insert`, or by default the last of each group, once more."""
        ends = self.insert
        if ends is None:
            groups = new - old
            ends = tuple(-(-(i + 1) * old // groups) - 1 for i in range(groups))
        elif old + len(ends) != new:
            got = f"{len(ends)}, {','.join(map(str, ends))}"
            raise refuse("insert", f"a position for each of {new - old} layers", got, "leave num-layers out")
        return tuple(j for j in range(old) for _ in range(1 + ends.count(j)))

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`; the layers that were there are to be held still."""
        return replace(super().maps(old, new, seed), still=all_but_added(old, new, self.layers))
