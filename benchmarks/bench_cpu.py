"""Every op on a CPU: against what people have today, and against the machine.

    python -m pytest benchmarks/bench_cpu.py            10 minutes; prints the table and writes RESULTS.md
    ... -m "not minutes"                                without the rivals that need minutes; prints only
    ... -k "retention and forward"                      some; prints only
    ... -k Mamba-2 --benchmark-json=results/FILE        some; a section of its own for benchmarks.report

An answer is checked before it is timed. Where it is wrong the case fails, and its ratio is marked.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from math import prod

import pytest
import torch
from tolerance import off_by_an_ulp
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ligo_step, mamba2_layer, patched, sides
from benchmarks.answers import agree, exchange, exchanged, wrong
from benchmarks.measure import Race, attempt
from benchmarks.shapes import CASES, FORWARD, RETENTION, SCAN, TRAINING, Case, work
from benchmarks.sides import PARAMETERS, Side
from growth.training.flops import CPU_ATTENTION
from lcikernels import backends, extension

OPS = sides.OPS | mamba2_layer.OPS
CHANNELS = 32  # of what is large that are checked
APART = {"x", "dt", "z", "q", "k", "v"}  # whose gradients are no sums over channels or sequences

pytestmark = pytest.mark.filterwarnings("ignore")  # rivals have theirs


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.minutes] * case.minutes) for case in CASES]
)
def test_op(case, limits, benchmark, record):
    sides = [OPS[case.op].sides[name] for name in (case.ours, case.rival) if name]
    if why := next(filter(None, (why_not(case.op, side) for side in sides)), None):
        pytest.skip(why)
    ours, rival = [prepared(case, side) for side in sides] + [None] * (case.rival is None)
    tries = [attempt(call) for call in (ours, rival) if call]
    said = [wrong(check, case, side, tried.answer) for side, tried in zip(sides, tries)]
    if not case.minutes:  # the second time nothing is compiled any more
        tries = [attempt(call) for call in (ours, rival) if call]
    race = Race(ours, rival, tries[1].seconds if case.minutes else None)
    seconds, rival_seconds = race.run(benchmark)
    least = work(case.op, case.mode, sides[0].dtype.itemsize, sides[0].gated, **case.sizes)
    record(
        op=case.op,
        shape=case.shape,
        mode=f"{case.row} {case.mode}".strip(),
        ours=labelled(case, case.ours, sides[0]),
        rival=case.rival and labelled(case, case.rival, sides[1]),
        seconds=seconds,
        seconds_memory_kept=race.with_memory_kept(),
        rival_seconds=rival_seconds,
        floor=limits.floor(*least),
        mb=tries[0].mb,
        rival_mb=tries[1].mb if rival else None,
        targets=case.targets,
        axis=case.sweep if len(case.sweep) == 1 else None,
        value=case.sizes.get(case.sweep),
        **{"pass": case.mode},
        threads=case.rival == "ours, one thread",
        wrong=said[0] or "".join(f"the rival's {x}" for x in said[1:] if x),
    )


def why_not(op: str, side: Side) -> str | None:
    """Why this side cannot run here, or None."""
    if side.needs and not find_spec(side.needs):
        return f"{side.needs} is not installed"
    if side.threads and torch.get_num_threads() == side.threads:
        return "torch has one thread here"
    if side.instructions and chosen(op, side) != "cpp":
        return f"{op} has no compiled kernel here, so no instruction set to choose"
    if side.backend == "cpp" and not hasattr(torch.ops.lcikernels_cpp, op):
        return f"{op} is not in the compiled library: {extension.WHY_NOT or 'it has no such kernel'}"
    return None


def chosen(op: str, side: Side) -> str:
    """The backend that computes."""
    wanted = None if side.backend == "cpp" else side.backend
    return side.backend or backends.choose(op, wanted, torch.empty(0, dtype=side.dtype))


def labelled(case: Case, name: str, side: Side) -> str:
    is_op = side.ours and side.backend is None and case.op in backends.TABLES
    return f"{name} ({chosen(case.op, side)})" if is_op else name


def prepared(case: Case, side: Side) -> Callable[[], dict[str, Tensor]]:
    """A call of one side, whose inputs lie ready: the output, in training the gradients of all inputs too."""
    fixed = OPS[case.op].fixed
    inputs = {
        name: exchanged(u, name in side.swapped).requires_grad_(case.mode == TRAINING and name not in fixed)
        for name, u in drawn(case, side).items()
    }
    leaves = {name: u for name, u in inputs.items() if u.requires_grad}
    swap = bool(side.swapped)

    def forward() -> dict[str, Tensor]:
        return {"output": exchange(side.run(**inputs), swap)}

    def training() -> dict[str, Tensor]:
        output = side.run(**inputs)
        if output.shape not in cotangents:
            cotangents[output.shape] = exchanged(cotangent(exchange(output, swap)), swap)
        grads = torch.autograd.grad(output, list(leaves.values()), cotangents[output.shape])
        grads = {name: exchange(grad, name in side.swapped) for name, grad in zip(leaves, grads)}
        return {"output": exchange(output.detach(), swap)} | grads

    cotangents: dict[torch.Size, Tensor] = {}
    call = forward if case.mode == FORWARD else training
    call = call if side.instructions is None else with_instructions(side.instructions, call)
    return call if side.threads is None else with_threads(side.threads, call)


def drawn(case: Case, side: Side) -> dict[str, Tensor]:
    """The same for every side, up to rounding to its dtype."""
    torch.manual_seed(0)
    inputs = OPS[case.op].inputs(side.gated, **case.sizes)
    return {name: u if name in PARAMETERS else u.to(side.dtype) for name, u in inputs.items()}


def cotangent(like: Tensor) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(like.shape).to(like.dtype)


def with_instructions(name: str, call: Callable) -> Callable:
    """`call` by another build of the compiled kernels."""
    library = torch.ops.lcikernels_cpp
    best = library.instruction_set()

    def run() -> object:
        library.use_instruction_set(name)
        try:
            return call()
        finally:
            library.use_instruction_set(best)

    return run


def with_threads(count: int, call: Callable) -> Callable:
    def run() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return call()
        finally:
            torch.set_num_threads(before)

    return run


def check(case: Case, side: Side, answer: dict[str, Tensor]) -> None:
    """The whole answer; of a large one what depends on a few channels alone."""
    some = large(case)
    for name, (truth, plain) in truths(case, side.dtype, side.gated, some).items():
        got = part(case.op, name, answer[name]) if some else answer[name]
        agree(name, got, truth, plain, side.ours)


def large(case: Case) -> bool:
    """Whether what a reference keeps in float64 would not fit, or take minutes."""
    base = {"selective_scan": SCAN, "retention": RETENTION}.get(case.op)
    return base is not None and prod(case.sizes.values()) > prod(base.values())


def part(op: str, name: str, u: Tensor) -> Tensor:
    """Of the last sequence the first head, or some channels; b and c, which all channels share, are whole."""
    if op == "retention":
        return u[-1:, :, :1]
    if name in ("b", "c"):
        return u[-1:]
    return u[-1:, :, :CHANNELS] if u.dim() == 3 else u[:CHANNELS]


def truths(case: Case, dtype: torch.dtype, gated: bool, some: bool) -> dict[str, tuple[Tensor, Tensor]]:
    return _truths(case.op, tuple(case.sizes.items()), case.mode, dtype, gated, some)


@lru_cache(maxsize=2)
def _truths(op, sizes, mode, dtype, gated, some) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs and gradients by the op's reference, in float64, and in float32 as tests/tolerance.py has it.

    some: of `part` alone, and no gradient that is a sum over more.
    """
    whole = drawn(Case(op, dict(sizes), mode), Side(None, dtype=dtype, gated=gated))
    inputs = {name: part(op, name, u) if some else u for name, u in whole.items()}
    names = [name for name in inputs if mode == TRAINING and name not in OPS[op].fixed]
    answers = []
    for cast in (Tensor.double, off_by_an_ulp):
        given = {name: cast(u).requires_grad_(name in names) for name, u in inputs.items()}
        output = OPS[op].reference(**given)
        answer = {"output": output.detach()}
        if mode == TRAINING:
            grad = cotangent((whole["v" if op == "retention" else "x"]) if some else output.to(dtype))
            grad = (part(op, "output", grad) if some else grad).to(output.dtype)
            grads = torch.autograd.grad(output, [given[name] for name in names], grad)
            answer |= {x: u for x, u in zip(names, grads) if not some or x in APART}
        answers.append(answer)
    truth, plain = answers
    return {name: (truth[name], plain[name]) for name in truth}


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
    seconds, rival_seconds = race.run(benchmark)
    rival_mb, name = tries[1].mb, "unpatched"
    if depth < patched.LAYERS:
        rival_seconds, rival_mb = reckoned(patched.LAYERS, case.call(case.model(0)), rival_seconds, rival_mb)
        name = f"unpatched, {patched.LAYERS} layers reckoned from 0 and {depth}"
    record(
        op=f"transformers' {case.name}",
        shape=f"layers={patched.LAYERS} hidden={patched.HIDDEN} T={case.tokens}",
        mode=case.mode,
        ours="patched",
        rival=name,
        seconds=seconds,
        seconds_memory_kept=race.with_memory_kept(),
        rival_seconds=rival_seconds,
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
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        call()
    record(
        op="a step of LiGO's learning",
        shape=f"BERT-Small to Base, {ids.numel()} tokens",
        mode="forward + backward + AdamW",
        ours=ours,
        rival="training the large model" if ours == "LiGO" else "all of it",
        seconds=benchmark.stats.stats.median,
        seconds_memory_kept=benchmark.stats.stats.median,
        rival_seconds=tries[1].seconds,
        floor=counter.get_total_flops() / limits.sgemm,
        mb=tries[0].mb,
        rival_mb=tries[1].mb,
        targets={} if ours == "LiGO" else {"ratio": 1 / 0.15},
        wrong="",
    )
