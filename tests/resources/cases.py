"""Which calls are proven: every configuration that the launchers choose, small, with all that is optional or
nothing of it; and which are predicted: those that are timed on a GPU, as large as they are there."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lcikernels import backends
from lcikernels.ops.selective_scan.op import checkpoints

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """Calls of an op's launchers by name, forward first. replaced: functions of its package, to have a case.

    sizes, of those that are predicted: what is timed, and by what of an output it is counted.
    """

    op: str
    what: str
    calls: dict[str, Callable[[], object]]
    replaced: dict[str, Callable] = {}
    sizes: dict[str, int] = {}
    inputs: tuple[Tensor, ...] = ()
    output: Tensor | None = None

    @property
    def package(self) -> str:
        return f"lcikernels.ops.{self.op}"


def launcher(op: str):
    """The module that launches an op's kernels, and its step's."""
    return backends.load(op, "triton")


def named(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def along(tokens: bool, T: int, X: int, dtype: torch.dtype) -> Tensor:
    """[1, T, X] whose tokens, or else whose channels, lie beside each other."""
    return torch.zeros(1, X, T, dtype=dtype).mT if tokens else torch.zeros(1, T, X, dtype=dtype)


def scans(N: int, dtype: torch.dtype, full: bool, segments: int, tokens: bool = False) -> Case:
    """tokens: what lies along them, and z is half of a projection."""
    T, D, scan = 64 if tokens else 4, 64, launcher("selective_scan")
    x, b = along(tokens, T, D, dtype), along(tokens, T, N, dtype)
    a, d, state = torch.zeros(D, N), torch.zeros(D), torch.zeros(2, D, N)
    z, bounds = torch.zeros(1, T, 2 * D, dtype=dtype)[..., D:] if tokens else x, torch.tensor([0, 1, T]).int()
    if not full:
        d = z = state = bounds = None
    inputs = x, x, a, b, b, d, z, d, full, state, bounds
    token = [u if u is None or u.dim() < 3 else u[:, 0] for u in (x, x, a, b, b, d, z, d)]
    checkpoints, final = torch.zeros(1, D, N), torch.zeros(2 if full else 1, D, N)
    states, rows = (final.to(dtype), torch.zeros(1, dtype=torch.int32)) if full else (final, None)
    calls = {
        "forward": lambda: scan.forward(*inputs, scan.CHUNK),
        "backward": lambda: scan.backward(x, final, *inputs, checkpoints, scan.CHUNK),
        "step": lambda: scan.step(*token, full, states, rows),
        "crossing": lambda: scan.crossing(x, x, a, b, d, full),
        "crossing back": lambda: scan.crossing_back(x, x, a, b, z, d, full),
    }
    what = f"N={N} {named(dtype)}, {'all' if full else 'bare'}"
    what += ", in segments" * (segments > 1) + ", [B, D, T]" * tokens
    return Case("selective_scan", what, calls, {"cut": lambda *_: T // segments})


def convolutions(W: int, dtype: torch.dtype, full: bool, tokens: bool = False) -> Case:
    T, D, conv = 64 if tokens else 4, 64, launcher("causal_conv1d")
    x, weight = along(tokens, T, D, dtype), torch.zeros(D, W)
    bias, state, bounds = torch.zeros(D), torch.zeros(2, D, W - 1), torch.tensor([0, 1, T], dtype=torch.int32)
    filters = (weight, bias, "silu") if full else (weight, None, None)
    states = (state, bounds) if full else (None, None)
    held = (state.to(dtype), bounds[:1], bounds[:1].long()) if full else (state[:1], None, None)
    calls = {
        "forward": lambda: conv.forward(x, *filters, *states),
        "backward": lambda: conv.backward(x, state if full else None, x, *filters, *states),
        "step": lambda: conv.step(x[:, 0], *filters, *held),
    }
    what = f"W={W} {named(dtype)}, {'all' if full else 'bare'}" + ", [B, D, T]" * tokens
    return Case("causal_conv1d", what, calls)


def norms(D: int, dtype: torch.dtype, kind: str, gate: str) -> Case:
    """Two groups with weight and bias. gate: where it is; bare: nothing but x; Mamba-2: as there, in one
    group without a bias."""
    norm, options = launcher("gated_rms_norm"), (gate == "after", "silu", kind)
    x = torch.zeros(8, 2 * D, dtype=dtype)
    inputs, groups = (x, x, *torch.zeros(2, 2 * D)), 2
    if gate == "bare":
        inputs = (x, None, None, None)
    elif gate == "Mamba-2":
        inputs, groups = (x[:, :D], x[:, :D], torch.zeros(D), None), 1
    calls = {
        "forward": lambda: norm.forward(*inputs, 1e-5, groups, *options),
        "backward": lambda: norm.backward(inputs[0], *inputs, 1e-5, groups, *options),
    }
    return Case("gated_rms_norm", f"D={D} {named(dtype)}, {kind}, {gate}", calls)


def retentions(K: int, V: int, dtype: torch.dtype, kind: str) -> Case:
    """cut: into segments; all: what else is optional, or nothing of it."""
    T, retention = 128, launcher("retention")
    q, v = torch.zeros(1, T, 2, K, dtype=dtype), torch.zeros(1, T, 2, V, dtype=dtype)
    rates, states, bounds, learned = torch.zeros(2), None, None, kind in ("all", "learned")
    if kind == "all":
        rates, states = torch.zeros(1, T, 2), torch.zeros(2, 2, K, V)
        bounds = torch.tensor([0, 1, T], dtype=torch.int32)
    held, rows = torch.zeros(1, 2, K, V), None
    if kind == "all":
        held, rows = torch.zeros(3, 2, V, K, dtype=dtype).mT, torch.zeros(1, dtype=torch.int64)
    calls = {
        "forward": lambda: retention.forward(q, q, v, rates, 0.5, states, bounds),
        "backward": lambda: retention.backward(v, states, q, q, v, rates, 0.5, states, bounds, learned),
        "crossing": lambda: retention.crossing(q, v, rates),
        "crossing back": lambda: retention.crossing_back(q, v, rates, 0.5),
        "step": lambda: retention.step(q[:, 0], q[:, 0], v[:, 0], torch.zeros(2), held, 0.5, rows),
    }
    segment = {"segment": lambda T, *_: T // 2 if kind == "cut" and T > 1 else T + 1}
    return Case("retention", f"K={K} V={V} {named(dtype)}, {kind}", calls, segment)


SCANS = [(N, BFLOAT16) for N in (1, 3, 9, 16, 32, 64, 100, 128, 256)] + [(16, FLOAT32), (16, FLOAT16)]
HEADS = [(256, 512, BFLOAT16, kind) for kind in ("bare", "cut", "learned", "all")]
HEADS += [(K, V, BFLOAT16, "bare") for K, V in ((64, 64), (128, 128))]
HEADS += [(K, V, BFLOAT16, "all") for K, V in ((128, 64), (60, 100), (320, 512))]
HEADS += [(128, 128, dtype, "all") for dtype in (FLOAT16, FLOAT32)]
FORMULAS = [(kind, gate) for kind in ("rms", "layer") for gate in ("bare", "after", "first")]
FORMULAS += [("rms", "Mamba-2")]
NORMS = [(D, BFLOAT16) for D in (64, 256, 300, 1536, 4096, 5000)] + [(4096, FLOAT32)]


def proven() -> Iterator[Case]:
    yield from (scans(*x, full, cut) for x in SCANS for full in (True, False) for cut in (1, 2))
    yield scans(16, BFLOAT16, True, 1, True)
    both = itertools.product((2, 3, 4, 6), (False, True))
    yield from (convolutions(W, BFLOAT16, True, tokens) for W, tokens in both)
    yield from (convolutions(4, dtype, False, True) for dtype in (BFLOAT16, FLOAT32))
    yield from (convolutions(4, *case) for case in ((FLOAT32, True), (BFLOAT16, False)))
    yield from (norms(*x, *formula) for x in NORMS for formula in FORMULAS)
    yield from (retentions(*case) for case in HEADS)


def tensor(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    """Without memory: launchers only look at its shape."""
    return torch.empty(*shape, dtype=dtype, device="meta")


half = partial(tensor, dtype=BFLOAT16)


def timed_scan(B: int, T: int, D: int, N: int) -> Case:
    """With all that Mamba has."""
    scan = launcher("selective_scan")
    x, dt, z, dy, b, c = (half(B, T, X) for X in (D, D, D, D, N, N))
    a, d, bias = tensor(D, N), tensor(D), tensor(D)
    inputs = x, dt, a, b, c, d, z, bias, True, None, None
    kept = tensor(checkpoints(B, T, scan.CHUNK, "triton"), D, N)
    calls = {
        "forward": lambda: scan.forward(*inputs, 0),
        "backward": lambda: scan.backward(dy, None, *inputs, kept, scan.CHUNK),
    }
    sizes, tensors = {"B": B, "T": T, "D": D, "N": N}, (x, dt, z, a, b, c, d, bias)
    return Case("selective_scan", "", calls, {}, sizes, tensors, x)


def timed_retention(B: int, T: int, H: int, K: int, V: int, G: int | None = None) -> Case:
    """RetNet's. G: Mamba-2's, G heads of q and k, learned decays [B, T, H]."""
    retention = launcher("retention")
    q, k, v, do = half(B, T, G or H, K), half(B, T, G or H, K), half(B, T, H, V), half(B, T, H, V)
    rates = tensor(B, T, H) if G else tensor(H)
    inputs = q, k, v, rates, 0.5, None, None
    calls = {
        "forward": lambda: retention.forward(*inputs),
        "backward": lambda: retention.backward(do, None, *inputs, bool(G)),
    }
    sizes = {"B": B, "T": T, "H": H, "K": K, "V": V} | ({"G": G} if G else {})
    return Case("retention", "", calls, {}, sizes, (q, k, v, rates), v)


def timed_convolution(B: int, T: int, D: int, W: int) -> Case:
    conv, x, dy = launcher("causal_conv1d"), half(B, T, D), half(B, T, D)
    filters = tensor(D, W), tensor(D)
    calls = {
        "forward": lambda: conv.forward(x, *filters, "silu", None, None),
        "backward": lambda: conv.backward(dy, None, x, *filters, "silu", None, None),
    }
    return Case("causal_conv1d", "", calls, {}, {"B": B, "T": T, "D": D, "W": W}, (x, *filters), x)


def timed_norm(B: int, T: int, D: int) -> Case:
    norm, (x, gate, dy), weight = launcher("gated_rms_norm"), (half(B * T, D) for _ in range(3)), tensor(D)
    inputs = x, gate, weight, None
    calls = {
        "forward": lambda: norm.forward(*inputs, 1e-5, 1, True, "silu", "rms"),
        "backward": lambda: norm.backward(dy, *inputs, 1e-5, 1, True, "silu", "rms"),
    }
    return Case("gated_rms_norm", "", calls, {}, {"B": B, "T": T, "D": D}, (x, gate, weight), x)


def timed_steps(B: int) -> Iterator[Case]:
    """One token of a batch, as bench_gpu.py times it."""
    scan, retention = launcher("selective_scan"), launcher("retention")
    x, dt, z, a, b, c = (
        half(B, 4096),
        half(B, 4096),
        half(B, 4096),
        tensor(4096, 16),
        half(B, 16),
        half(B, 16),
    )
    d, bias, state = tensor(4096), tensor(4096), tensor(B, 4096, 16)
    step = {"one token": lambda: scan.step(x, dt, a, b, c, d, z, bias, True, state, None)}
    tensors = x, dt, z, a, b, c, d, bias, state
    yield Case("selective_scan", "", step, {}, {"B": B, "D": 4096, "N": 16}, tensors, x)
    q, k, v, rates, held = (
        half(B, 8, 256),
        half(B, 8, 256),
        half(B, 8, 512),
        tensor(8),
        tensor(B, 8, 256, 512),
    )
    step = {"one token": lambda: retention.step(q, k, v, rates, held, 0.5, None)}
    sizes = {"B": B, "H": 8, "K": 256, "V": 512}
    yield Case("retention", "", step, {}, sizes, (q, k, v, rates, held), v)


def predicted() -> Iterator[Case]:
    yield timed_scan(8, 4096, 2048, 16)
    heads = (8, 4096, 8, 256, 512), (4, 2048, 16, 128, 128), (8, 1024, 8, 64, 64), (8, 4096, 24, 128, 64, 1)
    yield from (timed_retention(*sizes) for sizes in heads)
    yield timed_convolution(8, 4096, 2048, 4)
    yield timed_norm(8, 4096, 2048)
    yield from timed_steps(64)
