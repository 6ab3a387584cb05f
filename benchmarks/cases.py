"""What is measured, on a CPU and on a GPU: every case, and the targets it is held to."""

from typing import NamedTuple

FORWARD, TRAINING, BACKWARD = "forward", "forward + backward", "backward"
DECODING, IN_A_ROW = "one token", "forward, called in a row"
BOTH, ALL = (FORWARD, TRAINING), (FORWARD, BACKWARD, TRAINING)

SCAN = {"B": 1, "T": 2048, "D": 1536, "N": 16}  # one layer of mamba-130m
SHORT_SCAN = {**SCAN, "T": 512}
MAMBA_SSM = {"B": 8, "T": 4096, "D": 2048, "N": 16}  # a layer of mamba-1.4b as it trains
MAMBA_PACKED = {**MAMBA_SSM, "B": 1, "T": 8 * 4096}
STEP = {"B": 1, "D": 1536, "N": 16}
RETENTION = {"B": 2, "T": 2048, "H": 4, "K": 128, "V": 256}
RETENTION_STEP = {"B": 1, "H": 4, "K": 128, "V": 256}
RETNET = {"B": 8, "T": 4096, "H": 8, "K": 256, "V": 512}
MAMBA2_RETENTION = {"B": 1, "T": 2048, "H": 24, "K": 128, "V": 64, "G": 1}  # q and k of one head
MAMBA2 = {"B": 1, "T": 2048, "H": 24, "P": 64, "N": 128}  # one layer of mamba2-130m
ATTENTION = {"B": 4, "T": 2048, "H": 16, "K": 128, "V": 128}
LITTLE = {"B": 1, "T": 256, "H": 8, "K": 64, "V": 64}
CONV, MAMBA_CONV = ({"B": B, "T": T, "D": D, "W": 4} for B, T, D in ((1, 2048, 1536), (8, 4096, 2048)))
NORM, MAMBA_NORM = ({"B": B, "T": T, "D": D} for B, T, D in ((1, 2048, 1536), (8, 4096, 2048)))
HEAD_NORM = {"B": 2, "T": 2048, "H": 4, "D": 256}  # retention's output: each head is normed, no weight
# The rows of the table that flash-linear-attention publishes of its retention on a GPU
FLA = [
    {"B": B, "T": T, "H": H, "K": D, "V": D}
    for B, T, H, D in (
        (8, 1024, 8, 64), (4, 2048, 16, 128), (2, 16384, 16, 128), (1, 8192, 96, 128), (4, 4096, 64, 128),
        (8, 2048, 32, 256),
    )
]  # fmt: skip
PUBLISHED = FLA[4::-1]  # but for 256; the one for its tiles first
BERT = {"L1": 6, "L2": 12, "m": 512, "n": 512, "M": 768, "N": 768}  # Small to Base: queries, ..., outputs
BERT_UP, BERT_DOWN = {**BERT, "m": 2048, "M": 3072}, {**BERT, "n": 2048, "N": 3072}
ONE_LAYER = {**BERT_UP, "L2": 1}  # as a block makes it
GPT2 = {"L1": 12, "L2": 24, "m": 768, "n": 768, "M": 1024, "N": 1024}  # Base to Medium
GPT2_UP = {**GPT2, "m": 3072, "M": 4096}
EXPANSIONS = BERT, BERT_UP, BERT_DOWN, ONE_LAYER, GPT2, GPT2_UP
# As many old layers as new ones: the order that saves products is the one that our kernels take.
DENSE = {"L1": 8, "L2": 8, "m": 2048, "n": 2048, "M": 4096, "N": 4096}


class Case(NamedTuple):
    """`ours` against `rival`, both sides of `op` in `sides.py`, at one shape.

    targets: rival's time over ours is `ratio` or more; ours takes at most `ms` and `mb`, or `memory`, and
    reaches `percent` of the floor's speed. minutes: the rival is so slow that it runs twice. sweep: the sizes
    that grow in a table of its own; one alone also in a plot. table, label: the table's name and the row's,
    where sizes do not say it.
    """

    op: str
    sizes: dict[str, int]
    mode: str
    rival: str | None = None
    ours: str = "ours"
    targets: dict[str, float] = {}
    minutes: bool = False
    sweep: str = ""
    table: str = ""
    label: str = ""

    @property
    def shape(self) -> str:
        """Of a table, whose rows have it in common."""
        sizes = {name: size for name, size in self.sizes.items() if name not in self.sweep.split()}
        return self.table or shown(sizes)

    @property
    def row(self) -> str:
        """What a row is called."""
        row = self.label or shown({name: self.sizes[name] for name in self.sweep.split()})
        return f"{row} {self.mode}".strip()

    def __str__(self) -> str:
        sides = self.ours, "vs", self.rival or "none"
        return "-".join((self.op, self.mode, *sides, shown(self.sizes))).replace(" ", "_")


def shown(sizes: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def cases(
    op: str, sizes: dict[str, int], modes: str | tuple[str, ...], *rivals: str, **options: object
) -> list[Case]:
    """Every rival, or none, in every mode. options: fields of a case; all others are targets."""
    fields = {name: options.pop(name) for name in Case._fields if name in options}
    modes = (modes,) if isinstance(modes, str) else modes
    each = [(mode, rival) for rival in rivals or (None,) for mode in modes]
    return [Case(op, sizes, mode, rival, targets=options, **fields) for mode, rival in each]


def sweep(op: str, sizes: dict[str, int], axis: str, values: range | tuple, *rivals: str) -> list[Case]:
    return [x for value in values for x in cases(op, {**sizes, axis: value}, BOTH, *rivals, sweep=axis)]


def doubled(first: int, count: int) -> tuple[int, ...]:
    return tuple(first << i for i in range(count))


# Targets of ours beside ours
GATED, AVX2 = 1 / 1.4, 1 / 2.2  # softplus, bias and gate cost at most 1.4x; half the lanes at most 2.2x
TURNED = 1 / 1.25  # where tensors are [B, D, T] in memory
THREADS = 1.85  # by two threads
HALVED = 1.8  # by products of bfloat16, where the processor has them


def floors(op: str, sizes: dict[str, int], *percents: float) -> list[Case]:
    """How near the machine's limits ours is, beside the same on one of its threads."""
    rival, modes = "ours, one thread", zip(BOTH, percents)
    return [x for mode, least in modes for x in cases(op, sizes, mode, rival, ratio=THREADS, percent=least)]


def variants(op: str, sizes: dict[str, int], **ratios: float) -> list[Case]:
    """Ours otherwise, beside ours."""
    each = (cases(op, sizes, BOTH, "ours", ours=f"ours, {name}", ratio=x) for name, x in ratios.items())
    return [case for two in each for case in two]


INSIDE = "a Mamba-2 layer without its projections"
CPU = [
    *floors("selective_scan", SCAN, 80, 65),
    *floors("selective_scan", SHORT_SCAN, 80, 65),
    *floors("retention", RETENTION, 80, 72),
    *floors("causal_conv1d", CONV, 85, 85),
    *floors("gated_rms_norm", NORM, 85, 85),
    *cases("selective_scan", SCAN, FORWARD, "transformers' loop", ratio=230, mb=13),
    *cases("selective_scan", SCAN, FORWARD, "compiled associative scan", ratio=100),
    *cases("selective_scan", SCAN, TRAINING, "compiled associative scan", ratio=90, ms=12, mb=70),
    *cases("selective_scan", MAMBA_SSM, BOTH),
    *sweep("selective_scan", SCAN, "T", doubled(256, 7)),
    *sweep("selective_scan", SCAN, "D", (64, 256, 768, 1536, 3072)),
    *sweep("selective_scan", SCAN, "N", doubled(4, 6)),
    *cases("selective_scan", SHORT_SCAN, BOTH, "accelerated-scan's reference"),
    *cases("selective_scan", SCAN, FORWARD, "mambapy"),
    *cases("selective_scan", SCAN, TRAINING, "mambapy", ratio=250),
    *cases("selective_scan", SCAN, BOTH, "ours in torch"),
    *variants("selective_scan", SCAN, gated=GATED),
    *cases("selective_scan", SCAN, BOTH, "ours, gated", ours="ours, gated, channels first", ratio=TURNED),
    *variants("selective_scan", SCAN, bfloat16=1, AVX2=AVX2),
    *cases("selective_scan", SHORT_SCAN, FORWARD, "transformers' loop"),
    *cases("selective_scan", SHORT_SCAN, TRAINING, "transformers' loop", ratio=4500, minutes=True),
    *variants("selective_scan", SHORT_SCAN, gated=GATED),
    *cases("selective_scan_step", STEP, FORWARD, "transformers' step"),
    *cases("selective_scan_step", STEP, FORWARD, "ours", ours="ours, from C++", ms=0.015),
    *cases("retention", RETENTION, FORWARD, "chunks of 128", ratio=4),
    *cases("retention", RETENTION, TRAINING, "chunks of 128", ratio=4.1, mb=50),
    *cases("retention", RETENTION, BOTH, "flash-linear-attention's torch"),
    *(x for sizes in FLA for x in cases("retention", sizes, BOTH, "chunks of 128", sweep="B T H K V")),
    *(x._replace(sweep="B T H K V") for sizes in FLA for x in variants("retention", sizes, bfloat16=HALVED)),
    *sweep("retention", {**RETENTION, "B": 1}, "T", doubled(256, 7), "chunks of 128"),
    *sweep("retention", RETENTION, "H", doubled(1, 5)),
    *cases("retention", {**RETENTION, "T": 4096}, BOTH),
    *cases("retention", MAMBA2_RETENTION, BOTH),
    *cases("retention", RETENTION, BOTH, "chunks of 512", "parallel", "ours in torch"),
    *variants("retention", RETENTION, bfloat16=HALVED, AVX2=AVX2),
    *cases("retention_step", RETENTION_STEP, FORWARD, "ours in torch"),
    *cases("causal_conv1d", CONV, BOTH, "transformers' convolution", "ours in torch"),
    *(x for T in (16384, 4) for x in cases("causal_conv1d", {**CONV, "T": T}, FORWARD)),
    *variants("causal_conv1d", CONV, **{"channels first": TURNED, "bfloat16": 1, "AVX2": AVX2}),
    *cases("gated_rms_norm", NORM, BOTH, "plain torch"),
    *(x for T in (16384, 4) for x in cases("gated_rms_norm", {**NORM, "T": T}, FORWARD)),
    *variants("gated_rms_norm", NORM, bfloat16=1, AVX2=AVX2),
    *cases("gated_rms_norm", HEAD_NORM, BOTH, "plain torch"),
    *cases("gated_rms_norm, the gate first", NORM, BOTH, "plain torch"),
    *(
        x
        for sizes in EXPANSIONS
        for rival in ("layers widened, then mixed", "layers mixed, then widened", "new units alone")
        for x in cases("kronecker_expand", sizes, BOTH, rival, ratio=2, percent=70)
    ),
    *cases("a Mamba-2 layer", MAMBA2, FORWARD, "transformers"),
    *cases("a Mamba-2 layer", MAMBA2, TRAINING, "transformers", ratio=10),
    *cases("a Mamba-2 layer", MAMBA2, BOTH, "transformers", ours="transformers, patched"),
    *cases(INSIDE, MAMBA2, BOTH, "transformers"),
    *cases(INSIDE, MAMBA2, FORWARD, "transformers", ours="transformers, patched"),
    *cases(INSIDE, MAMBA2, TRAINING, "transformers", ours="transformers, patched", ratio=7),
]


def decoding(op: str, size: dict[str, int], *rivals: str) -> list[Case]:
    many, one, rivals = {"B": 64, **size}, {"B": 1, **size}, (*rivals, "ours in torch")
    return cases(op, many, DECODING, *rivals, percent=100 / 1.5) + cases(op, one, DECODING, *rivals)


def channels_first(op: str, sizes: dict[str, int], package: str) -> list[Case]:
    given = op, sizes, BOTH
    beside = cases(*given, "ours", ours="ours, [B, D, T]", ratio=TURNED)
    return beside + cases(*given, package, ours="ours, [B, D, T]")


def published(sizes: dict[str, int]) -> list[Case]:
    row, table = "B={B} T={T} H={H} K=V={K}".format(**sizes), "flash-linear-attention's own shapes"
    return cases("retention", sizes, BOTH, "flash-linear-attention", ratio=1, table=table, label=row)


def expansions(sizes: dict[str, int]) -> list[Case]:
    """Against LiGO's equation in both orders; and against its code, which multiplies no identity either."""
    orders = "layers mixed, then widened", "layers widened, then mixed"
    return [
        *cases("kronecker_expand", sizes, FORWARD, *orders, ratio=5, memory=1.1),
        *cases("kronecker_expand", sizes, (BACKWARD, TRAINING), *orders, ratio=5),
        *cases("kronecker_expand", sizes, TRAINING, "new units alone", "ours in torch"),
    ]


def growing(table: str, **rows: dict[str, int]) -> list[Case]:
    return [
        Case("selective_scan", {**MAMBA_SSM, **sizes}, mode, table=table, label=name)
        for mode in (FORWARD, BACKWARD)
        for name, sizes in rows.items()
    ]


GPU = [
    *cases("selective_scan", MAMBA_SSM, FORWARD, "mamba-ssm", ratio=2),
    *cases("selective_scan", MAMBA_SSM, BACKWARD, "mamba-ssm", ratio=2.5),
    *cases("selective_scan", MAMBA_SSM, TRAINING, "mamba-ssm"),
    *cases("selective_scan", MAMBA_SSM, FORWARD, "ours in torch", first_ms=0.50, ms=0.42),
    *cases("selective_scan", MAMBA_SSM, BACKWARD, "ours in torch", first_ms=1.2, ms=0.95),
    *cases("selective_scan", MAMBA_SSM, TRAINING, "ours in torch", memory=1.2),
    *cases("selective_scan", MAMBA_PACKED, (FORWARD, BACKWARD), "ours, 8 rows", ours="ours, packed"),
    *cases("causal_conv1d", MAMBA_CONV, ALL, "causal-conv1d", "ours in torch"),
    *channels_first("selective_scan", MAMBA_SSM, "mamba-ssm"),
    *channels_first("causal_conv1d", MAMBA_CONV, "causal-conv1d"),
    *cases("gated_rms_norm", MAMBA_NORM, ALL, "ours in torch"),
    *decoding("selective_scan_step", {"D": 4096, "N": 16}, "mamba-ssm"),
    *decoding("causal_conv1d_step", {"D": 4096, "W": 4}, "causal-conv1d"),
    *cases("retention", RETNET, FORWARD, "ours in torch", first_ms=0.50, ms=0.36),
    *cases("retention", RETNET, BACKWARD, "ours in torch", first_ms=1.2, ms=0.90),
    *cases("retention", ATTENTION, BOTH, "causal attention", ratio=1),
    *cases("retention", {**ATTENTION, "T": 8192}, BOTH, "causal attention", ratio=1),
    *cases("retention", {**MAMBA2_RETENTION, "B": 8, "T": 4096}, ALL, "ours in torch"),
    *cases("retention", LITTLE, IN_A_ROW, ms=0.06),
    *decoding("retention_step", {"H": 8, "K": 256, "V": 512}),
    *cases("retention", RETNET, FORWARD, "flash-linear-attention", ratio=1.5),
    *cases("retention", RETNET, BACKWARD, "flash-linear-attention"),
    *cases("retention", RETNET, TRAINING, "flash-linear-attention", ratio=2.5),
    *(x for sizes in PUBLISHED for x in published(sizes)),
    *cases("retention", LITTLE, IN_A_ROW, "flash-linear-attention"),
    *(x for sizes in EXPANSIONS for x in expansions(sizes)),
    *cases("kronecker_expand, dense maps", DENSE, FORWARD, "ours in torch", percent=60, memory=1.1),
    *cases("kronecker_expand, dense maps", DENSE, (BACKWARD, TRAINING), "ours in torch", percent=60),
    *growing("T grows, B T = 32768 or B = 1, D=2048 N=16", **{
        f"T={T}": {"B": max(1, 32768 // T), "T": T} for T in doubled(512, 8)
    }),
    *growing("B D grows, T=4096 N=16", **{
        f"B D={BD}": {"B": max(1, BD // 2048), "D": min(BD, 2048)} for BD in doubled(1024, 7)
    }),
]  # fmt: skip
