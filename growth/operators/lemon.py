"""LEMON: lossless growth of pre-norm transformers to any size.  Wang et al., ICLR 2024 (2310.07999).

With k = T // S whole copies and a remainder of T - k S channels, s = k S / T:

    residual stream  [x; ..; x; mean(x)]: its mean stays, its variance becomes s var(x)
    norm             gain sqrt(s) [g; ..; g; mean(g)], bias [b; ..; b; 0], eps s eps: it gives [y; ..; y; 0]
    readers          k column blocks that sum to W; the columns of the remainder are free
    heads, neurons   copied round-robin, heads whole; their readers' columns sum to W per original
    tied head        the last norm's gain and bias, divided by k
    added layers     a copy of the layer below whose two outputs are zero

Preserves the function exactly for LayerNorm, any T >= S. Copies would stay equal for ever if their readers
did (Adam does not see a difference of scale), so each reader column gets R minus the mean of R over the
copies of its unit, R being a fresh initialisation of the wide matrix: invisible at the start, different from
the first step on.
"""

import math

import torch

from growth.depth import rearranged, with_identities
from growth.maps import Copies, Map, Maps, copies, keep, per_layer
from growth.spaces import Architecture


def lemon(old: Architecture, new: Architecture, *, noise: float = 1.0) -> Maps:
    """The maps from `old` to `new`. noise: how far copies differ, in units of a fresh matrix."""
    S, T = old.spaces["residual"].units, new.spaces["residual"].units
    k = T // S
    stretch = math.sqrt(k * S / T)
    index = torch.arange(T) % S
    index[k * S :] = -1
    share = torch.full((T,), 1 / k, dtype=torch.float64)
    residual = Copies(index, share, S, rest="mean")
    normed = Copies(index, share, S, noise=noise)
    gain = Copies(index, share, S, rest="mean", scale=stretch)
    tied = 1 / k if old.tied else 1.0
    spaces: dict[str, Map] = {
        "residual": residual,
        "gain": gain,
        "normed": normed,
        "vocab": keep(old.spaces["vocab"]),
        "final_gain": Copies(index, share, S, rest="mean", scale=stretch * tied),
        "final": Copies(index, share, S, scale=tied, noise=noise),
    }
    spaces |= per_layer(old, new, lambda a, b: copies(a, b, noise=noise))
    return Maps(spaces, identity_depth(old, new), norm_eps=k * S / T)


def identity_depth(old: Architecture, new: Architecture) -> dict[str, torch.Tensor]:
    """Added layers take their inside from the layer below and write nothing to the stream."""
    inside, active = with_identities(old.layers, new.layers)
    return {
        weight.name: rearranged(active if weight.spaces[0] == "residual" else inside, old.layers)
        for weight in old.weights
        if weight.layered
    }
