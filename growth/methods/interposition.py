"""Interpolation, or interposition: copies of a layer next to it, not on top of all.

    W_new[i] = W[floor(i L / L_new)]   Chang et al., ICLR 2018; Dong et al., ICML 2020

Orthogonal growth (ICML 2026) calls it interposition, and finds it better than stacking where the source is
converged, from about Chinchilla's compute on. Its options are those here: the first and last layers, which
differ most from their neighbours, may stand alone (`skip_first`, `skip_last`); copies may start off the
original,

    W_copy = W + N(0, (copy_noise sigma(W))^2),  of matrices,

and their output projections may be zero (`zero_outputs`): they are LLaMA-Pro's identities then, all trained.

Preserves the function with `zero_outputs`, at a width that Net2Net's copies preserve it at, never without.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from growth.architecture import Architecture
from growth.depth import interpolated, originals
from growth.errors import refuse
from growth.maps import Maps
from growth.methods.copying import Copying, per_layer, widened
from growth.methods.identities import identities, rearranged
from growth.methods.option import option, refuse_below
from growth.methods.ordered import Index


@dataclass(frozen=True)
class Interpolate(Copying):
    """Every layer next to its copies, 0 0 1 1 2 2.  Chang et al., ICLR 2018, and orthogonal growth."""

    skip_first: int = option(0, "layers at the bottom that are not copied")
    skip_last: int = option(0, "layers at the top that are not copied")
    copy_noise: float = option(0.0, "of copied layers' matrices, in their standard deviations")
    zero_outputs: bool = option(False, "copied layers add nothing at first")

    name: ClassVar[str] = "interpolate"

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("skip_first", 0), ("skip_last", 0), ("copy_noise", 0.0)):
            refuse_below(name.replace("_", "-"), getattr(self, name), least)

    def arranged(self, old: int, new: int) -> Index:
        """Every layer that is copied as often as the others, or once more."""
        first, beyond = self.skip_first, old - self.skip_last
        if first >= beyond and new > old:
            got = f"{self.skip_first} and {self.skip_last}"
            raise refuse("skip-first, skip-last", f"fewer than the source's {old} layers", got, "skip fewer")
        if new == old:
            return tuple(range(old))
        inside = interpolated(beyond - first, new - old + beyond - first)
        return (*range(first), *(first + j for j in inside), *range(beyond, old))

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`."""
        widths = per_layer(new, widened(old, new, self.noise, self.parting))
        if self.zero_outputs:
            made = Maps(widths, *identities(old, new, self.layers))
        else:
            made = Maps(widths, rearranged(old, new, self.layers))
        return replace(made, parted=self._parted(old, new)) if self.copy_noise else made

    def _parted(self, old: Architecture, new: Architecture) -> dict[str, float]:
        """Of the matrices of every layer that is a copy, in any stack."""
        found = {}
        for prefix, stack in old.stacks.items():
            order = self.layers(stack.layers, new.stacks[prefix].layers)
            for i in set(range(len(order))) - originals(order):
                found |= {w.name.format(i): self.copy_noise for w in new.at(prefix, i) if w.reads}
        return found
