"""Every op that has kernels for a GPU: against what people have today, and against the chip.

    make gpu                                            builds and tests, then this
    python -m pytest -rfEs benchmarks/bench_gpu.py      all; prints the tables and writes RESULTS.md
    ... -k "conv and backward"                          some; prints only

All in bfloat16, parameters and states in float32. `forward` keeps nothing for a backward pass; `backward` is
torch.autograd.grad of a graph that is kept. A decoding step is timed as one of many in a CUDA graph, each
with a state of its own, a small call as one of many in a row. An answer is checked before it is timed, by the
op's reference in float64: at a small size all of it, at full size 64 channels of the last sequence, of
retention the heads that share its last q. And models beside transformers': patched, grown by learning, and
what a transfer makes, whose tokens one by one are checked against the whole text in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from tolerance import assert_agrees
from torch import Tensor

from benchmarks import answers, measure, rivals
from benchmarks.answers import OPS, both_wrong, check, drawn, prepared, same, wrong
from benchmarks.cases import BACKWARD, DECODING, FORWARD, GPU, IN_A_ROW, TRAINING, Case
from benchmarks.measure import GpuLimits, flops, size
from benchmarks.sides import Side
from benchmarks.work import WORK, least

SMALL = {"B": 2, "T": 1024, "D": 96}
SMALL_STATES = {"B": 1, "T": 150, "H": 2}  # retention's reference keeps a state a token, 2 MB in float64
CALLS = 500  # in a row: of the host's time only the first millisecond is hidden
COLD = 256e6  # bytes that 16 to 64 steps of a graph go through: more than an L2 cache, where a state is large
ROUNDED = 1 / 16  # of the largest: how far models in bfloat16 may differ
PAIR, LEARNING = "GPT2-Base to Medium", 8192  # of ligo_step.py, and tokens of a step
MODELS = ("MambaForCausalLM", "forward + backward"), ("Mamba2ForCausalLM", "forward + backward")
# transferred.py's, which needs transformers
TRANSFERRED = "RetNet", "Mamba", "Mamba-2", "hybrid of RetNet"
CONTEXTS = 1024, 4096, 16384, 65536

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.filterwarnings("ignore"),  # rivals have theirs
]


@pytest.mark.parametrize("case", GPU, ids=str)
def test_op(case, chip, benchmark, record):
    if why := case.rival and rivals.why_not(OPS[case.op].on_gpu[case.rival].needs):
        pytest.skip(why)
    record(**benchmark.pedantic(measured, (case, chip)))  # the times of a row are CUDA's


def measured(case: Case, limits: GpuLimits) -> dict[str, object]:
    """A row of the report."""
    sides = [OPS[case.op].on_gpu[name] for name in (case.ours, case.rival) if name]
    said = [wrong(checked, case.op, case.sizes, side) for side in sides]
    inputs = drawn(case.op, case.sizes, sides[0])
    count = {DECODING: copies(inputs), IN_A_ROW: CALLS}.get(case.mode, 1)
    ours, rival = [*(timed(case, inputs, side, count) for side in sides), None][:2]
    seconds, rival_seconds = measure.gpu_race(ours, rival)
    like = OPS[case.op].output(inputs)
    read, x, elements, memory = size(inputs.values()), size([like]), like.numel(), None
    if "kronecker_expand" in case.op:
        forward, backward = ((one.bytes, 0, one.flops) for one in WORK[case.op](2, **case.sizes))
        memory = measure.peak(ours) / x if case.mode == FORWARD else None
    else:
        forward, backward = least(case.sizes, read, x, elements)
        if case.mode == TRAINING:  # gradients are like inputs
            memory = (measure.peak(ours) + read + x) / (2 * (read + x))
    passes = {BACKWARD: [backward], TRAINING: [forward, backward]}.get(case.mode, [forward])
    if case.mode == DECODING:  # a state's 8 bytes take longer than its exp2
        passes = [(read + x + size([inputs["state"]]),)]
    return dict(
        op=case.op,
        shape=case.shape,
        mode=case.row,
        ours=case.ours,
        rival=case.rival,
        seconds=seconds / count,
        rival_seconds=rival_seconds and rival_seconds / count,
        floor=sum(limits.floor(*one) for one in passes),
        elements=elements,
        memory=memory,
        targets=case.targets,
        wrong=both_wrong(said),
    )


def copies(inputs: dict[str, Tensor]) -> int:
    """Steps in a graph."""
    return int(min(max(16, COLD / size(inputs.values())), 64))


def timed(case: Case, inputs: dict[str, Tensor], side: Side, count: int) -> Callable[[], object]:
    """A call to be timed, whose inputs lie ready; `count` of them where that is what is timed."""
    if case.mode == DECODING:
        return measure.graph([partial(side.run, **answers.laid_out(side, inputs)) for _ in range(count)])
    if case.mode != IN_A_ROW:
        return prepared(case.op, inputs, side, case.mode)
    call = prepared(case.op, inputs, side, FORWARD)

    def in_a_row() -> None:
        """Where Python takes longer than the GPU, it is Python's time."""
        for _ in range(count):
            call()

    return in_a_row


def checked(op: str, sizes: dict[str, int], side: Side) -> None:
    """Of a step the output; else the output and the gradients, small and whole, then in part."""
    if side.other:
        return
    if "T" in sizes and not side.tuned:
        most = SMALL_STATES if op == "retention" else SMALL
        small = tuple((axis, min(size, most.get(axis, size))) for axis, size in sizes.items())
        check_ours(op, small, side) if side.ours else check_once(op, small, side, True)
    check_once(op, tuple(sizes.items()), side, "T" not in sizes)


@cache
def check_ours(op: str, sizes: tuple[tuple[str, int], ...], side: Side) -> None:
    def run(**inputs) -> Tensor:
        with poisoned():
            there = answers.laid_out(side, {name: u.to(measure.DEVICE) for name, u in inputs.items()})
            return answers.exchange(side.run(**there), bool(side.swapped)).cpu()

    inputs = drawn(op, dict(sizes), side).items()
    inputs = {name: u.cpu().requires_grad_(answers.learned(name, u)) for name, u in inputs}
    assert_agrees(run, partial(OPS[op].reference, **answers.packed(side, inputs)), OPS[op].products, **inputs)


@cache
def check_once(op: str, sizes: tuple[tuple[str, int], ...], side: Side, whole: bool) -> None:
    inputs = drawn(op, dict(sizes), side)
    with poisoned():
        answer = prepared(op, inputs, side, FORWARD if "state" in inputs else TRAINING)()
    check(op, dict(sizes), side, answer, whole)


@contextmanager
def poisoned() -> Iterator[None]:
    """What a side leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:  # or all that is timed after a failure would fill its memory
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("what", ["a step", "its expansion"])
def test_learning_to_grow(what, chip, benchmark, record):
    for needed in ("transformers", "accelerate"):
        pytest.importorskip(needed)
    record(**benchmark.pedantic(lambda: learning(chip)[what]))


@cache
def learning(limits: GpuLimits) -> dict[str, dict[str, object]]:
    """LiGO's step beside one of training the large model, and what of it makes the large weights.

    memory: of the weights, gradients, AdamW's moments and all that a step needs, over what training takes.
    """
    from benchmarks import ligo_step  # with transformers, which the ops do without

    ids, mixed = ligo_step.tokens(LEARNING, measure.DEVICE), torch.autocast(measure.DEVICE, torch.bfloat16)
    expansion, large = ligo_step.models(PAIR, "cpu")
    with torch.no_grad():  # the same function, but for a tied head, which has no name of its own
        large.load_state_dict(dict(large_weights(expansion)), strict=False)
    logits, steps = [], []

    def begin(model: torch.nn.Module, inner: torch.nn.Module) -> None:
        model.to(measure.DEVICE).forward = mixed(model.forward)
        inner.eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids[:1]).logits.float())
        inner.train()
        steps.append(ligo_step.step(model, ids))
        for _ in range(2):  # the second has moments
            steps[-1]()

    peak = measure.peak(partial(begin, expansion, *expansion.large))
    its_peak = measure.peak(partial(begin, large, large))
    expand = mixed(ligo_step.expand(expansion))
    seconds, its_seconds = measure.gpu_race(*steps)
    off = wrong(same, *logits, ROUNDED)
    row = dict(op="a LiGO step", shape=f"{PAIR}, {LEARNING} tokens", elements=LEARNING, ours="ours")
    row["wrong"] = off and f"logits: {off}"
    step = dict(mode=f"a step, {peak / 1e9:.1f} GB", rival=f"training, {its_peak / 1e9:.1f} GB")
    step |= dict(seconds=seconds, rival_seconds=its_seconds, floor=flops(steps[0]) / limits.matmul)
    step |= dict(memory=peak / its_peak, targets={"memory": 1})
    share = dict(mode="of it the expansion", rival="the step", memory=None, targets={"share": 15})
    share |= dict(seconds=measure.gpu_seconds(expand), rival_seconds=seconds)
    share |= dict(floor=flops(expand) / limits.matmul)
    return {"a step": row | step, "its expansion": row | share}


def large_weights(expansion) -> Iterator[tuple[str, Tensor]]:
    """As the large model names them."""
    for name, (entry, layer) in expansion.table.items():
        made = expansion.operator.wide(entry.weights, layer)
        yield expansion.memory_name[name], entry.to_disk(made)


@pytest.mark.parametrize("name, mode", MODELS)
def test_a_model_of_transformers_patched(name, mode, chip, benchmark, record):
    """Against the packages that its module found when it was imported, or transformers' own torch."""
    pytest.importorskip("transformers")
    record(**benchmark.pedantic(patched_model, (name, mode, chip)))


def patched_model(name: str, mode: str, limits: GpuLimits) -> dict[str, object]:
    """A row of the report. memory: over the unpatched model's."""
    from benchmarks import patched

    case = next(case for case in patched.CASES if (case.name, case.mode) == (name, mode))
    model = case.model(patched.LAYERS).to(measure.DEVICE, torch.bfloat16)
    rival, ours = case.call(model), patched.patched(case.call(model))
    said = wrong(same, ours().float(), rival().float(), ROUNDED)
    peak, its_peak = measure.peak(ours), measure.peak(rival)
    seconds, rival_seconds = measure.gpu_race(ours, rival)
    return dict(
        **case.named(),
        ours="patched",
        rival=patched.installed(model),
        **dict(seconds=seconds, rival_seconds=rival_seconds, floor=case.flops(model) / limits.matmul),
        **dict(elements=case.tokens, memory=peak / its_peak),
        targets={"ratio": 1},
        wrong=said,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    for needed in ("transformers", "accelerate"):
        pytest.importorskip(needed)
    from benchmarks import transferred

    return transferred.source(transferred.Size(), tmp_path_factory.mktemp("transferred") / "source")


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", TRANSFERRED)
def test_a_token_beside_the_source_s(name, context, source, chip, benchmark, record):
    """Through Python, so that at this size its time counts more than the GPU's."""
    record(**benchmark.pedantic(token, (name, context, source, chip)))


def token(name: str, context: int, source: Path, limits: GpuLimits) -> dict[str, object]:
    """A row of the report: times of one token, memory of the state over that of the source's keys."""
    from benchmarks import transferred

    size, dtype = transferred.Size(), torch.bfloat16
    folders = transferred.target(size, name, source), source
    ours, rival = (transferred.Writer(folder, context, size, measure.DEVICE, dtype) for folder in folders)
    seconds, rival_seconds = (x / size.decoded for x in measure.gpu_race(ours.call, rival.call))
    read, operations = ours.least()
    return dict(
        op="a token",
        shape=str(size),
        mode=f"after {context}, {ours.bytes / 1e6:.1f} MB of state",
        ours=name,
        rival=f"attention, {rival.bytes / 1e6:.1f} MB of keys and values",
        **dict(seconds=seconds, rival_seconds=rival_seconds, floor=limits.floor(read, flops=operations)),
        **dict(elements=size.vocabulary, memory=ours.bytes / rival.bytes),
        targets={"ratio": 1} if context > CONTEXTS[0] else {},
        wrong=ours.wrong or rival.wrong,
    )
