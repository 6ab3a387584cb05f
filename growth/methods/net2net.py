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
from growth.maps import Maps
from growth.methods.copying import Copying, per_layer, widened
from growth.methods.identities import identities


@dataclass(frozen=True)
class Net2Net(Copying):
    """Copies of units, and added layers that do nothing at first.  Chen et al., ICLR 2016."""

    name: ClassVar[str] = "net2net"

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`."""
        depth, constants = identities(old, new, self.layers)
        return Maps(per_layer(new, widened(old, new, self.noise, self.parting)), depth, constants)
