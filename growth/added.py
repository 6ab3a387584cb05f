"""Do added layers leave the stream as it was? A rule of growth.lossless, which has those of ops."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from growth.architecture import Architecture, Norm, Stack
from growth.maps import Maps

close = partial(torch.allclose, rtol=1e-9, atol=1e-9)


def depth_lost(old: Architecture, maps: Maps, prefix: str, stack: Stack) -> str | None:
    """Every old layer acts once and in order; the layers between them add nothing to the stream."""
    why = f"{prefix}layers: not every layer acts once and in order"
    kept = None
    for kind, ops in stack.blocks.items():
        after = stack.after_sum(kind)
        for op in (op for op in ops if stack.adds(op) and op not in after):
            for weight in op.weights():
                active = [bool(row) for row in maps.depth[weight.name]]
                if maps.constants.get(weight.name) or kept not in (None, active):
                    return why
                kept = active
    if kept is None:
        kept = [True] * len(next(iter(maps.depth.values())))
    if sum(kept) != stack.layers:
        return why
    old_layer = dict(zip([i for i, acts in enumerate(kept) if acts], range(stack.layers), strict=True))
    if any(maps.apart(w.name, i) for i, j in old_layer.items() for w in stack.weights[stack.kinds[j]]):
        return f"{prefix}layers: some that act are not those of the source, but for noise"
    for kind, ops in stack.blocks.items():
        after = stack.after_sum(kind)
        for op in (op for op in ops if op not in after):
            for weight in op.weights():
                rows = maps.depth[weight.name]
                mine = [i for i, j in old_layer.items() if stack.kinds[j] == kind]
                if weight.name in maps.constants or any(rows[i] != ((old_layer[i], 1.0),) for i in mine):
                    return why
        if after and not _after_sum_is_lossless(old, maps, after, stack.layers, torch.tensor(kept)):
            return f"{prefix}layers: the norms of added layers change the stream"
    return None


def _after_sum_is_lossless(old: Architecture, maps: Maps, norms: list[Norm], L: int, kept: Tensor) -> bool:
    """A random stream, random outputs of the kept layers: do these read what the old layers read?"""
    generator, D = torch.Generator().manual_seed(0), 64

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, D, dtype=torch.float64, generator=generator)

    start, outputs = random(), random(len(norms), L)
    narrow = {weight.name: random(L) for norm in norms for weight in norm.weights()}
    wide = {}
    for name, x in narrow.items():
        made = [sum((w * x[j] for j, w in row), torch.zeros(D, dtype=x.dtype)) for row in maps.depth[name]]
        constants = maps.constants.get(name, (0.0,) * len(made))
        wide[name] = torch.stack([row + c for row, c in zip(made, constants, strict=True)])
    added = outputs.new_zeros(len(norms), len(kept), D)
    added[:, kept] = outputs

    def stream(weights: dict[str, Tensor], outputs: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """What each block reads, [L, norms, D], and what the last layer leaves, [D]."""
        x, read = start, []
        for layer in range(outputs.shape[1]):
            for norm, output in zip(norms, outputs[:, layer], strict=True):
                read.append(x)
                own = [weights[weight.name][layer] for weight in norm.weights()]
                x = normal(norm, x + output, own[0], old.eps[norm.eps] * factor, None) + sum(own[1:])
        return torch.stack(read).unflatten(0, (-1, len(norms))), x

    want, left = stream(narrow, outputs, 1.0)
    got, also = stream(wide, added, maps.eps.get(norms[0].eps, 1.0))
    return close(got[kept], want) and close(also, left)


def normal(op: Norm, x: Tensor, gain: Tensor, eps: float, size: int | None) -> Tensor:
    """gain times x, normalised in stretches of `size` entries, or as a whole."""
    rows = x.view(-1, size or len(x))
    if op.kind == "layer":
        return F.layer_norm(rows, rows.shape[1:], gain, None, eps).flatten()
    return F.rms_norm(rows, rows.shape[1:], gain, eps).flatten()
