"""Every test starts from the same seed, on at most two threads, and memory that nobody wrote is NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """torch.empty gives NaN: what a backend leaves unwritten shows in its result."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


torch.set_num_threads(min(2, torch.get_num_threads()))
