"""bench_gpu.py at tiny sizes, in Triton's interpreter where there is no GPU: rows, checks, rivals' calls."""

import re
import sys
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
from devices import GPU
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config

from benchmarks import answers, bench_gpu, ligo_step, measure, patched, report, retentions
from benchmarks import rivals as packages
from benchmarks import sides as tables
from benchmarks.answers import OPS, learned
from benchmarks.cases import BACKWARD, DECODING, FORWARD, IN_A_ROW, TRAINING, Case
from benchmarks.cases import GPU as CASES
from benchmarks.sides import OnGpu, scan_reference, step_reference
from lcikernels import backends, kronecker_expand, retention
from lcikernels.ops.causal_conv1d.reference import causal_conv1d as conv_reference
from lcikernels.ops.retention.reference import retention as retention_reference

TINY = {"B": 2, "T": 8, "D": 3, "N": 2, "W": 4, "H": 2, "K": 4, "V": 3}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
MAPS = {"L1": 2, "L2": 3, "m": 3, "n": 4, "M": 5, "N": 7}
CHIP = measure.GpuLimits(copy=4e12, special=4e12, issue=3e13, clock=2e9, multiprocessors=132, matmul=8e14)
KINDS = {(case.op, case.mode, case.ours, case.rival): case for case in CASES}


def tiny(op: str, mode: str, rival: str | None, ours: str = "ours", **sizes: int) -> Case:
    axes = next(case.sizes for case in CASES if case.op == op)
    chunks = {"T": 20} if op == "retention" else {}  # of fewer tokens its kernel makes none
    usual = MAPS if "L1" in axes else {name: TINY[name] for name in axes}
    return Case(op, usual | chunks | sizes, mode, rival, ours, {"ms": 1e6})


@pytest.fixture(autouse=True)
def a_clock_and_a_device(monkeypatch, tensor_cores):
    def seconds(call):
        start = perf_counter()
        call()
        return perf_counter() - start

    monkeypatch.setattr(measure, "DEVICE", GPU)
    monkeypatch.setattr(measure, "TURNS", 1)
    monkeypatch.setattr(measure, "gpu_seconds", seconds)
    monkeypatch.setattr(measure, "graph", lambda calls: lambda: [call() for call in calls])
    monkeypatch.setattr(measure, "peak", lambda call: (call(), 100)[1])
    monkeypatch.setattr(answers, "CHANNELS", 2)
    monkeypatch.setattr(bench_gpu, "copies", lambda inputs: 2)
    monkeypatch.setattr(bench_gpu, "CALLS", 2)
    for cached in (answers.truths, bench_gpu.check_once, bench_gpu.check_ours, bench_gpu.learning):
        cached.cache_clear()
    if GPU == "cpu":  # bfloat16, which the interpreter multiplies right as tensor_cores has it
        there = backends.Backend("lcikernels.ops.retention.kernel", backends.on_gpu)
        monkeypatch.setitem(backends.TABLES["retention"], "triton", there)
        blocked = backends.TABLES["kronecker_expand"]["torch"]
        monkeypatch.setitem(backends.TABLES["kronecker_expand"], "cuda", blocked)


@pytest.fixture
def rivals(monkeypatch):
    """Modules with the rivals' signatures that compute our references."""

    def reference(u, delta, A, B, C, D, z, bias):
        inputs = dict(x=u.mT, dt=delta.mT, a=A, b=B[:, 0].mT, c=C[:, 0].mT, d=D, z=z.mT, dt_bias=bias)
        return scan_reference(**{name: x.float() for name, x in inputs.items()}).mT.to(u.dtype)

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
        inputs = dict(x=x, dt=dt, a=A, b=B, c=C, d=D, z=z, dt_bias=dt_bias, state=state)
        return step_reference(**{name: u.float() for name, u in inputs.items()}).to(x.dtype)

    def causal_conv1d_fn(x, weight, bias, activation):
        assert x.stride(-1) == 1
        return conv_reference(x.mT.float(), weight, bias, activation=activation).mT.to(x.dtype)

    def causal_conv1d_update(x, conv_state, weight, bias, activation):
        assert conv_state.dtype == x.dtype
        options = dict(initial_state=conv_state.float(), activation=activation)
        return conv_reference(x[:, None].float(), weight, bias, **options)[:, 0].to(x.dtype)

    def chunk_retention(q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
        assert all(u.dtype == torch.bfloat16 and u.is_contiguous() for u in (q, k, v))
        rates = (1 - 2.0 ** (-5 - torch.arange(q.shape[2], device=q.device))).log()
        return retention_reference(q.float(), k.float(), v.float(), rates).to(v.dtype), None

    modules = {
        packages.SCAN: SimpleNamespace(fwd=fwd, bwd=bwd),
        packages.UPDATE: SimpleNamespace(selective_state_update=selective_state_update),
        packages.CONV: SimpleNamespace(
            causal_conv1d_fn=causal_conv1d_fn, causal_conv1d_update=causal_conv1d_update
        ),
        packages.FLA: SimpleNamespace(chunk_retention=chunk_retention),
    }
    monkeypatch.setattr(packages, "found", modules.get)
    yield


@pytest.mark.parametrize("op, mode, ours, rival", KINDS, ids=lambda x: f"{x}")
def test_every_kind_of_case_gives_a_row_of_the_report(op, mode, ours, rival, rivals):
    row = {"B": 1} if ours == "ours, packed" else {}
    row = bench_gpu.measured(tiny(op, mode, rival, ours, **row), CHIP)
    assert row["seconds"] > 0 and row["floor"] > 0
    assert (row["rival_seconds"] is None) == (rival is None) and not row.pop("wrong")
    assert (row["memory"] is None) == (mode != (FORWARD if "expand" in op else TRAINING))
    *_, cells = report.tables([row]).splitlines()
    assert cells.startswith(f"| {mode}") and "≤ 1000000 ms |" in cells


def test_a_wrong_output_and_a_wrong_gradient_are_said(monkeypatch):
    right = OPS["causal_conv1d"].on_gpu["ours in torch"].run

    def wrong_gradient(x, **inputs):
        return right(x=x, **inputs) + 0.1 * (x - x.detach())

    scaled = "output|gradient", lambda **inputs: 1.05 * right(**inputs)
    for said, run in (scaled, ("x: ", wrong_gradient)):
        for ours in (True, False):
            monkeypatch.setitem(OPS["causal_conv1d"].on_gpu, "wrong", OnGpu(run, ours=ours))
            row = bench_gpu.measured(tiny("causal_conv1d", FORWARD, None, "wrong"), CHIP)
            assert re.search(said, row["wrong"]) and row["seconds"] > 0


def test_an_output_that_is_wrong_late_in_a_long_sequence_is_said(monkeypatch):
    """Which the small size does not show."""
    monkeypatch.setattr(bench_gpu, "SMALL", {"T": 8})
    right = OPS["causal_conv1d"].on_gpu["ours in torch"].run

    def forgetful(x, **inputs):
        y = right(x=x, **inputs)
        return torch.cat([y[:, :30], 0 * y[:, 30:]], 1)

    monkeypatch.setitem(OPS["causal_conv1d"].on_gpu, "wrong", OnGpu(forgetful, ours=True))
    row = bench_gpu.measured(tiny("causal_conv1d", BACKWARD, None, "wrong", T=40), CHIP)
    assert "output: error" in row["wrong"]


def test_long_sequences_are_held_against_the_torch_backend(monkeypatch):
    monkeypatch.setitem(tables.LONG, "selective_scan", 4)
    sides = OPS["selective_scan"].on_gpu
    for name in ("ours in torch", "ours, packed"):
        sizes = ("B", 1), ("T", 9), ("D", 3), ("N", 2)
        bench_gpu.check_once("selective_scan", sizes, sides[name], False)


def test_shared_heads_and_learned_decays_are_compared_with_their_gradients(monkeypatch):
    monkeypatch.setitem(tables.LONG, "retention", 4)
    compared, agree = [], answers.agree
    monkeypatch.setattr(answers, "agree", lambda name, *rest: (compared.append(name), agree(name, *rest)))
    mamba2 = tiny("retention", BACKWARD, "ours in torch", H=3, G=1)
    assert bench_gpu.measured(mamba2, CHIP)["seconds"] > 0
    assert compared == 2 * ["output", "q", "k", "v", "log_decay"]
    compared.clear()
    bench_gpu.measured(tiny("retention", BACKWARD, None), CHIP)
    assert compared == ["output", "q", "k", "v"]  # RetNet's decays are constants


def scaled(u, by):
    """u, with a gradient that is not its own."""
    return by * u + (1 - by) * u.detach()


@pytest.mark.parametrize("wrong", ["output", "q", "k", "v", "log_decay"])
def test_the_last_group_of_heads_is_held_against_the_torch_backend(wrong, monkeypatch):
    monkeypatch.setitem(tables.LONG, "retention", 4)
    right = OPS["retention"].on_gpu["ours in torch"].run

    def run(**inputs):
        late = torch.tensor([1.0, 1.05], device=GPU)  # the last of two groups
        if wrong == "output":
            return right(**inputs) * late.repeat_interleave(2)[:, None].bfloat16()
        u = inputs[wrong]
        late = late.repeat_interleave(u.shape[2] // 2)
        return right(**inputs | {wrong: scaled(u, late if u.dim() == 3 else late[:, None]).to(u.dtype)})

    sizes = tuple({"B": 2, "T": 20, "H": 4, "K": 8, "V": 8, "G": 2}.items())
    bench_gpu.check_once("retention", sizes, OnGpu(right, ours=True), False)
    with pytest.raises(AssertionError, match=f"{wrong}: error"):
        bench_gpu.check_once("retention", sizes, OnGpu(run, ours=True), False)


def test_a_side_that_computes_another_function_says_so():
    case = tiny("retention", FORWARD, None, "causal attention", V=4)
    bench_gpu.measured(case, CHIP)
    bare = OPS["retention"].on_gpu["causal attention"]._replace(other=False)
    with pytest.raises(AssertionError, match="output: error"):
        bench_gpu.checked("retention", case.sizes, bare)


def test_a_side_that_tunes_itself_sees_no_sizes_but_those_that_are_timed(monkeypatch, rivals):
    seen, side = set(), OPS["retention"].on_gpu["flash-linear-attention"]

    def run(q, k, v, log_decay):
        seen.add((*q.shape, v.shape[-1]))
        return side.run(q, k, v, log_decay)

    monkeypatch.setitem(OPS["retention"].on_gpu, "flash-linear-attention", side._replace(run=run))
    bench_gpu.measured(tiny("retention", FORWARD, "flash-linear-attention", T=200), CHIP)
    assert seen == {(2, 200, 2, 4, 3)}


def test_what_is_compiled_beforehand_are_the_calls_that_are_timed(rivals):
    packages.compile_retention([{"B": 2, "T": 4096, "H": 2, "K": 4, "V": 3}])


def test_calls_in_a_row_are_as_many_as_their_time_is_divided_by(monkeypatch):
    calls, side = [], OPS["retention"].on_gpu["ours in torch"]
    run = lambda **inputs: (calls.append(1), side.run(**inputs))[1]  # noqa: E731
    monkeypatch.setitem(OPS["retention"].on_gpu, "ours in torch", side._replace(run=run))
    monkeypatch.setattr(bench_gpu, "checked", lambda *_: None)
    monkeypatch.setattr(bench_gpu, "CALLS", 7)
    monkeypatch.setattr(measure, "gpu_seconds", lambda call: (call(), 21.0)[1])
    row = bench_gpu.measured(tiny("retention", IN_A_ROW, None, "ours in torch"), CHIP)
    assert len(calls) == 7 and row["seconds"] == 3


def test_a_wheel_in_rivals_is_imported_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "RIVALS", tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    package = tmp_path / "fla_core-0.6.0" / "fla"
    package.mkdir(parents=True)
    package.with_name("fla_of_a_test.py").write_text("chunk_retention = 1")
    assert packages.from_wheels("fla_of_a_test").chunk_retention == 1
    assert packages.versions()["fla-core"] == "0.6.0"


def test_a_rival_that_is_not_there_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "RIVALS", tmp_path / ".rivals")
    why = "no_such_rival.module is not installed .*, and .rivals/ has no sources of it"
    assert re.fullmatch(why, packages.why_not("no_such_rival.module"))


def test_a_side_that_fails_leaves_no_poison_to_what_is_timed_next():
    with pytest.raises(RuntimeError), bench_gpu.poisoned():
        raise RuntimeError
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_versions_are_those_that_would_be_imported(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "RIVALS", tmp_path)
    (tmp_path / "mamba_ssm-0.1").mkdir()
    versions = packages.versions()
    assert versions["mamba-ssm"] == "0.1" and versions["torch"] == torch.__version__


def test_floors_are_the_bytes_or_the_special_functions():
    assert CHIP.floor(8e12, 4e12) == 2 and CHIP.floor(8e12, 12e12) == 3
    B, D, W = (TINY[axis] for axis in "BDW")
    step = bench_gpu.measured(tiny("causal_conv1d_step", DECODING, None), CHIP)
    bytes = 2 * 2 * B * D + 2 * 4 * B * D * (W - 1) + 4 * D * (W + 1)
    assert step["floor"] == pytest.approx(bytes / 4e12)
    scan = bench_gpu.measured(tiny("selective_scan", FORWARD, None), CHIP._replace(copy=1e30))
    assert scan["floor"] == pytest.approx(B * TINY["T"] * D * (TINY["N"] + 4) / 4e12)


def test_retention_takes_the_flops_that_are_registered():
    B, T, H, K, V = (tiny("retention", FORWARD, None).sizes[axis] for axis in "BTHKV")
    inputs = retentions.retention_inputs(B, T, H, K, V)
    heads = {name: u.requires_grad_() for name, u in inputs.items() if learned(name, u)}
    slow = CHIP._replace(copy=1e30, matmul=1.0)
    with FlopCounterMode(display=False) as counter:
        o = retention(**heads, log_decay=inputs["log_decay"])
        flops = counter.get_total_flops()
        o.sum().backward()
    for mode, count in {
        FORWARD: flops,
        BACKWARD: counter.get_total_flops() - flops,
        TRAINING: counter.get_total_flops(),
    }.items():
        assert bench_gpu.measured(tiny("retention", mode, None), slow)["floor"] == pytest.approx(count)
    bytes = 2 * B * T * H * 2 * (K + V) + 4 * H
    fast = bench_gpu.measured(tiny("retention", FORWARD, None), CHIP)["floor"]
    assert fast == pytest.approx(bytes / 4e12)


@pytest.mark.parametrize("op, added", [("kronecker_expand", True), ("kronecker_expand, dense maps", False)])
def test_an_expansion_takes_the_flops_that_are_registered_and_learns_no_old_layers(op, added, monkeypatch):
    compared, agree = [], answers.agree
    monkeypatch.setattr(answers, "agree", lambda name, *rest: (compared.append(name), agree(name, *rest)))
    with FlopCounterMode(display=False) as counter:
        kronecker_expand(**OPS[op].inputs(**MAPS) | dict(weight=torch.randn(2, 3, 4)), added=added)
    slow = CHIP._replace(copy=1e30, matmul=1.0)
    row = bench_gpu.measured(tiny(op, FORWARD, "ours in torch"), slow)
    assert row["floor"] == counter.get_total_flops() and row["elements"] == 3 * 5 * 7
    assert row["memory"] == 100 / (2 * 3 * 5 * 7)
    assert compared == 2 * ["output", "write", "read", "depth"]


def test_a_patched_model_gives_a_row_of_the_report(monkeypatch):
    monkeypatch.setattr(patched, "LAYERS", 1)
    monkeypatch.setattr(patched, "HIDDEN", 64)
    monkeypatch.setattr(patched, "VOCABULARY", 50)
    cases = [case._replace(tokens=8) for case in patched.CASES]
    monkeypatch.setattr(patched, "CASES", cases)
    for name, mode in bench_gpu.MODELS:
        row = bench_gpu.patched_model(name, mode, CHIP)
        assert row["rival"] == "plain torch" and not row["wrong"]
        assert "plain torch" in report.tables([row])


def test_a_step_of_learning_to_grow_and_its_share_give_rows_of_the_report(monkeypatch):
    small = GPT2Config(n_embd=16, n_head=2, n_layer=2, n_positions=16, vocab_size=30000, **ENDS)
    monkeypatch.setitem(ligo_step.PAIRS, bench_gpu.PAIR, (small, (24, 3), "lossless"))
    monkeypatch.setattr(ligo_step, "LENGTH", 16)
    monkeypatch.setattr(bench_gpu, "LEARNING", 32)
    rows = bench_gpu.learning.__wrapped__(CHIP)
    assert rows["its expansion"]["floor"] < rows["a step"]["floor"]
    assert rows["its expansion"]["rival_seconds"] == rows["a step"]["seconds"]
    *_, step, share = report.tables([*rows.values()]).splitlines()
    assert "training, 0.0 GB" in step and "≤ 1x memory" in step and "≤ 15 % of it" in share
    monkeypatch.setattr(bench_gpu, "large_weights", lambda expansion: [])
    rows = bench_gpu.learning.__wrapped__(CHIP)
    assert all("logits: error" in row["wrong"] for row in rows.values())
