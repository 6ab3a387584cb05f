"""LiGO's expansion in C++ (csrc/kronecker_expand.cpp): all sums are float32 at least."""

from .cuda import backward, forward  # the library's ops, which a tensor's device picks from; tf32 is a GPU's

__all__ = ["backward", "forward"]
