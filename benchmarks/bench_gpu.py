"""Every op that has kernels for a GPU: against what people have today, and against the chip.

    make gpu                                            builds and tests, then this
    python -m pytest -rfEs benchmarks/bench_gpu.py      all; prints the tables and writes RESULTS.md
    ... -k "conv and backward"                          some; prints only

All in bfloat16, parameters and states in float32. `forward` keeps nothing for a backward pass; `backward` is
torch.autograd.grad of a graph that is kept. A decoding step is timed as one of many in a CUDA graph, each
with a state of its own, a small call as one of many in a row. An answer is checked before it is timed, by the
op's reference in float64: at a small size all of it, at full size 64 channels of the last sequence, of
retention the heads that share its last q.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import inf
from typing import NamedTuple

import pytest
import torch
from tolerance import assert_agrees, off_by_an_ulp
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.answers import agree, exchange, exchanged, wrong
from benchmarks.gpu_sides import OPS, PUBLISHED, RETNET, Side, found, learned
from benchmarks.shapes import BERT, BERT_DOWN, BERT_UP, FORWARD, GPT2, GPT2_UP, ONE_LAYER, TRAINING
from benchmarks.sides import PARAMETERS

BACKWARD, DECODING, IN_A_ROW = "backward", "one token", "forward, called in a row"
TOKENS = {"x", "dt", "z", "gate", "q", "k", "v", "log_decay"}  # [B, T, D or heads, ...]; b and c [B, T, N]
SMALL = {"B": 2, "T": 1024, "D": 96}
SMALL_STATES = {"B": 1, "T": 150, "H": 2}  # retention's reference keeps a state a token, 2 MB in float64
CHANNELS = 64
ON_GPU = {"kronecker_expand", "kronecker_expand, dense maps"}  # references: 10 s of a CPU's products
LONG = {"selective_scan": 4096, "retention": 150}  # from more tokens on, the torch backend in float64 stands
CALLS = 500  # in a row: of the host's time only the first millisecond is hidden
COLD = 256e6  # bytes that 16 to 64 steps of a graph go through: more than an L2 cache, where a state is large

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.filterwarnings("ignore"),  # rivals have theirs
]


class Case(NamedTuple):
    """`ours` against `rival`, sides of `op` in gpu_sides.py. table, row: where cases share a table."""

    op: str
    sizes: dict[str, int]
    mode: str
    rival: str | None = None
    targets: dict[str, float] = {}
    ours: str = "ours"
    table: str = ""
    row: str = ""

    @property
    def shape(self) -> str:
        return self.table or " ".join(f"{name}={size}" for name, size in self.sizes.items())

    def __str__(self) -> str:
        what = self.op, self.mode, self.ours, "vs", f"{self.rival}", self.row or self.shape
        return "-".join(what).replace(" ", "_")


SCAN = {"B": 8, "T": 4096, "D": 2048, "N": 16}
CONV = {"B": 8, "T": 4096, "D": 2048, "W": 4}
NORM = {"B": 8, "T": 4096, "D": 2048}
MAMBA2 = {"B": 8, "T": 4096, "H": 24, "K": 128, "V": 64, "G": 1}
ATTENTION = {"B": 4, "T": 2048, "H": 16, "K": 128, "V": 128}
LITTLE = {"B": 1, "T": 256, "H": 8, "K": 64, "V": 64}
PACKED = {**SCAN, "B": 1, "T": 8 * 4096}
# As many old layers as new ones: the order that saves products is the one that our kernels take.
DENSE = {"L1": 8, "L2": 8, "m": 2048, "n": 2048, "M": 4096, "N": 4096}
AT_FLOOR = {"percent": 100 / 1.5}
EXPANDING = (FORWARD, {"memory": 1.1}), (BACKWARD, {}), (TRAINING, {})  # modes, and targets of each
PAIR, LEARNING = "GPT2-Base to Medium", 8192  # of ligo_step.py, and tokens of a step


def sweep(table: str, **changing: dict[str, int]) -> list[Case]:
    rows = {name: {**SCAN, **sizes} for name, sizes in changing.items()}
    return [
        Case("selective_scan", sizes, mode, table=table, row=name)
        for mode in (FORWARD, BACKWARD)
        for name, sizes in rows.items()
    ]


def steps(op: str, size: dict[str, int], *rivals: str) -> list[Case]:
    return [
        Case(op, {"B": B, **size}, DECODING, name, AT_FLOOR if B == 64 else {})
        for B in (64, 1)
        for name in (*rivals, "ours in torch")
    ]


def against_fla(sizes: dict[str, int], mode: str, **options) -> Case:
    return Case("retention", sizes, mode, "flash-linear-attention", **options)


def published(sizes: dict[str, int], mode: str) -> Case:
    row = "B={B} T={T} H={H} K=V={K}".format(**sizes)
    table = "flash-linear-attention's own shapes"
    return against_fla(sizes, mode, targets={"ratio": 1}, table=table, row=row)


def expansions(sizes: dict[str, int]) -> list[Case]:
    """Against LiGO's equation in both orders; and against its code, which multiplies no identity either."""
    return [
        *(
            Case("kronecker_expand", sizes, mode, rival, {"ratio": 5} | most)
            for mode, most in EXPANDING
            for rival in ("layers mixed, then widened", "layers widened, then mixed")
        ),
        Case("kronecker_expand", sizes, TRAINING, "new units alone"),
        Case("kronecker_expand", sizes, TRAINING, "ours in torch"),
    ]


CASES = [
    Case("selective_scan", SCAN, FORWARD, "mamba-ssm", {"ratio": 2}),
    Case("selective_scan", SCAN, BACKWARD, "mamba-ssm", {"ratio": 2.5}),
    Case("selective_scan", SCAN, TRAINING, "mamba-ssm"),
    Case("selective_scan", SCAN, FORWARD, "ours in torch", {"first_ms": 0.50, "ms": 0.42}),
    Case("selective_scan", SCAN, BACKWARD, "ours in torch", {"first_ms": 1.2, "ms": 0.95}),
    Case("selective_scan", SCAN, TRAINING, "ours in torch", {"memory": 1.2}),
    Case("selective_scan", PACKED, FORWARD, "ours, 8 rows", ours="ours, packed"),
    Case("selective_scan", PACKED, BACKWARD, "ours, 8 rows", ours="ours, packed"),
    *(
        Case("causal_conv1d", CONV, mode, rival)
        for rival in ("causal-conv1d", "ours in torch")
        for mode in (FORWARD, BACKWARD, TRAINING)
    ),
    *(
        Case(op, sizes, mode, rival, {"ratio": 1 / 1.25} if rival == "ours" else {}, "ours, [B, D, T]")
        for op, sizes, package in (
            ("selective_scan", SCAN, "mamba-ssm"),
            ("causal_conv1d", CONV, "causal-conv1d"),
        )
        for rival in ("ours", package)
        for mode in (FORWARD, TRAINING)
    ),
    *(Case("gated_rms_norm", NORM, mode, "ours in torch") for mode in (FORWARD, BACKWARD, TRAINING)),
    *steps("selective_scan_step", {"D": 4096, "N": 16}, "mamba-ssm"),
    *steps("causal_conv1d_step", {"D": 4096, "W": 4}, "causal-conv1d"),
    Case("retention", RETNET, FORWARD, "ours in torch", {"first_ms": 0.50, "ms": 0.36}),
    Case("retention", RETNET, BACKWARD, "ours in torch", {"first_ms": 1.2, "ms": 0.90}),
    *(
        Case("retention", {**ATTENTION, "T": T}, mode, "causal attention", {"ratio": 1})
        for T in (2048, 8192)
        for mode in (FORWARD, TRAINING)
    ),
    *(Case("retention", MAMBA2, mode, "ours in torch") for mode in (FORWARD, BACKWARD, TRAINING)),
    Case("retention", LITTLE, IN_A_ROW, None, {"ms": 0.06}),
    *steps("retention_step", {"H": 8, "K": 256, "V": 512}),
    against_fla(RETNET, FORWARD, targets={"ratio": 1.5}),
    against_fla(RETNET, BACKWARD),
    against_fla(RETNET, TRAINING, targets={"ratio": 2.5}),
    *(published(sizes, mode) for sizes in PUBLISHED for mode in (FORWARD, TRAINING)),
    against_fla(LITTLE, IN_A_ROW),
    *(case for sizes in (BERT, BERT_UP, BERT_DOWN, ONE_LAYER, GPT2, GPT2_UP) for case in expansions(sizes)),
    *(
        Case("kronecker_expand, dense maps", DENSE, mode, "ours in torch", {"percent": 60} | most)
        for mode, most in EXPANDING
    ),
    *sweep("T grows, B T = 32768 or B = 1, D=2048 N=16", **{
        f"T={T}": {"B": max(1, 32768 // T), "T": T} for T in (512 << i for i in range(8))
    }),
    *sweep("B D grows, T=4096 N=16", **{
        f"B D={BD}": {"B": max(1, BD // 2048), "D": min(BD, 2048)} for BD in (1024 << i for i in range(7))
    }),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, chip, benchmark, record):
    if why := case.rival and why_not(OPS[case.op].sides[case.rival]):
        pytest.skip(why)
    record(**benchmark.pedantic(measured, (case, chip)))  # the times of a row are CUDA's


def why_not(side: Side) -> str | None:
    """Why a rival cannot run here, in one line, or None."""
    module = side.needs and found(side.needs)
    return module.partition("\n")[0] if isinstance(module, str) else None


def measured(case: Case, limits: gpu.Limits) -> dict[str, object]:
    """A row of the report."""
    sides = [OPS[case.op].sides[name] for name in (case.ours, case.rival) if name]
    said = [wrong(check, case.op, case.sizes, side) for side in sides]
    inputs = drawn(case.op, case.sizes)
    count = {DECODING: copies(inputs), IN_A_ROW: CALLS}.get(case.mode, 1)
    ours, rival = [prepared(case, inputs, side, count) for side in sides] + [None] * (not case.rival)
    seconds, rival_seconds = gpu.race(ours, rival)
    work, like = OPS[case.op].work, OPS[case.op].output(inputs)
    read, x, elements = gpu.size(inputs.values()), gpu.size([like]), like.numel()  # gradients are like inputs
    if work:
        forward, backward = ((one.bytes, 0, one.flops) for one in work(**case.sizes))
        memory = gpu.peak(ours) / x if case.mode == FORWARD else None
    else:
        forward, backward = gpu.least(case.sizes, read, x, elements)
        memory = (gpu.peak(ours) + read + x) / (2 * (read + x)) if case.mode == TRAINING else None
    passes = {FORWARD: [forward], BACKWARD: [backward], TRAINING: [forward, backward], IN_A_ROW: [forward]}
    if case.mode == DECODING:  # a state's 8 bytes take longer than its exp2
        passes[DECODING] = [(read + x + gpu.size([inputs["state"]]),)]
    return dict(
        op=case.op,
        shape=case.shape,
        mode=f"{case.row} {case.mode}".strip(),
        ours=case.ours,
        rival=case.rival,
        seconds=seconds / count,
        rival_seconds=rival_seconds and rival_seconds / count,
        floor=sum(limits.floor(*one) for one in passes[case.mode]),
        elements=elements,
        memory=memory,
        targets=case.targets,
        wrong=said[0] or "".join(f"the rival's {x}" for x in said[1:] if x),
    )


def drawn(op: str, sizes: dict[str, int]) -> dict[str, Tensor]:
    """The same for every side."""
    torch.manual_seed(0)
    with torch.device(gpu.DEVICE):
        inputs = OPS[op].inputs(**sizes)
    return {name: u if name in PARAMETERS else u.bfloat16() for name, u in inputs.items()}


def laid_out(side: Side, inputs: dict[str, Tensor], train: bool) -> dict[str, Tensor]:
    """Copies, as the side likes them best."""
    inputs = {name: exchanged(u, name in side.swapped) for name, u in inputs.items()}
    if "state" in inputs:
        inputs["state"] = inputs["state"].to(side.state)
    return {name: u.requires_grad_(train and learned(name, u)) for name, u in inputs.items()}


def cotangent(side: Side, x: Tensor) -> Tensor:
    """For an output like x, in the side's layout."""
    torch.manual_seed(1)
    return exchanged(torch.randn_like(x), bool(side.swapped))


def copies(inputs: dict[str, Tensor]) -> int:
    """Steps in a graph."""
    return int(min(max(16, COLD / gpu.size(inputs.values())), 64))


def prepared(case: Case, drawn: dict[str, Tensor], side: Side, count: int) -> Callable[[], object]:
    """A call to be timed, whose inputs lie ready; `count` steps where that is what is timed."""
    if case.mode == DECODING:
        return gpu.graph([partial(side.run, **laid_out(side, drawn, False)) for _ in range(count)])
    inputs = laid_out(side, drawn, case.mode in (BACKWARD, TRAINING))
    call = partial(side.run, **inputs)
    if case.mode == FORWARD:
        return call
    if case.mode == IN_A_ROW:
        return partial(in_a_row, call, count)
    grad = cotangent(side, OPS[case.op].output(drawn))
    leaves = [u for u in inputs.values() if u.requires_grad]
    if case.mode == BACKWARD:
        output = side.run(**inputs)
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)

    def training() -> tuple:
        output = side.run(**inputs)
        return output, torch.autograd.grad(output, leaves, grad)

    return training


def in_a_row(call: Callable[[], Tensor], count: int) -> Tensor:
    """Where Python takes longer than the GPU, it is Python's time."""
    for _ in range(count - 1):
        call()
    return call()


def check(op: str, sizes: dict[str, int], side: Side) -> None:
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
            there = {name: exchanged(u.to(gpu.DEVICE), name in side.swapped) for name, u in inputs.items()}
            return exchange(side.run(**there), bool(side.swapped)).cpu()

    inputs = drawn(op, dict(sizes)).items()
    inputs = {name: u.cpu().requires_grad_(learned(name, u)) for name, u in inputs}
    truth, bounds = OPS[op].reference, bounds_for(side, inputs)
    truth = truth if bounds is None else partial(truth, cu_seqlens=bounds)
    assert_agrees(run, truth, OPS[op].products, **inputs)


@cache
def check_once(op: str, sizes: tuple[tuple[str, int], ...], side: Side, whole: bool) -> None:
    inputs, like, products = drawn(op, dict(sizes)), OPS[op].like, OPS[op].products
    got, grad = answer(op, side, inputs), cotangent(side._replace(swapped=()), OPS[op].output(inputs))
    bounds = bounds_for(side, inputs)
    if not whole:
        some = partial(part, op, dict(sizes))
        inputs, grad = {name: some(name, u) for name, u in inputs.items()}, some(like, grad)
        got = {name: some(like, u) for name, u in got.items() if name in TOKENS | {"output"}}
    truth, plain = (reference(op, inputs, grad, bounds, cast) for cast in (Tensor.double, off_by_an_ulp))
    for name, u in got.items():
        agree(name, u.to(truth[name].device), truth[name], plain[name], side.ours, products)


def bounds_for(side: Side, inputs: dict[str, Tensor]) -> Tensor | None:
    return side.bounds and torch.tensor(side.bounds(inputs["x"].shape[1]), dtype=torch.int32)


@contextmanager
def poisoned() -> Iterator[None]:
    """What a side leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:  # or all that is timed after a failure would fill its memory
        torch.use_deterministic_algorithms(False)


def part(op: str, sizes: dict[str, int], name: str, u: Tensor) -> Tensor:
    """The last sequence and some channels: no other changes their outputs, nor their tokens' gradients.

    Of the norm, where they do, all channels; of retention the last head of q and k, and all that share it.
    """
    if op == "retention":
        heads = u.shape[2 if u.dim() > 1 else 0]
        shared = slice(heads - heads // sizes.get("G", sizes["H"]), None)
        return u[-1:, :, shared] if u.dim() > 1 else u[shared]
    if name in ("b", "c") or op == "gated_rms_norm":
        return u[-1:] if u.dim() == 3 else u
    chosen = torch.linspace(0, u.shape[2 if name in TOKENS else 0] - 1, CHANNELS, device=u.device).long()
    return u[-1:, :, chosen] if name in TOKENS else u[chosen]


def answer(op: str, side: Side, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of all inputs."""
    train, grads = "state" not in inputs, ()
    there = laid_out(side, inputs, train)
    leaves = {name: u for name, u in there.items() if u.requires_grad}
    with poisoned():
        output = side.run(**there)
        if train:
            grads = torch.autograd.grad(
                output, list(leaves.values()), cotangent(side, OPS[op].output(inputs))
            )
    answers = {"output": exchange(output.detach(), bool(side.swapped))}
    return answers | {name: exchange(u, name in side.swapped) for name, u in zip(leaves, grads)}


def reference(
    op: str, inputs: dict[str, Tensor], grad: Tensor, bounds: Tensor | None, cast: Callable
) -> dict[str, Tensor]:
    train, grads = "state" not in inputs, ()
    device = gpu.DEVICE if op in ON_GPU else "cpu"
    inputs = {name: cast(u.detach().to(device)) for name, u in inputs.items()}
    leaves = {name: u.requires_grad_() for name, u in inputs.items() if train and learned(name, u)}
    long = OPS[op].output(inputs).shape[1] > LONG.get(op, inf)
    run = OPS[op].sides["ours in torch"].run if long else OPS[op].reference
    output = run(**inputs) if bounds is None else run(**inputs, cu_seqlens=bounds)
    if train:
        grads = torch.autograd.grad(output, list(leaves.values()), grad.to(output))
    return {"output": output.detach()} | dict(zip(leaves, grads))


@pytest.mark.parametrize("what", ["a step", "its expansion"])
def test_learning_to_grow(what, chip, benchmark, record):
    for needed in ("transformers", "accelerate"):
        pytest.importorskip(needed)
    record(**benchmark.pedantic(lambda: learning(chip)[what]))


@cache
def learning(limits: gpu.Limits) -> dict[str, dict[str, object]]:
    """LiGO's step beside one of training the large model, and what of it makes the large weights.

    memory: of the weights, gradients, AdamW's moments and all that a step needs, over what training takes.
    """
    from benchmarks import ligo_step  # with transformers, which the ops do without

    ids, mixed = ligo_step.tokens(LEARNING, gpu.DEVICE), torch.autocast(gpu.DEVICE, torch.bfloat16)
    expansion, large = ligo_step.models(PAIR, "cpu")
    with torch.no_grad():  # the same function, but for a tied head, which has no name of its own
        large.load_state_dict(dict(large_weights(expansion)), strict=False)
    logits, steps = [], []

    def begin(model: torch.nn.Module, inner: torch.nn.Module) -> None:
        model.to(gpu.DEVICE).forward = mixed(model.forward)
        inner.eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids[:1]).logits.float())
        inner.train()
        steps.append(ligo_step.step(model, ids))
        for _ in range(2):  # the second has moments
            steps[-1]()

    peak = gpu.peak(partial(begin, expansion, *expansion.large))
    its_peak = gpu.peak(partial(begin, large, large))
    error, largest = (logits[0] - logits[1]).abs().max(), logits[1].abs().max()
    off = "" if error <= largest / 16 else f"logits: error {error:.2e}, largest {largest:.2e}"
    expand = mixed(ligo_step.expand(expansion))
    seconds, its_seconds = gpu.race(*steps)
    row = dict(op="a LiGO step", shape=f"{PAIR}, {LEARNING} tokens", elements=LEARNING, wrong=off)
    return {
        "a step": row
        | dict(
            mode=f"a step, {peak / 1e9:.1f} GB",
            ours="ours",
            rival=f"training, {its_peak / 1e9:.1f} GB",
            seconds=seconds,
            rival_seconds=its_seconds,
            floor=flops(steps[0]) / limits.matmul,
            memory=peak / its_peak,
            targets={"memory": 1},
        ),
        "its expansion": row
        | dict(
            mode="of it the expansion",
            ours="ours",
            rival="the step",
            seconds=gpu.seconds(expand),
            rival_seconds=seconds,
            floor=flops(expand) / limits.matmul,
            memory=None,
            targets={"share": 15},
        ),
    }


MODELS = ("MambaForCausalLM", "forward + backward"), ("Mamba2ForCausalLM", "forward + backward")


@pytest.mark.parametrize("name, mode", MODELS)
def test_a_model_of_transformers_patched(name, mode, chip, benchmark, record):
    """Against the packages that its module found when it was imported, or transformers' own torch."""
    pytest.importorskip("transformers")
    record(**benchmark.pedantic(patched_model, (name, mode, chip)))


def patched_model(name: str, mode: str, limits: gpu.Limits) -> dict[str, object]:
    """A row of the report. memory: over the unpatched model's."""
    from benchmarks import patched

    case = next(case for case in patched.CASES if (case.name, case.mode) == (name, mode))
    model = case.model(patched.LAYERS).to(gpu.DEVICE, torch.bfloat16)
    rival, ours = case.call(model), patched.patched(case.call(model))
    theirs, error = rival().float(), (ours().float() - rival().float()).abs().max()
    peak, its_peak = gpu.peak(ours), gpu.peak(rival)
    seconds, rival_seconds = gpu.race(ours, rival)
    return dict(
        op=f"transformers' {name}",
        shape=f"layers={patched.LAYERS} hidden={patched.HIDDEN} T={case.tokens}",
        mode=mode,
        ours="patched",
        rival=patched.installed(model),
        seconds=seconds,
        rival_seconds=rival_seconds,
        floor=case.flops(model) / limits.matmul,
        elements=case.tokens,
        memory=peak / its_peak,
        targets={"ratio": 1},
        wrong="" if error <= theirs.abs().max() / 16 else f"error {error:.2e}",
    )


def large_weights(expansion) -> Iterator[tuple[str, Tensor]]:
    """As the large model names them."""
    for name, (entry, layer) in expansion.table.items():
        made = expansion.operator.wide(entry.weights, layer)
        yield expansion.memory_name[name], entry.to_disk(made)


def flops(call: Callable) -> int:
    """Of matrix products."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
