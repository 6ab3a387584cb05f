"""What `growth inspect --redundancy` tells: how alike layers are, and the units inside them.

influence        1 - cos of what goes into a layer and what comes out of it; shrink --score redundancy drops
                 the layers with the least
next             linear CKA of what comes out of a layer and out of the next one
heads, neurons   the mean over units of the most that another one of the layer is alike: linear CKA of two
                 heads' outputs, which of two neurons is the square of their correlation
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from growth.architecture import Attention
from growth.checkpoint import Checkpoint
from growth.plan import Source
from growth.record import refuse_closed
from growth.shrinking.bonds import Bonds
from growth.shrinking.calibration import WINDOWS, Calibration, calibrated, windows_for
from growth.training.data import Data


@dataclass(frozen=True)
class Layer:
    """One layer of a stack. added: mean |y - x| / |x|; ratio: mean y^2 / mean x^2; x, y: the stream before it
    and behind. None: there is no next layer, or no such units were seen."""

    stack: str
    layer: int
    influence: float
    next: float | None
    added: float
    ratio: float
    heads: float | None
    neurons: float | None


@dataclass(frozen=True)
class Redundancy:
    """layers: a row each. drops: of each stack, the layers in the order in which shrink drops them."""

    source: str
    data: str
    layers: tuple[Layer, ...]
    drops: dict[str, list[int]]

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        """All of it, to be read."""
        table = Table(title=f"{self.source} on {self.data}")
        for name in ("layer", "influence", "CKA to next", "|y-x|/|x|", "y^2/x^2", "heads alike"):
            table.add_column(name, justify="right")
        table.add_column("neurons alike", justify="right")
        for row in self.layers:
            numbers = (row.influence, row.next, row.added, row.ratio, row.heads, row.neurons)
            table.add_row(f"{row.stack}{row.layer}", *("" if x is None else f"{x:.3f}" for x in numbers))
        return table

    def lines(self) -> Iterator[str]:
        for stack, order in self.drops.items():
            yield f"{stack}layers, the first to be dropped first: {', '.join(map(str, order))}"


def redundancy(
    src: str | Path,
    data: Data | None,
    *,
    windows: int = WINDOWS,
    sequence_length: int | None = None,
    text_field: str = "text",
    cache: str | Path | None = None,
    seed: int = 0,
) -> Redundancy:
    """Measure the checkpoint `src` on data as `growth.shrink` does, and with the same cache.

    Raises Refusal where one cannot be read, or the data do not fit the model.
    """
    source = Source(Checkpoint(src))
    refuse_closed(source.checkpoint)
    bonds = Bonds(source.model.architecture)
    examples = windows_for(source, data, windows, sequence_length, "redundancy", seed, text_field)
    found = calibrated(source, bonds, examples, True, cache)
    rows, drops = [], {}
    for prefix, measured in found.layers.items():
        for i, row in enumerate(measured):
            after = measured[i + 1]["cka"] if i + 1 < len(measured) else None
            heads, neurons = (_alike(bonds, found, prefix, i, of) for of in (True, False))
            influence = 1 - row["cosine"]
            rows.append(Layer(prefix, i, influence, after, row["added"], row["ratio"], heads, neurons))
        drops[prefix] = sorted(range(len(measured)), key=lambda i: -measured[i]["cosine"])
    return Redundancy(str(src), found.told["data"], tuple(rows), drops)


def _alike(bonds: Bonds, found: Calibration, prefix: str, layer: int, heads: bool) -> float | None:
    """Of the first wire of heads, or of neurons, that a layer's matrices read."""
    model = bonds.model
    ops = model.stacks[prefix].blocks[model.stacks[prefix].kinds[layer]]
    mixed = {bonds.of[op.mixed] for op in ops if isinstance(op, Attention)}
    for site in bonds.sites:
        own = site.layer == layer and site.readers and model.stack_of(site.op.name)[0] == prefix
        inside = own and "{}" in site.wire and (bonds.of[site.wire] in mixed) is heads
        if inside and site in found and model.wires[site.wire].units > 1:
            mean = found.mean(site)
            return most_alike(found.moments(site) - mean[:, None] * mean, model.wires[site.wire].width)
    return None


def most_alike(covariance: Tensor, width: int) -> float:
    """|C_ij|^2 / (|C_ii| |C_jj|) of units of `width` entries, Frobenius norms: the mean over i of the largest
    over j."""
    units = len(covariance) // width
    shared = covariance.square().view(units, width, units, width).sum((1, 3))
    own = shared.diagonal().sqrt().clamp(min=torch.finfo(shared.dtype).tiny)
    alike = (shared / own / own[:, None]).fill_diagonal_(0.0)
    return alike.amax(1).mean().item()
