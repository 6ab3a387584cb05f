"""Values of indices on a GPU, which are read only where someone asks for it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
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


def test_checked_ends_with_an_error_and_is_of_one_thread():
    with pytest.raises(RuntimeError, match="inside"), lcikernels.checked():
        with ThreadPoolExecutor(1) as other:
            assert not other.submit(checks.looked_at, OnAGPU).result()
        raise RuntimeError("inside")
    assert not checks.looked_at(OnAGPU)


def test_compiled_code_is_checked_where_it_is_called(monkeypatch):
    asked = []
    monkeypatch.setattr(checks, "looked_at", lambda x: asked.append(checks.CHECKED.get()))
    torch.compiler.reset()
    compiled = torch.compile(lcikernels.causal_conv1d_step, fullgraph=True, backend="eager")
    arguments = torch.ones(1, 2), torch.ones(2, 2)
    with lcikernels.checked():
        compiled(*arguments, state=torch.zeros(1, 2, 1), state_indices=torch.zeros(1, dtype=torch.int32))
    compiled(*arguments, state=torch.zeros(1, 2, 1), state_indices=torch.zeros(1, dtype=torch.int32))
    assert asked == [True, False]
