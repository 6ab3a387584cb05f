"""A transformers model with Mamba layers trains on this package's kernels, as long as its run lasts."""

import contextlib
from collections.abc import Callable, Iterator

from transformers import PreTrainedModel

from lcikernels.compat.transformers import patch, scans


@contextlib.contextmanager
def on_kernels(network: PreTrainedModel, wanted: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, transformers' scans are computed here, if the model has some and it is `wanted`; it is said."""
    layers = scans(network) if wanted else 0
    if not layers:
        yield
        return
    told = "compute on lcikernels, with --no-kernels they do not"
    say(f"{layers} Mamba layers of {type(network).__name__} {told}")
    with patch():
        yield
