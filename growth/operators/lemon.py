"""LEMON: lossless growth of transformers, of pre-norm ones to any size.  Wang et al., ICLR 2024 (2310.07999).

With k = T // S whole copies and a remainder of T - k S channels, s = k S / T:

    residual stream  [x; ..; x; mean(x)]: its mean stays, its variance becomes s var(x)
    norm             gain sqrt(s) [g; ..; g; mean(g)], bias [b; ..; b; 0], eps s eps: it gives [y; ..; y; 0]
    readers          k column blocks that sum to W; the columns of the remainder are free
    heads, neurons   copied round-robin, heads whole; their readers' columns sum to W per original
    tied head        the last norm's gain and bias, divided by k
    added layers     a copy of the layer below whose two outputs are zero
    post-norm        T = k S; from the last norm of the layer below added ones on, all have gain 1 and bias 0,
                     and the very last has what that one had: a norm of a norm is the norm, but for O(eps)

Preserves the function exactly for LayerNorm, any T >= S, where the norms come before the blocks. Where they
come after, a norm's own output is the stream, and that holds no means of its channels. Copies would stay
equal for ever if their readers did (Adam does not see a difference of scale), so each reader column gets R
minus the mean of R over the copies of its unit, R being a fresh initialisation of the wide matrix: invisible
at the start, different from the first step on.
"""

import math

import torch

from growth.depth import rearranged, with_identities
from growth.errors import refuse
from growth.maps import POST_NORMS, Copies, Map, Maps, copies, per_layer, unchanged
from growth.spaces import Architecture


def lemon(old: Architecture, new: Architecture, *, noise: float = 1.0) -> Maps:
    """The maps from `old` to `new`. noise: how far copies differ, in units of a fresh matrix.

    Raises Refusal where a post-norm model's width would grow by anything but a whole factor.
    """
    S, T = old.spaces["residual"].units, new.spaces["residual"].units
    k = T // S
    if old.post_norm and T % S:
        raise refuse(
            "hidden-size",
            f"a multiple of the source's {S}, for its norms come after the blocks and no norm's output holds "
            "the mean channels that lemon adds",
            T,
            f"choose {(k + 1) * S}, or method net2net, which comes close",
        )
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
        "final_gain": Copies(index, share, S, rest="mean", scale=stretch * tied),
        "final": Copies(index, share, S, scale=tied, noise=noise),
    }
    if "transform" in old.spaces:
        spaces["transform"] = residual
    spaces |= unchanged(old) | per_layer(old, new, lambda a, b: copies(a, b, noise=noise))
    depth, constants = identities(old, new)
    return Maps(spaces, depth, norm_eps=k * S / T, constants=constants)


def identities(
    old: Architecture, new: Architecture
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Depth and constants: added layers take their inside from the layer below and write nothing."""
    inside, active, last = with_identities(old.layers, new.layers)
    after_mixer, after_mlp = POST_NORMS if old.post_norm else ((), ())
    depth, constants = {}, {}
    for weight in filter(lambda weight: weight.layered, old.weights):
        name, order = weight.name, inside
        if weight.spaces[0] == "residual" or name.startswith(after_mixer):
            order = active
        elif name.startswith(after_mlp):
            order = last
        depth[name] = rearranged(order, old.layers)
        if old.post_norm and weight.spaces == ("gain",):
            constants[name] = 1 - depth[name].sum(1)
    return depth, constants
