"""Two and three processes that have a sequence in parts give what one gives for all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import multiplied
from ranks import DRAWS, RANKS, cases
from tolerance import Errors, off_by_an_ulp, outputs_and_grads

from lcikernels.ops.causal_conv1d.reference import causal_conv1d
from lcikernels.ops.retention import reference as retention_reference
from lcikernels.ops.selective_scan.reference import selective_scan

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")

CASES = cases()


def retention(log_decay, **others):
    log_decay = others["q"].new_zeros(1) if log_decay is None else log_decay
    return retention_reference.retention(log_decay=log_decay, **others)


REFERENCES = {"retention": retention, "scan": selective_scan, "convolution": causal_conv1d}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes left what they had to say."""
    folder = tmp_path_factory.mktemp("ranks")
    tests = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error::FutureWarning", tests / "ranks.py", str(rank), folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(said)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_outputs_states_and_all_gradients_are_those_of_one_process(name, folder):
    case, answers = CASES[name], torch.load(folder / "results0.pt")[name]
    reference = case.by_parts(next(REFERENCES[op] for op in REFERENCES if name.startswith(op)))
    worst: dict[str, Errors] = {}
    for draw in range(DRAWS):
        truth = outputs_and_grads(reference, case.inputs, torch.Tensor.double, draw)
        plain = outputs_and_grads(reference, case.inputs, off_by_an_ulp, draw)
        assert answers[draw].keys() == truth.keys()
        for what, x in answers[draw].items():
            assert x.shape == truth[what].shape and x.isfinite().all(), what
            if not x.numel():  # the state of one tap
                continue
            products = multiplied(torch.bfloat16) if name == "retention, bfloat16" else None
            errors = Errors.of(x, truth[what], plain[what], products)
            worst[what] = errors.with_draw(worst.get(what, errors))
    for what, errors in worst.items():
        if x.dtype == torch.float64:
            assert errors.error <= 1e-13 * errors.largest, what
        assert errors.agree, f"{what}: {errors}"


def test_a_state_that_does_not_enter_first_or_does_not_fit_is_refused(folder):
    said = [(folder / f"said{rank}").read_text().splitlines() for rank in range(RANKS)]
    alone = "initial_state must be given on the first rank alone, got one on rank 1"
    assert said[1][:3] == [f"{op}: {alone}" for op in ("retention", "selective_scan", "halo")]
    assert said[0] == [
        "retention: initial_state must be of shape (1, 2, 3, 3), got (1, 1, 3, 3)",
        "selective_scan: initial_state must be of shape (1, 2, 2), got (2, 3, 1)",
        "halo: initial_state must be of shape (1, 2, 1), got (1, 3, 3)",
        "halo: width must be at least 1, got 0",
        "entering_state: left must be of the first axes of added (1, 2, 3, 3), got (4, 2)",
    ]
