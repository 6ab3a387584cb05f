"""HyperCloning: whole copies of every unit, with noise in pairs.  Samragh et al., 2024 (arXiv 2409.12903).

    new = tile(W, n_written, n_read) / n_read        biases and norms are tiled
          + N for the first and - N for the second of two copies that are read
    10 log10(mean (W / n_read)^2 / mean N^2) = snr

Preserves the function: all sizes grow by whole factors, so norms see every channel as often as every other,
and what +N and -N give a reader cancels out. Where snr is not given copies are alike, and so are the
gradients that they get. Heads are multiplied, and those of keys and values with them; --num-kv-heads 1 keeps
a single one. A tied head stays tied: the last norm's gain and bias are divided by n instead. The paper grows
the width alone; layers that are added here write nothing to the stream.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from growth.architecture import Architecture
from growth.errors import refuse
from growth.maps import Maps
from growth.methods.copying import per_layer, widened
from growth.methods.identities import identities
from growth.methods.option import option
from growth.methods.ordered import Ordered


@dataclass(frozen=True)
class HyperCloning(Ordered):
    """Lossless: every unit again, a whole number of times.  Samragh et al., 2024."""

    snr: float | None = option(
        None, "decibels of a weight over the noise that parts its copies; default: no noise"
    )

    name: ClassVar[str] = "hypercloning"
    lossless: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.snr is not None and not -100 <= self.snr < math.inf:
            raise refuse(
                "snr", "a number of decibels, at least -100", self.snr, "such as 10, or leave it out"
            )

    def maps(self, old: Architecture, new: Architecture, seed: int = 0) -> Maps:
        """The maps from `old` to `new`. Raises Refusal where a size does not grow by a whole factor."""
        for name, wire in old.growing.items():
            if rest := new.wires[name].units % wire.units:
                got, want = new.wires[name].units, f"a whole multiple of the source's {wire.units}"
                remedy = f"choose {got - rest + wire.units}, or method lemon"
                raise refuse(f"{self.name}: {name.replace('.{}', '')}", want, got, remedy)
        noise = 0.0 if self.snr is None else 10 ** (-self.snr / 20)
        depth, constants = identities(old, new, self.layers)
        return Maps(per_layer(new, widened(old, new, noise, "pairs")), depth, constants)
