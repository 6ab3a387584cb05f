"""Sources that many tests read and none writes."""

import pytest
import torch
from checkpoints import neox


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return neox(tmp_path_factory.mktemp("neox") / "source")


@pytest.fixture(scope="session")
def source64(tmp_path_factory):
    """In float64, so that an equality can be told from a small error."""
    return neox(tmp_path_factory.mktemp("neox") / "source64", torch.float64)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return file
