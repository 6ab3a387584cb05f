"""What is measured: every case, the least work it can take, and the target it is held to."""

from typing import NamedTuple

FORWARD, TRAINING = "forward", "forward + backward"

SCAN = {"B": 1, "T": 2048, "D": 1536, "N": 16}  # one layer of mamba-130m
SHORT_SCAN = {**SCAN, "T": 512}
RETENTION = {"B": 2, "T": 2048, "H": 4, "K": 128, "V": 256}
RETENTION_STEP = {"B": 1, "H": 4, "K": 128, "V": 256}
STEP = {"B": 1, "D": 1536, "N": 16}
CONV = {"B": 1, "T": 2048, "D": 1536, "W": 4}
HEAD_NORM = {"B": 2, "T": 2048, "H": 4, "D": 256}  # retention's output: each head is normed, no weight
NORM = {"B": 1, "T": 2048, "D": 1536}
BERT = {"L1": 6, "L2": 12, "m": 512, "n": 512, "M": 768, "N": 768}  # Small to Base: queries, ..., outputs
BERT_UP = {**BERT, "m": 2048, "M": 3072}
BERT_DOWN = {**BERT, "n": 2048, "N": 3072}
ONE_LAYER = {**BERT_UP, "L2": 1}  # as a block makes it
GPT2 = {"L1": 12, "L2": 24, "m": 768, "n": 768, "M": 1024, "N": 1024}  # Base to Medium
GPT2_UP = {**GPT2, "m": 3072, "M": 4096}
MAMBA2 = {"B": 1, "T": 2048, "H": 24, "P": 64, "N": 128}  # one layer of mamba2-130m
# The rows of the table that flash-linear-attention publishes of its retention on a GPU
FLA = [
    {"B": B, "T": T, "H": H, "K": D, "V": D}
    for B, T, H, D in (
        (8, 1024, 8, 64),
        (4, 2048, 16, 128),
        (2, 16384, 16, 128),
        (1, 8192, 96, 128),
        (4, 4096, 64, 128),
        (8, 2048, 32, 256),
    )
]
MAMBA_SSM = {"B": 8, "T": 4096, "D": 2048, "N": 16}  # a layer of mamba-1.4b as it trains


class Case(NamedTuple):
    """`ours` against `rival`, both sides of `op` in `sides.py`, at one shape.

    The targets: rival's time over ours is `ratio` or more; ours takes at most `ms` and `mb`, and reaches
    `percent` of the floor's speed. None: measured only. `minutes`: the rival is so slow that it runs twice.
    sweep: the size that grows in a table of its own, and in a plot.
    """

    op: str
    sizes: dict[str, int]
    mode: str
    rival: str | None = None
    ours: str = "ours"
    ratio: float | None = None
    ms: float | None = None
    percent: float | None = None
    mb: float | None = None
    minutes: bool = False
    sweep: str = ""

    @property
    def targets(self) -> dict[str, float | None]:
        return {"ratio": self.ratio, "ms": self.ms, "percent": self.percent, "mb": self.mb}

    @property
    def shape(self) -> str:
        """Of a table, whose rows have it in common."""
        return shown({name: size for name, size in self.sizes.items() if name not in self.sweep.split()})

    @property
    def row(self) -> str:
        return shown({name: self.sizes[name] for name in self.sweep.split()})

    def __str__(self) -> str:
        sides = self.ours, "vs", self.rival or "none"
        return "-".join((self.op, self.mode, *sides, shown(self.sizes))).replace(" ", "_")


def shown(sizes: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def both(op: str, sizes: dict[str, int], rival: str | None = None, **options) -> list[Case]:
    return [Case(op, sizes, mode, rival, **options) for mode in (FORWARD, TRAINING)]


def sweep(op: str, sizes: dict[str, int], axis: str, *values: int, **options) -> list[Case]:
    return [case for value in values for case in both(op, {**sizes, axis: value}, sweep=axis, **options)]


def floors(op: str, sizes: dict[str, int], forward: float, training: float, **options) -> list[Case]:
    """How near the machine's limits ours is, beside the same on one of its threads."""
    return [
        Case(op, sizes, mode, "ours, one thread", percent=percent, ratio=THREADS, **options)
        for mode, percent in ((FORWARD, forward), (TRAINING, training))
    ]


GATED, AVX2 = 1 / 1.4, 1 / 2.2  # softplus, bias and gate cost at most 1.4x; half the lanes at most 2.2x
TURNED = 1 / 1.25  # where tensors are [B, D, T] in memory
THREADS = 1.85  # by two threads
HALVED = 1.8  # by products of bfloat16, where the processor has them
CASES = [
    *floors("selective_scan", SCAN, 80, 65),
    *floors("selective_scan", SHORT_SCAN, 80, 65),
    *floors("retention", RETENTION, 80, 72),
    *floors("causal_conv1d", CONV, 85, 85),
    *floors("gated_rms_norm", NORM, 85, 85),
    Case("selective_scan", SCAN, FORWARD, "transformers' loop", ratio=230, mb=13),
    Case("selective_scan", SCAN, FORWARD, "compiled associative scan", ratio=100),
    Case("selective_scan", SCAN, TRAINING, "compiled associative scan", ratio=90, ms=12, mb=70),
    *both("selective_scan", MAMBA_SSM),
    *sweep("selective_scan", SCAN, "T", *(256 << i for i in range(7))),
    *sweep("selective_scan", SCAN, "D", 64, 256, 768, 1536, 3072),
    *sweep("selective_scan", SCAN, "N", 4, 8, 16, 32, 64, 128),
    Case("selective_scan", SHORT_SCAN, FORWARD, "accelerated-scan's reference"),
    Case("selective_scan", SHORT_SCAN, TRAINING, "accelerated-scan's reference"),
    Case("selective_scan", SCAN, FORWARD, "mambapy"),
    Case("selective_scan", SCAN, TRAINING, "mambapy", ratio=250),
    *both("selective_scan", SCAN, "ours in torch"),
    *both("selective_scan", SCAN, "ours", ours="ours, gated", ratio=GATED),
    *both("selective_scan", SCAN, "ours, gated", ours="ours, gated, channels first", ratio=TURNED),
    *both("selective_scan", SCAN, "ours", ours="ours, bfloat16", ratio=1),
    *both("selective_scan", SCAN, "ours", ours="ours, AVX2", ratio=AVX2),
    Case("selective_scan", SHORT_SCAN, FORWARD, "transformers' loop"),
    Case("selective_scan", SHORT_SCAN, TRAINING, "transformers' loop", ratio=4500, minutes=True),
    *both("selective_scan", SHORT_SCAN, "ours", ours="ours, gated", ratio=GATED),
    Case("selective_scan_step", STEP, FORWARD, "transformers' step"),
    Case("selective_scan_step", STEP, FORWARD, "ours", ours="ours, from C++", ms=0.015),
    Case("retention", RETENTION, FORWARD, "chunks of 128", ratio=4),
    Case("retention", RETENTION, TRAINING, "chunks of 128", ratio=4.1, mb=50),
    *both("retention", RETENTION, "flash-linear-attention's torch"),
    *(case for sizes in FLA for case in both("retention", sizes, "chunks of 128", sweep="B T H K V")),
    *(
        case
        for sizes in FLA
        for case in both("retention", sizes, "ours", ours="ours, bfloat16", sweep="B T H K V", ratio=HALVED)
    ),
    *sweep("retention", {**RETENTION, "B": 1}, "T", *(256 << i for i in range(7)), rival="chunks of 128"),
    *sweep("retention", RETENTION, "H", 1, 2, 4, 8, 16),
    *both("retention", RETENTION, "chunks of 512"),
    *both("retention", RETENTION, "parallel"),
    *both("retention", RETENTION, "ours in torch"),
    *both("retention", RETENTION, "ours", ours="ours, bfloat16", ratio=HALVED),
    *both("retention", RETENTION, "ours", ours="ours, AVX2", ratio=AVX2),
    Case("retention_step", RETENTION_STEP, FORWARD, "ours in torch"),
    *both("causal_conv1d", CONV, "transformers' convolution"),
    *both("causal_conv1d", CONV, "ours in torch"),
    *both("causal_conv1d", CONV, "ours", ours="ours, channels first", ratio=TURNED),
    *both("causal_conv1d", CONV, "ours", ours="ours, bfloat16", ratio=1),
    *both("causal_conv1d", CONV, "ours", ours="ours, AVX2", ratio=AVX2),
    *both("gated_rms_norm", NORM, "plain torch"),
    *both("gated_rms_norm", NORM, "ours", ours="ours, bfloat16", ratio=1),
    *both("gated_rms_norm", NORM, "ours", ours="ours, AVX2", ratio=AVX2),
    *both("gated_rms_norm", HEAD_NORM, "plain torch"),
    *both("gated_rms_norm, the gate first", NORM, "plain torch"),
    *(
        case
        for sizes in (BERT, BERT_UP, BERT_DOWN, ONE_LAYER, GPT2, GPT2_UP)
        for rival in ("layers widened, then mixed", "layers mixed, then widened", "new units alone")
        for case in both("kronecker_expand", sizes, rival, ratio=2, percent=70)
    ),
    Case("a Mamba-2 layer", MAMBA2, FORWARD, "transformers"),
    Case("a Mamba-2 layer", MAMBA2, TRAINING, "transformers", ratio=10),
    *both("a Mamba-2 layer", MAMBA2, "transformers", ours="transformers, patched"),
    *both("a Mamba-2 layer without its projections", MAMBA2, "transformers"),
    Case(
        "a Mamba-2 layer without its projections",
        MAMBA2,
        FORWARD,
        "transformers",
        ours="transformers, patched",
    ),
    Case(
        "a Mamba-2 layer without its projections",
        MAMBA2,
        TRAINING,
        "transformers",
        ours="transformers, patched",
        ratio=7,
    ),
]


class Work(NamedTuple):
    """The least a computation must do: bytes in and out of memory, flops through the FMA units."""

    bytes: float
    flops: float = 0


def work(op: str, mode: str, bytes_per_element: int, gated: bool, **sizes: int) -> Work:
    """The forward pass's, and the backward pass's on top of it where gradients are asked for."""
    forward, backward = WORK[op](bytes_per_element, gated, **sizes)
    if mode == FORWARD:
        return forward
    return Work(forward.bytes + backward.bytes, forward.flops + backward.flops)


def scan_work(element: int, gated: bool, B: int, T: int, D: int, N: int) -> tuple[Work, Work]:
    """Instructions of the FMA pipes, 2 flops each, for a state and token: exp2 takes 10, the forward pass 3
    on top; the backward takes 12 to have the states again and 8 for gradients."""
    stream, projected, states = element * B * T * D, element * 2 * B * T * N, B * T * D * N
    forward = Work((3 + gated) * stream + projected, 2 * 13 * states)
    return forward, Work((5 + 2 * gated) * stream + 2 * projected, 2 * 20 * states)


def retention_work(element: int, gated: bool, B: int, T: int, H: int, K: int, V: int) -> tuple[Work, Work]:
    """In chunks of 32 with the masked half of each block counted out; the backward recomputes states."""
    tokens, C = B * T * H, 32
    forward = Work(element * tokens * 2 * (K + V), tokens * (C * (K + V) + 4 * K * V))
    return forward, Work(element * tokens * (4 * K + 3 * V), tokens * (C * (3 * K + 2 * V) + 10 * K * V))


def conv_work(element: int, gated: bool, B: int, T: int, D: int, W: int) -> tuple[Work, Work]:
    stream = element * B * T * D
    return Work(2 * stream, 2 * W * B * T * D), Work(3 * stream, 4 * W * B * T * D)


def norm_work(element: int, gated: bool, B: int, T: int, D: int, H: int = 1) -> tuple[Work, Work]:
    stream = element * B * T * H * D
    return Work(3 * stream), Work(5 * stream)


def scan_step_work(element: int, gated: bool, B: int, D: int, N: int) -> tuple[Work]:
    return Work(4 * 2 * B * D * N, 2 * 13 * B * D * N), Work(0)


def retention_step_work(element: int, gated: bool, B: int, H: int, K: int, V: int) -> tuple[Work]:
    return Work(4 * 2 * B * H * K * V, 4 * B * H * K * V), Work(0)


def inside_work(element: int, gated: bool, B: int, T: int, H: int, P: int, N: int) -> tuple[Work, Work]:
    """Retention with q and k that heads share: the products of queries and keys are one head's work."""
    tokens, C, projected = B * T, 32, 2 * H * P + 2 * N + H
    forward = Work(element * tokens * (projected + H * P), tokens * (C * (N + H * P) + 4 * H * N * P))
    backward = tokens * (C * (3 * N + H * 2 * P) + 10 * H * N * P)
    return forward, Work(element * tokens * (2 * projected + H * P), backward)


def layer_work(element: int, gated: bool, B: int, T: int, H: int, P: int, N: int) -> tuple[Work, Work]:
    forward, backward = inside_work(element, gated, B, T, H, P, N)
    weights = H * P // 2 * (3 * H * P + 2 * N + H)
    streams, products = element * (B * T * H * P // 2 + weights), 2 * B * T * weights
    return tuple(
        Work(work.bytes + factor * streams, work.flops + factor * products)
        for factor, work in ((1, forward), (2, backward))
    )


def expansion_work(
    element: int, gated: bool, L1: int, L2: int, m: int, n: int, M: int, N: int
) -> tuple[Work, Work]:
    """The products of new units, the cheaper side first, of the mixed old layers, or of the old ones and then
    the mix, whichever is less; the backward has h = grad [I; read], the part s of [I; write]ᵀ grad, one
    product each for both maps and the mix, and depth's besides."""
    small, large, more_m, more_n = m * n, M * N, M - m, N - n
    forward = min(small * more_m + more_n * n * M, small * more_n + more_m * m * N)
    backward = M * n * more_n + m * more_m * more_n + small * (2 * more_m + more_n)
    read, out = element * (L1 * small + more_m * m + more_n * n), element * L2 * large
    mixes, orders = L1 * L2, ((small, L2), (large, L1))
    return (
        Work(read + out, fewest(mixes, forward, orders)),
        Work(2 * read + out, fewest(2 * mixes, backward, orders)),
    )


def fewest(mixes: int, widening: int, orders: tuple[tuple[int, int], ...]) -> int:
    """Flops of so many mixes of layers of a size, and of widening so many layers, in the cheaper order."""
    return 2 * min(mixes * size + layers * widening for size, layers in orders)


WORK = {
    "kronecker_expand": expansion_work,
    "selective_scan": scan_work,
    "selective_scan_step": scan_step_work,
    "retention": retention_work,
    "retention_step": retention_step_work,
    "causal_conv1d": conv_work,
    "gated_rms_norm": norm_work,
    "gated_rms_norm, the gate first": norm_work,
    "a Mamba-2 layer": layer_work,
    "a Mamba-2 layer without its projections": inside_work,
}
