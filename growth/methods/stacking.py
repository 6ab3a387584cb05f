"""StackBERT: the layers again on top of themselves.  Gong et al., ICML 2019.

    W_new[i] = W[i mod L]

It does not preserve the function. Where width grows too, it grows by Net2Net's copies (which is bert2BERT's
FPI, Chen et al., ACL 2022).
"""

from dataclasses import dataclass
from typing import ClassVar

from growth.architecture import Architecture
from growth.depth import stacked
from growth.maps import Maps
from growth.methods.copying import Copying, per_layer, widened
from growth.methods.identities import rearranged


@dataclass(frozen=True)
class StackBert(Copying):
    """The layers again on top of themselves, 0 1 2 0 1 2.  Gong et al., ICML 2019."""

    name: ClassVar[str] = "stack"

    def arranged(self, old: int, new: int) -> tuple[int, ...]:
        """The layers again, from the lowest on."""
        return stacked(old, new)

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`."""
        wires = per_layer(new, widened(old, new, self.noise, self.parting))
        return Maps(wires, rearranged(old, new, self.layers))
