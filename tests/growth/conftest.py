"""Sources that many tests read and none writes."""

import pytest
import torch
from checkpoints import FAMILIES, neox


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return neox(tmp_path_factory.mktemp("neox") / "source")


@pytest.fixture(scope="session", params=FAMILIES)
def source64(request, tmp_path_factory):
    """Of every family; in float64, so that an equality can be told from a small error."""
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "source64", torch.float64)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return file
