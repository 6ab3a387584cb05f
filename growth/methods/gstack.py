"""G_stack: the whole model again and again on top of itself.  Du et al., NeurIPS 2024 (2405.15319).

    W_new[i] = W[i mod L],  i < g L

A whole number g of times, 4 in the paper, where `stack` takes any number of layers. It does not preserve the
function. When to grow, for a target of N parameters and a training budget of C operations, after d tokens of
training the small model:

    log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from growth.errors import refuse
from growth.methods.option import option, refuse_below
from growth.methods.ordered import Index
from growth.methods.stacking import StackBert

TIMES = 4  # g: of 2, 4, 8 and more the paper's best


@dataclass(frozen=True)
class GStack(StackBert):
    """The whole model on top of itself, 4 times or as often as is said.  Du et al., NeurIPS 2024."""

    times: int | None = option(None, f"models on top of each other; default: as num-layers asks, or {TIMES}")

    name: ClassVar[str] = "gstack"

    def __post_init__(self):
        super().__post_init__()
        refuse_below("times", self.times, 1)

    def depth(self, wanted: int | None, old: int) -> int | None:
        """The source's layers `times`, unless the number is said."""
        if wanted is None and self.order is None:
            return old * (self.times or TIMES)
        return super().depth(wanted, old)

    def arranged(self, old: int, new: int) -> Index:
        """The layers again, from the lowest on. Raises Refusal where the last model would be cut."""
        if new % old:
            whole = -(-new // old) * old
            remedy = f"choose {whole}, or method stack"
            raise refuse("num-layers", f"a whole multiple of the source's {old}", new, remedy)
        if self.times not in (None, new // old):
            raise refuse("num-layers", f"{self.times} times the source's {old}", new, "leave it out")
        return super().arranged(old, new)


def growth_timing(parameters: float, flops: float) -> float:
    """The tokens d after which to grow: what the small model is to be trained on before.

        log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74

    parameters: N, of the target. flops: C, the operations that training the target is to take, 6 N D for D
    tokens. 8e9 parameters and 15e12 tokens give 6.58e9, 7e9 and 2e12 give 11.11e9, as in the paper. Raises
    Refusal where either is none that the law was fitted near. Du et al. 2024, eq. 5.
    """
    for what, got in (("parameters", parameters), ("flops", flops)):
        if not 1 < got < math.inf:
            raise refuse(what, "a finite number above 1", got, "count them, such as 7e9, and 6 N D")
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)
