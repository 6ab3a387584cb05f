"""Sources that many tests read and none writes; one thread for all of them."""

import pytest
import torch
from checkpoints import FAMILIES, neox
from decoders import DECODERS

from growth.loading import quiet


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return neox(tmp_path_factory.mktemp("neox") / "source")


@pytest.fixture(scope="session", params=FAMILIES)
def source64(request, tmp_path_factory):
    """Of every family; in float64, so that an equality can be told from a small error."""
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "source64", torch.float64)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """name -> the folder of such a checkpoint."""
    made = {}

    def make(name):
        if name not in made:
            with quiet():
                made[name] = DECODERS[name](tmp_path_factory.mktemp("decoder") / "src")
        return made[name]

    return make


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On busy cores two wait for each other ten times as long as matrices of this size take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return file
