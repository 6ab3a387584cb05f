"""bert2BERT: copies of units at random, or of those of the layer above.  Chen et al., ACL 2022 (2110.07143).

    g(t) = t for t < S, else any of 0 .. S - 1      one g for all wires whose units go together, heads whole
    U[l][:, j] = W[l][:, g(j)] / |{t: g(t) = g(j)}|
    fpi     new[l][i, :] = U[l][g(i), :]            function-preserving initialisation
    aki     new[l][i, :] = U[l'][g(i), :]           advanced knowledge initialisation: l' = l for i < S, else
                                                    the next layer of the same kind, l for the last one
    depth   the wide layers 0 .. L - 1 floor(L_new / L) times on each other, then the topmost ones again

Norms copy their own layer's gains. fpi preserves the function where only neurons or heads are added: g is
random, so channels of the stream stand there unlike often even at a whole factor, which shifts the norms'
mean and variance; at a whole factor net2net and hypercloning preserve it, and lemon at any width. aki and
added layers do not preserve it. Heads that are added to a group of keys and values copy heads of that group;
heads whose decays stand in the configuration are copied in turn.

The paper's two-stage training goes on from the result: sub-models of the bottom layers first, with the same
head, then all of it. `SubmodelStage` of growth.training.callbacks is the first stage.
"""

from dataclasses import dataclass
from typing import ClassVar

from growth.architecture import Architecture, Norm, Stack
from growth.depth import rows
from growth.maps import Maps
from growth.methods.copying import Copying, per_layer, widened
from growth.methods.identities import rearranged
from growth.methods.option import option, refuse_other

INITIALISATIONS = ("aki", "fpi")


@dataclass(frozen=True)
class Bert2Bert(Copying):
    """Copies of units at random, of this layer (fpi) or the next (aki).  Chen et al., ACL 2022."""

    noise: float = option(0.0, "how far copies differ, in units of a fresh matrix")
    initialisation: str = option(
        "aki", "new units are copies of the layer's own, or of the next one's: fpi | aki"
    )

    name: ClassVar[str] = "bert2bert"

    def __post_init__(self):
        super().__post_init__()
        refuse_other("initialisation", self.initialisation, INITIALISATIONS)

    def arranged(self, old: int, new: int) -> tuple[int, ...]:
        """The whole model as often as it fits, then its topmost layers."""
        return (*(tuple(range(old)) * (new // old)), *range(old - new % old, old))

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`."""
        wires = per_layer(new, widened(old, new, self.noise, self.parting, seed))
        ahead = {}
        if self.initialisation == "aki":
            for prefix, stack in old.stacks.items():
                order = self.layers(stack.layers, new.stacks[prefix].layers)
                ahead |= dict.fromkeys(_copied(stack), rows(tuple(_above(stack, j) for j in order)))
        return Maps(wires, rearranged(old, new, self.layers), ahead=ahead)


def _copied(stack: Stack) -> list[str]:
    """The weights of all but the norms."""
    ops = (op for ops in stack.blocks.values() for op in ops if not isinstance(op, Norm))
    return [weight.name for op in ops for weight in op.weights()]


def _above(stack: Stack, layer: int) -> int:
    """The next layer of the same kind; the last one of a kind is its own."""
    kinds = stack.kinds
    return next((j for j in range(layer + 1, len(kinds)) if kinds[j] == kinds[layer]), layer)
