"""bench_gpu.py at tiny sizes, in Triton's interpreter where there is no GPU: rows, checks, rivals' calls."""

import re
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
from devices import GPU

from benchmarks import bench_gpu, gpu, gpu_sides, report
from benchmarks.bench_gpu import BACKWARD, CASES, DECODING, FORWARD, TRAINING, Case
from benchmarks.gpu_sides import OPS, Side
from benchmarks.sides import scan_reference, step_reference
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as conv_reference

TINY = {"B": 2, "T": 8, "D": 3, "N": 2, "W": 4}
CHIP = gpu.Limits(copy=4e12, special=4e12, issue=3e13, clock=2e9, multiprocessors=132)
KINDS = {(case.op, case.mode, case.ours, case.rival): case for case in CASES}


def tiny(op: str, mode: str, rival: str | None, ours: str = "ours", **sizes: int) -> Case:
    axes = next(case.sizes for case in CASES if case.op == op)
    return Case(op, {name: TINY[name] for name in axes} | sizes, mode, rival, {"ms": 1e6}, ours)


@pytest.fixture(autouse=True)
def a_clock_and_a_device(monkeypatch):
    def seconds(call):
        start = perf_counter()
        call()
        return perf_counter() - start

    monkeypatch.setattr(gpu, "DEVICE", GPU)
    monkeypatch.setattr(gpu, "TURNS", 1)
    monkeypatch.setattr(gpu, "seconds", seconds)
    monkeypatch.setattr(gpu, "graph", lambda calls: lambda: [call() for call in calls])
    monkeypatch.setattr(gpu, "peak", lambda call: 100)
    monkeypatch.setattr(bench_gpu, "CHANNELS", 2)
    monkeypatch.setattr(bench_gpu, "copies", lambda inputs: 2)


@pytest.fixture
def rivals(monkeypatch):
    """Modules with the rivals' signatures that compute our references."""

    def reference(u, delta, A, B, C, D, z, bias):
        tokens = u.mT, delta.mT, A, B[:, 0].mT, C[:, 0].mT, D, z.mT, bias
        return scan_reference(*(x.float() for x in tokens)).mT.to(u.dtype)

    def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert u.shape == delta.shape == z.shape == (2, 3, 8) and B.shape == C.shape == (2, 1, 2, 8)
        assert all(x.stride(-1) == 1 for x in (u, delta, z, B, C)) and delta_softplus is True
        return [torch.ones_like(u), torch.ones(2, 3, 1, 4), reference(u, delta, A, B, C, D, z, delta_bias)]

    def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
        assert (dz, delta_softplus, recompute_out_z) == (None, True, False)
        assert x.shape == (2, 3, 1, 4) and out.shape == dout.shape == u.shape and dout.stride(-1) == 1
        inputs = [x.detach().requires_grad_() for x in (u, delta, A, B, C, D, z, delta_bias)]
        with torch.enable_grad():
            *grads, dz, dbias = torch.autograd.grad(reference(*inputs), inputs, dout)
        return [*grads, dbias, dz]

    def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
        assert dt_softplus is True and state.dtype == torch.float32
        tensors = (u.float() for u in (x, dt, A, B, C, D, z, dt_bias, state))
        return step_reference(*tensors).to(x.dtype)

    def causal_conv1d_fn(x, weight, bias, activation):
        assert x.stride(-1) == 1
        return conv_reference(x.mT.float(), weight, bias, activation=activation).mT.to(x.dtype)

    def causal_conv1d_update(x, conv_state, weight, bias, activation):
        assert conv_state.dtype == x.dtype
        options = dict(initial_state=conv_state.float(), activation=activation)
        return conv_reference(x[:, None].float(), weight, bias, **options)[:, 0].to(x.dtype)

    modules = {
        gpu_sides.SCAN: SimpleNamespace(fwd=fwd, bwd=bwd),
        gpu_sides.UPDATE: SimpleNamespace(selective_state_update=selective_state_update),
        gpu_sides.CONV: SimpleNamespace(
            causal_conv1d_fn=causal_conv1d_fn, causal_conv1d_update=causal_conv1d_update
        ),
    }
    monkeypatch.setattr(gpu_sides, "found", modules.get)
    bench_gpu.check_once.cache_clear()
    yield
    bench_gpu.check_once.cache_clear()


@pytest.mark.parametrize("op, mode, ours, rival", KINDS, ids=lambda x: f"{x}")
def test_every_kind_of_case_gives_a_row_of_the_report(op, mode, ours, rival, rivals):
    row = {"B": 1} if ours == "ours, packed" else {}
    row = bench_gpu.measured(tiny(op, mode, rival, ours, **row), CHIP)
    assert row["seconds"] > 0 and row["floor"] > 0
    assert (row["rival_seconds"] is None) == (rival is None)
    assert (row["memory"] is None) == (mode != TRAINING)
    *_, cells = report.tables([row]).splitlines()
    assert cells.startswith(f"| {mode}") and "≤ 1000000 ms |" in cells


def test_a_wrong_output_and_a_wrong_gradient_are_no_result(monkeypatch):
    right = OPS["causal_conv1d"].sides["ours in torch"].run

    def wrong_gradient(x, **inputs):
        return right(x=x, **inputs) + 0.1 * (x - x.detach())

    scaled = "output|gradient", lambda **inputs: 1.05 * right(**inputs)
    for said, run in (scaled, ("x: ", wrong_gradient)):
        for ours in (True, False):
            monkeypatch.setitem(OPS["causal_conv1d"].sides, "wrong", Side(run, ours=ours))
            with pytest.raises(AssertionError, match=said):
                bench_gpu.measured(tiny("causal_conv1d", FORWARD, None, "wrong"), CHIP)


def test_an_output_that_is_wrong_late_in_a_long_sequence_is_no_result(monkeypatch):
    """Which the small size does not show."""
    monkeypatch.setattr(bench_gpu, "SMALL", {"T": 8})
    right = OPS["causal_conv1d"].sides["ours in torch"].run

    def forgetful(x, **inputs):
        y = right(x=x, **inputs)
        return torch.cat([y[:, :30], 0 * y[:, 30:]], 1)

    monkeypatch.setitem(OPS["causal_conv1d"].sides, "wrong", Side(forgetful, ours=True))
    with pytest.raises(AssertionError, match="output: error"):
        bench_gpu.measured(tiny("causal_conv1d", BACKWARD, None, "wrong", T=40), CHIP)


def test_long_sequences_are_held_against_the_torch_backend(monkeypatch):
    monkeypatch.setattr(bench_gpu, "LONG", 4)
    sides = OPS["selective_scan"].sides
    for name in ("ours in torch", "ours, packed"):
        sizes = ("B", 1), ("T", 9), ("D", 3), ("N", 2)
        bench_gpu.check_once("selective_scan", sizes, sides[name], False)


def test_a_rival_that_is_not_there_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_sides, "RIVALS", tmp_path / ".rivals")
    side = Side(print, needs="no_such_rival.module")
    why = "no_such_rival.module is not installed .*, and .rivals/ has no sources of it"
    assert re.fullmatch(why, bench_gpu.why_not(side))


def test_a_side_that_fails_leaves_no_poison_to_what_is_timed_next():
    with pytest.raises(RuntimeError), bench_gpu.poisoned():
        raise RuntimeError
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_versions_are_those_that_would_be_imported(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_sides, "RIVALS", tmp_path)
    (tmp_path / "mamba_ssm-0.1").mkdir()
    versions = gpu_sides.versions()
    assert versions["mamba-ssm"] == "0.1" and versions["torch"] == torch.__version__


def test_floors_are_the_bytes_or_the_special_functions():
    assert CHIP.floor(8e12, 4e12) == 2 and CHIP.floor(8e12, 12e12) == 3
    B, D, W = (TINY[axis] for axis in "BDW")
    step = bench_gpu.measured(tiny("causal_conv1d_step", DECODING, None), CHIP)
    bytes = 2 * 2 * B * D + 2 * 4 * B * D * (W - 1) + 4 * D * (W + 1)
    assert step["floor"] == pytest.approx(bytes / 4e12)
    scan = bench_gpu.measured(tiny("selective_scan", FORWARD, None), CHIP._replace(copy=1e30))
    assert scan["floor"] == pytest.approx(B * TINY["T"] * D * (TINY["N"] + 4) / 4e12)
