"""Growing a stack of weights: mixed over layers, widened on both sides."""

from .op import kronecker_expand

__all__ = ["kronecker_expand"]
