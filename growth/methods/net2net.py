"""Net2Net: copy units, share their readers' weights; add idle layers.  Chen et al., ICLR 2016 (1511.05641).

    new unit t copies unit t mod S;  a reader takes 1 / (number of copies) of its weight from each copy

The count includes the original (LiGO's eq. 2; its appendix forgets that). Preserves the function where the
width grows by a whole factor. Otherwise some channels of the residual stream stand twice and others once,
which shifts the norms' mean and variance: close, not equal (bert2BERT accepts this; LEMON does not). Added
layers write zero to the residual stream, the residual network's form of Net2Net's identity layer.
"""

from dataclasses import dataclass
from typing import ClassVar

from growth.architecture import Architecture
from growth.depth import with_identities
from growth.maps import Maps
from growth.methods.copying import per_layer, widened
from growth.methods.identities import identities
from growth.methods.option import option, refuse_below


@dataclass(frozen=True)
class Net2Net:
    """Copies of units, and added layers that do nothing at first.  Chen et al., ICLR 2016."""

    noise: float = option(0.1, "how far copies differ, in units of a fresh matrix")

    name: ClassVar[str] = "net2net"
    lossless: ClassVar[bool] = False
    learned: ClassVar[bool] = False

    def __post_init__(self):
        refuse_below("noise", self.noise, 0.0)

    def order(self, old: int, new: int) -> tuple[int, ...]:
        """The old layer that each of `new` layers takes its inside from."""
        return with_identities(old, new)[0]

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`."""
        depth, constants, order = identities(old, new)
        return Maps(per_layer(new, widened(old, new, self.noise)), depth, order, constants)
