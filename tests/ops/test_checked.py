"""Values of indices on a GPU, which are read only where someone asks for it."""

import torch

import lcikernels
from lcikernels.ops import checks


class OnAGPU:
    """All that `looked_at` asks of a tensor."""

    is_cuda = True


def test_values_on_a_cpu_are_always_looked_at():
    assert checks.looked_at(torch.zeros(1))


def test_values_on_a_gpu_are_looked_at_inside_of_checked_alone():
    assert not checks.looked_at(OnAGPU)
    with lcikernels.checked():
        assert checks.looked_at(OnAGPU)
        with lcikernels.checked():
            pass
        assert checks.looked_at(OnAGPU)
    assert not checks.looked_at(OnAGPU)
