"""Every op on a CPU: against what people have today, and against the machine.

    python -m pytest benchmarks/bench_cpu.py            10 minutes; prints the table and writes RESULTS.md
    ... -m "not minutes"                                without the rivals that need minutes; prints only
    ... -k "retention and forward"                      some; prints only
    ... -k Mamba-2 --benchmark-json=results/FILE        some; a section of its own for benchmarks.report

An answer is checked before it is timed. Where it is wrong the case fails, and its ratio is marked.
"""

from collections.abc import Callable
from math import prod

import pytest
import torch

from benchmarks import ligo_step, patched, rivals
from benchmarks.answers import OPS, both_wrong, check, drawn, gating, prepared, wrong
from benchmarks.cases import CPU, RETENTION, SCAN, Case
from benchmarks.measure import Race, attempt, flops, memory
from benchmarks.sides import Side
from benchmarks.work import work
from growth.training.flops import CPU_ATTENTION
from lcikernels import backends, extension

pytestmark = pytest.mark.filterwarnings("ignore")  # rivals have theirs


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.minutes] * case.minutes) for case in CPU]
)
def test_op(case, limits, benchmark, record):
    sides = [OPS[case.op].sides[name] for name in (case.ours, case.rival) if name]
    if why := next(filter(None, (why_not(case.op, side) for side in sides)), None):
        pytest.skip(why)
    calls = [timed(case, side) for side in sides]
    tries = [attempt(call) for call in calls]
    answered = [(side, tried.answer, not large(case)) for side, tried in zip(sides, tries)]
    said = [wrong(check, case.op, case.sizes, *one) for one in answered]
    if not case.minutes:  # the second time nothing is compiled any more
        tries = [attempt(call) for call in calls]
    ours, rival = [*calls, None][:2]
    race = Race(ours, rival, tries[1].seconds if case.minutes else None)
    least = work(case.op, case.mode, sides[0].dtype.itemsize, **case.sizes, **gating(case.op, sides[0]))
    record(
        op=case.op,
        shape=case.shape,
        mode=case.row,
        ours=labelled(case, case.ours, sides[0]),
        rival=case.rival and labelled(case, case.rival, sides[1]),
        **race.columns(benchmark),
        floor=limits.floor(*least),
        **memory(tries),
        targets=case.targets,
        axis=case.sweep if len(case.sweep) == 1 else None,
        value=case.sizes.get(case.sweep),
        **{"pass": case.mode},
        threads=case.rival == "ours, one thread",
        wrong=both_wrong(said),
    )


def why_not(op: str, side: Side) -> str | None:
    """Why this side cannot run here, or None."""
    if why := rivals.why_not(side.needs):
        return why
    if side.threads and torch.get_num_threads() == side.threads:
        return "torch has one thread here"
    if side.instructions and chosen(op, side) != "cpp":
        return f"{op} has no compiled kernel here, so no instruction set to choose"
    if side.backend == "cpp" and not hasattr(torch.ops.lcikernels_cpp, op):
        return f"{op} is not in the compiled library: {extension.WHY_NOT or 'it has no such kernel'}"
    return None


def chosen(op: str, side: Side) -> str:
    """The backend that computes."""
    return side.backend or backends.choose(op, None, torch.empty(0, dtype=side.dtype))


def labelled(case: Case, name: str, side: Side) -> str:
    is_op = side.ours and side.backend is None and case.op in backends.TABLES
    return f"{name} ({chosen(case.op, side)})" if is_op else name


def large(case: Case) -> bool:
    """Whether what a reference keeps in float64 would not fit, or take minutes."""
    base = {"selective_scan": SCAN, "retention": RETENTION}.get(case.op)
    return base is not None and prod(case.sizes.values()) > prod(base.values())


def timed(case: Case, side: Side) -> Callable[[], dict[str, torch.Tensor]]:
    """A call of one side, by the instructions and on the threads that it asks for."""
    call = prepared(case.op, drawn(case.op, case.sizes, side), side, case.mode)
    library = torch.ops.lcikernels_cpp
    if side.instructions:
        ways = library.use_instruction_set, side.instructions, library.instruction_set()
    elif side.threads:
        ways = torch.set_num_threads, side.threads, torch.get_num_threads()
    else:
        return call
    choose, this, usual = ways

    def run() -> dict[str, torch.Tensor]:
        choose(this)
        try:
            return call()
        finally:
            choose(usual)

    return run


def reckoned(layers: int, bare: Callable, seconds: float, mb: float) -> tuple[float, float]:
    """What so many layers take, from a call of none and what one took."""
    bare()
    none = attempt(bare)
    return none.seconds + layers * (seconds - none.seconds), none.mb + layers * (mb - none.mb)


@pytest.mark.minutes
@pytest.mark.parametrize("case", patched.CASES, ids=str)
def test_a_model_of_transformers_patched(case, limits, benchmark, record, request):
    """The same object either way. A Mamba's step of training is reckoned, unless all layers are asked for."""
    depth = patched.LAYERS if request.config.getoption("--all-layers") else case.layers
    model, rival_model = case.model(patched.LAYERS), case.model(depth)
    ours, rival = patched.patched(case.call(model)), case.call(rival_model)
    said = wrong(patched.same_answer, case, rival_model)
    tries = [attempt(ours), attempt(rival)]
    race = Race(ours, rival, tries[1].seconds if case.layers < patched.LAYERS else None)
    columns = race.columns(benchmark)
    rival_mb, name = tries[1].mb, "unpatched"
    if depth < patched.LAYERS:
        bare, seconds = case.call(case.model(0)), columns["rival_seconds"]
        columns["rival_seconds"], rival_mb = reckoned(patched.LAYERS, bare, seconds, rival_mb)
        name = f"unpatched, {patched.LAYERS} layers reckoned from 0 and {depth}"
    record(
        **case.named(),
        ours="patched",
        rival=name,
        **columns,
        floor=case.flops(model) / limits.sgemm,
        mb=tries[0].mb,
        rival_mb=rival_mb,
        targets={"ratio": case.ratio} | ({"mb": rival_mb / 10} if case.tenth else {}),
        wrong=said,
    )


@pytest.mark.minutes
@pytest.mark.parametrize("ours", ["LiGO", "making the large weights, of it"])
def test_a_step_of_ligo_s_learning(ours, limits, benchmark, record):
    """Against a training step of the large model; and how much of it makes the large weights."""
    expansion, large = ligo_step.models("BERT-Small to Base", "cpu")
    ids = ligo_step.tokens(8192, "cpu")
    learning, making = ligo_step.step(expansion, ids), ligo_step.expand(expansion)
    making()  # the first sgemm of a process is slow
    call, rival = (learning, ligo_step.step(large, ids)) if ours == "LiGO" else (making, learning)
    tries = [attempt(call), attempt(rival)]
    benchmark.pedantic(call)
    seconds = benchmark.stats.stats.median
    record(
        op="a step of LiGO's learning",
        shape=f"BERT-Small to Base, {ids.numel()} tokens",
        mode="forward + backward + AdamW",
        ours=ours,
        rival="training the large model" if ours == "LiGO" else "all of it",
        **dict(seconds=seconds, seconds_memory_kept=seconds, rival_seconds=tries[1].seconds),
        floor=flops(call, custom_mapping=CPU_ATTENTION) / limits.sgemm,
        **memory(tries),
        targets={} if ours == "LiGO" else {"ratio": 1 / 0.15},
        wrong="",
    )
