"""Every test starts from the same seed, on at most two threads, and memory that nobody wrote is NaN.

Without a GPU, Triton's kernels run in its interpreter. It is asked for before torch imports Triton.
"""

import os
from pathlib import Path

if not [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from lcikernels import extension


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


@pytest.fixture(params=["base", "avx2", "avx512"])
def instruction_set(request):
    """Each build of the compiled kernels that this machine can run."""
    if extension.WHY_NOT:
        pytest.skip(extension.WHY_NOT)
    best = torch.ops.lcikernels_cpp.instruction_set()
    try:
        torch.ops.lcikernels_cpp.use_instruction_set(request.param)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
    yield request.param
    torch.ops.lcikernels_cpp.use_instruction_set(best)


torch.set_num_threads(min(2, torch.get_num_threads()))
