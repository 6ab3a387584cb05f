"""Staged training: depth twice, or width twice, without a change.  Shen et al., ICML 2022 (2203.06211).

    depth    0 1 2 0 1 2 (append) or 0 0 1 1 2 2 (alternate); the added layers add nothing to the stream, or
             are whole copies
    width    W' = [W 0; 0 W], vectors and embeddings twice; the last norm's gain and bias halved where the
             head is the embedding

Preserves the function by identities, and by the width, whose halves do not read each other; whole copies do
not. Halves that are alike would get the same gradients for ever but for dropout, which the paper leaves at
that: `noise` parts them by what readers do not see, as in `net2net`; 0 is the paper's. The paper zeroes the
gains of norms, under which added layers get no gradient where norms have no bias; here what writes the stream
is zero, as in `llama-pro`. When to grow, a slope of the loss tells, which is training's business.
"""

from dataclasses import dataclass
from typing import ClassVar

from growth.architecture import Architecture
from growth.depth import interpolated, stacked
from growth.errors import refuse
from growth.maps import Copies, Maps
from growth.methods.copying import per_layer, widened
from growth.methods.identities import identities, rearranged
from growth.methods.option import option, refuse_below, refuse_other
from growth.methods.ordered import Index, Ordered

PLACES = ("append", "alternate")
ADDED = ("identity", "copy")


@dataclass(frozen=True)
class Staged(Ordered):
    """Twice the layers, or twice the width in two blocks.  Staged training, Shen et al., ICML 2022."""

    noise: float = option(0.1, "how far copies differ, in units of a fresh matrix")
    place: str = option("append", "append: added layers on top; alternate: each next to its original")
    added: str = option(
        "identity", "identity: added layers add nothing at first; copy: they are whole copies"
    )

    name: ClassVar[str] = "staged"

    def __post_init__(self):
        super().__post_init__()
        refuse_below("noise", self.noise, 0.0)
        refuse_other("place", self.place, PLACES)
        refuse_other("added", self.added, ADDED)

    def arranged(self, old: int, new: int) -> Index:
        """Every layer twice. Raises Refusal where they are to be neither as many nor twice as many."""
        if new not in (old, 2 * old):
            remedy = f"choose {2 * old}, or method lemon"
            raise refuse("num-layers", f"the source's {old}, or twice as many", new, remedy)
        return stacked(old, new) if self.place == "append" else interpolated(old, new)

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`. Raises Refusal where a size is to be neither the same nor twice."""
        widths = per_layer(new, _doubled(old, new, self.noise))
        if self.added == "identity":
            return Maps(widths, *identities(old, new, self.layers))
        return Maps(widths, rearranged(old, new, self.layers))


def _doubled(old: Architecture, new: Architecture, noise: float) -> dict[str, Copies]:
    """Every wire twice, in blocks; none where none grows."""
    units = {name: (wire.units, new.wires[name].units) for name, wire in old.growing.items()}
    grows = any(after != before for before, after in units.values())
    for name, (before, after) in units.items():
        if grows and after != 2 * before:
            wire, remedy = name.removesuffix(".{}"), "double every size, or choose method lemon"
            raise refuse(f"staged: {wire}", f"{2 * before}, twice the source's {before}", after, remedy)
    return widened(old, new, noise, "blocks")
