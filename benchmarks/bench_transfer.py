"""What a transfer is for, on a CPU: a token after a long text, and a step of training, beside the source's.

A long prompt in chunks beside all of it at once; and what fitting a mixer to a layer's attention takes.

    python -m pytest benchmarks/bench_transfer.py           9 minutes; prints, and writes RESULTS.md
    ... -k "RetNet and token"                               some; prints only
    ... --small                                             does it run? Seconds; prints only

An answer is checked before it is timed. The source's cache has one size from the start, as
`generate(cache_implementation="static")` makes it: by itself transformers copies all of it for every token.
"""

from pathlib import Path

import pytest
from benchmarks.limits import Limits
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import transferred
from benchmarks.answers import wrong
from benchmarks.measure import Race, attempt
from benchmarks.transferred import PATTERNS, SMALL, Aligning, Size
from growth.training.flops import CPU_ATTENTION
from lcikernels.models.cache import state_bytes

FLAT = 1 / 1.1  # of a token's time after the shortest text
LINEAR = [name for name, pattern in PATTERNS.items() if "A" not in pattern]
MOST_SECONDS = 60
TRAINED = ["RetNet", "Mamba-2"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def size(request) -> Size:
    return SMALL if request.config.option.small else Size()


@pytest.fixture(scope="module")
def source(size, tmp_path_factory) -> Path:
    return transferred.source(size, tmp_path_factory.mktemp("transferred") / "source")


class Side:
    """A model that writes a token after so many others."""

    def __init__(self, folder: Path, context: int, size: Size):
        self.model, self.each = transferred.loaded(folder), size.decoded
        self.wrong = wrong(transferred.as_the_whole, self.model, size.decoded)
        self.cache = transferred.filled(self.model, context, size.decoded)
        self.call = transferred.decoding(self.model, self.cache, size.decoded)
        self.bytes = sum(state_bytes(self.cache))

    def floor(self, limits: Limits) -> float:
        return limits.floor(*transferred.least(self.model, self.bytes))


def raced(ours: Side, rival: Side, limits: Limits, benchmark) -> dict:
    """The columns that follow from the two sides."""
    race, each = Race(ours.call, rival.call), ours.each
    seconds, rival_seconds = race.run(benchmark)
    return dict(
        seconds=seconds / each,
        seconds_memory_kept=race.with_memory_kept() / each,
        rival_seconds=rival_seconds / each,
        floor=ours.floor(limits),
        mb=ours.bytes / 1e6,
        rival_mb=rival.bytes / 1e6,
        wrong=ours.wrong or rival.wrong,
    )


@pytest.mark.parametrize("place", range(len(Size().contexts)), ids=lambda i: f"after-{Size().contexts[i]}")
@pytest.mark.parametrize("name", PATTERNS)
def test_a_token_beside_the_source_s(name, place, size, source, limits, benchmark, record):
    if place >= len(size.contexts):
        pytest.skip("the small size has fewer")
    context = size.contexts[place]
    ours, rival = (Side(folder, context, size) for folder in (transferred.target(size, name, source), source))
    columns = raced(ours, rival, limits, benchmark)
    targets = {"ratio": 1.0} if place else {}
    record(
        op="a token, MB of state",
        shape=str(size),
        mode=f"after {context}",
        ours=name,
        rival="attention with its KV cache",
        targets=targets,
        **columns,
    )


@pytest.mark.parametrize("name", LINEAR)
def test_a_token_after_a_long_text_and_a_short_one(name, size, source, limits, benchmark, record):
    folder, (short, *_, long) = transferred.target(size, name, source), size.contexts
    columns = raced(Side(folder, long, size), Side(folder, short, size), limits, benchmark)
    record(
        op="a token, MB of state",
        shape=str(size),
        mode=f"after {long}",
        ours=name,
        rival=f"itself after {short}",
        targets={"ratio": FLAT, "mb": columns["rival_mb"]},
        **columns,
    )


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_of_training_beside_the_source_s(name, size, source, limits, benchmark, record):
    folder = transferred.target(size, name, source)
    said = wrong(transferred.as_in_float64, folder, 8 * transferred.PROMPT)
    calls = [transferred.training(transferred.loaded(x), size.trained) for x in (folder, source)]
    for call in calls:  # the first allocates the moments
        call()
    tries = [attempt(call) for call in calls]
    race = Race(*calls)
    seconds, rival_seconds = race.run(benchmark)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        calls[0]()
    record(
        op="a step of training",
        shape=f"{size} T={size.trained}",
        mode="forward + backward + AdamW",
        ours=name,
        rival="attention",
        seconds=seconds,
        seconds_memory_kept=race.with_memory_kept(),
        rival_seconds=rival_seconds,
        floor=counter.get_total_flops() / limits.sgemm,
        mb=tries[0].mb,
        rival_mb=tries[1].mb,
        targets={"ratio": 1.0},
        wrong=said,
    )


@pytest.mark.parametrize("name", LINEAR)
def test_a_long_prompt_in_chunks_beside_all_at_once(name, size, source, limits, benchmark, record):
    model = transferred.loaded(transferred.target(size, name, source))
    ours, rival = (transferred.reading(model, size.prompt, chunk) for chunk in (size.chunk, None))
    tries = [attempt(call) for call in (ours, rival)]
    said = wrong(transferred.agree, *(tried.answer for tried in tries))
    race = Race(ours, rival)
    seconds, rival_seconds = race.run(benchmark)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        ours()
    record(
        op="a prompt",
        shape=f"{size} T={size.prompt}",
        mode=name,
        ours=f"in chunks of {size.chunk}",
        rival="at once",
        seconds=seconds,
        seconds_memory_kept=race.with_memory_kept(),
        rival_seconds=rival_seconds,
        floor=counter.get_total_flops() / limits.sgemm,
        mb=tries[0].mb,
        rival_mb=tries[1].mb,
        targets={"ratio": FLAT, "mb": tries[1].mb / 4},
        wrong=said,
    )


@pytest.mark.parametrize("name", LINEAR)
def test_a_mixer_fitted_to_a_layer(name, limits, benchmark, record, request, tmp_path):
    case = Aligning(192, 256, 4, 2, 64) if request.config.option.small else Aligning()
    source = case.source(tmp_path / "source")
    tried = attempt(lambda: benchmark.pedantic(case.aligned, (source, name), rounds=1))
    told = tried.answer.details
    (layer,), stages = told["alignment"], told["stages"]
    errors = layer["error"]
    record(
        op="a mixer fitted to a layer of SmolLM-135M",
        shape=str(case),
        mode=f"{name}, error {errors['started']:.2f} to {errors['aligned']:.2f}",
        ours="started, then aligned",
        rival=None,
        seconds=layer["seconds"],
        seconds_memory_kept=layer["seconds"],
        rival_seconds=None,
        floor=sum(stages[name]["flops"] for name in ("start", "steps")) / limits.sgemm,
        mb=tried.mb,
        rival_mb=None,
        targets={"ms": MOST_SECONDS * 1e3},
        wrong="" if errors["aligned"] < errors["started"] else f"errors {errors}",
    )
