"""StackBERT and interpolation: a deeper model from copies of the layers.

    stack        W_new[i] = W[i mod L]            Gong et al., ICML 2019
    interpolate  W_new[i] = W[floor(i L / L_new)]  Chang et al., ICLR 2018; Dong et al., ICML 2020

Neither preserves the function. Where width grows too, it grows by Net2Net's copies (stack with them is
bert2BERT's FPI, Chen et al., ACL 2022).
"""

from growth.depth import interpolated, rearranged, stacked
from growth.maps import Maps
from growth.operators.net2net import widened
from growth.spaces import Architecture


def stack(old: Architecture, new: Architecture, *, noise: float = 0.1) -> Maps:
    """The whole model again on top of itself."""
    return _rearranged(old, new, stacked(old.layers, new.layers), noise)


def interpolate(old: Architecture, new: Architecture, *, noise: float = 0.1) -> Maps:
    """Every layer next to its copies."""
    return _rearranged(old, new, interpolated(old.layers, new.layers), noise)


def _rearranged(old: Architecture, new: Architecture, order: list[int], noise: float) -> Maps:
    depth = rearranged(order, old.layers)
    return Maps(widened(old, new, noise), {weight.name: depth for weight in old.weights if weight.layered})
