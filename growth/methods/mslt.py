"""MSLT: grow at the top, stage by stage, and train what is new.  Yang et al. 2020 (2011.13635).

    stage          W_new[i] = W[i] for i < L,  W[i - k] for the k layers that are added
    its training   the k added layers alone, all that was there before held still
    at the end     every weight

Each stage's added layers are copies of the top ones. Growing once is one stage; growth.json asks training to
hold the rest still, so that the whole is a chain of calls, or a recipe (growth.recipes):

    growth grow  SRC A --method mslt --num-layers 6   growth train A --out B --freeze transferred ...
    growth grow  B C   --method mslt --num-layers 9   growth train C --out D --freeze transferred ...
    growth train D --out DST ...                      every weight

It does not preserve the function. A stage adds at most as many layers as there are.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from growth.architecture import Architecture
from growth.errors import refuse
from growth.maps import Maps
from growth.methods.identities import all_but_added
from growth.methods.ordered import Index
from growth.methods.stacking import StackBert


@dataclass(frozen=True)
class Mslt(StackBert):
    """Copies of the top layers on top, 0 1 2 1 2, to be trained alone first.  Yang et al. 2020."""

    name: ClassVar[str] = "mslt"

    def arranged(self, old: int, new: int) -> Index:
        """All layers, and the top ones again. Raises Refusal where that takes more than one stage."""
        if new > 2 * old:
            remedy = f"grow to {2 * old}, train, and grow again"
            raise refuse("num-layers", f"at most {2 * old}, for a stage copies each layer once", new, remedy)
        return (*range(old), *range(2 * old - new, old))

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`; the layers that were there are to be held still."""
        return replace(super().maps(old, new, seed), still=all_but_added(old, new, self.layers))
