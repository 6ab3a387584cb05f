"""Depth up-scaling: two copies of the model, overlapping.  SOLAR 10.7B, Kim et al., NAACL 2024 (2312.15166).

    layers 0 .. L - m - 1, then m .. L - 1:    T = 2 (L - m)

The first copy leaves its last m layers out, the second its first m, so that what meets at the seam is nearer
than the top of a model and the bottom of another: 32 layers with m = 8 give 48. m follows from the number of
layers that is asked for. It does not preserve the function: the paper trains on.
"""

from dataclasses import dataclass
from typing import ClassVar

from growth.errors import refuse
from growth.methods.ordered import Index
from growth.methods.stacking import StackBert


@dataclass(frozen=True)
class Solar(StackBert):
    """Two copies of the model that overlap, 0 1 2 3 2 3 4 5.  SOLAR, Kim et al., NAACL 2024."""

    name: ClassVar[str] = "solar"

    def arranged(self, old: int, new: int) -> Index:
        """The lower layers, then the upper ones. Raises Refusal where no m gives so many."""
        if new == old:
            return tuple(range(old))
        if new % 2 or new > 2 * old:
            least = old + 1 + (old + 1) % 2
            expected = f"an even number from {least} to {2 * old}, twice what each copy keeps"
            raise refuse("num-layers", expected, new, f"choose {min(new + 1, 2 * old)}, or method stack")
        kept = new // 2
        return (*range(kept), *range(old - kept, old))
