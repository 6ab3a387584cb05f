"""Net2Net: copy units, share their readers' weights; add idle layers.  Chen et al., ICLR 2016 (1511.05641).

    new unit t copies unit t mod S;  a reader takes 1 / (number of copies) of its weight from each copy

The count includes the original (LiGO's eq. 2; its appendix forgets that). Preserves the function where the
width grows by a whole factor. Otherwise some channels of the residual stream stand twice and others once,
which shifts the norms' mean and variance: close, not equal (bert2BERT accepts this; LEMON does not). Added
layers write zero to the residual stream, the residual network's form of Net2Net's identity layer.
"""

from dataclasses import replace

from growth.maps import Map, Maps, copies, per_layer, unchanged
from growth.operators.lemon import identities
from growth.spaces import Architecture


def net2net(old: Architecture, new: Architecture, *, noise: float = 0.1) -> Maps:
    """The maps from `old` to `new`. noise: how far copies differ, in units of a fresh matrix."""
    depth, constants = identities(old, new)
    return Maps(widened(old, new, noise), depth, constants=constants)


def widened(old: Architecture, new: Architecture, noise: float) -> dict[str, Map]:
    """Net2Net's map of every space; a tied head reads every copy, so the last norm is divided instead."""
    stream = copies(old.spaces["residual"], new.spaces["residual"], noise=noise)
    final = replace(stream, scale=stream.share) if old.tied else stream
    spaces: dict[str, Map] = {
        "residual": stream,
        "gain": stream,
        "normed": stream,
        "final_gain": final,
        "final": final,
    }
    if "transform" in old.spaces:
        spaces["transform"] = stream
    return spaces | unchanged(old) | per_layer(old, new, lambda a, b: copies(a, b, noise=noise))
