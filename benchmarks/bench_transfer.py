"""What a transfer is for, on a CPU: a token after a long text, and a step of training, beside the source's.

A long prompt in chunks beside all of it at once; and what fitting a mixer to a layer's attention takes.

    python -m pytest benchmarks/bench_transfer.py           9 minutes; prints, and writes RESULTS.md
    ... -k "RetNet and token"                               some; prints only
    ... --small                                             does it run? Seconds; prints only

An answer is checked before it is timed. The source's cache has one size from the start, as
`generate(cache_implementation="static")` makes it: by itself transformers copies all of it for every token.
bench_gpu.py has the tokens on a GPU.
"""

from pathlib import Path

import pytest

from benchmarks import transferred
from benchmarks.answers import same, wrong
from benchmarks.measure import Race, attempt, flops, memory
from benchmarks.transferred import PATTERNS, SMALL, Aligning, Size, Writer
from growth.training.flops import CPU_ATTENTION

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


@pytest.fixture
def keep_token(size, limits, benchmark, record):
    """Keep a row of two models that write tokens."""

    def keep(writers: list[Writer], targets: tuple[str, ...], **names: str) -> None:
        ours, rival = writers
        columns = Race(ours.call, rival.call).columns(benchmark, size.decoded)
        columns |= dict(mb=ours.bytes / 1e6, rival_mb=rival.bytes / 1e6)
        most = {"ratio": 1.0, "flat": FLAT, "mb": columns["rival_mb"]}
        wanted = {name.replace("flat", "ratio"): most[name] for name in targets}
        floor, mode = limits.floor(*ours.least()), f"after {ours.context}"
        row = dict(op="a token, MB of state", shape=str(size), mode=mode, **names, **columns)
        record(**row, floor=floor, targets=wanted, wrong=ours.wrong or rival.wrong)

    return keep


@pytest.mark.parametrize("place", range(len(Size().contexts)), ids=lambda i: f"after-{Size().contexts[i]}")
@pytest.mark.parametrize("name", PATTERNS)
def test_a_token_beside_the_source_s(name, place, size, source, keep_token):
    if place >= len(size.contexts):
        pytest.skip("the small size has fewer")
    folders = transferred.target(size, name, source), source
    writers = [Writer(folder, size.contexts[place], size) for folder in folders]
    keep_token(writers, ("ratio",) * bool(place), ours=name, rival="attention with its KV cache")


@pytest.mark.parametrize("name", LINEAR)
def test_a_token_after_a_long_text_and_a_short_one(name, size, source, keep_token):
    folder, (short, *_, long) = transferred.target(size, name, source), size.contexts
    writers = [Writer(folder, context, size) for context in (long, short)]
    keep_token(writers, ("flat", "mb"), ours=name, rival=f"itself after {short}")


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_of_training_beside_the_source_s(name, size, source, limits, benchmark, record):
    folder = transferred.target(size, name, source)
    said = wrong(transferred.as_in_float64, folder, 8 * transferred.PROMPT)
    calls = [transferred.training(transferred.loaded(x), size.trained) for x in (folder, source)]
    for call in calls:  # the first allocates the moments
        call()
    tries = [attempt(call) for call in calls]
    record(
        op="a step of training",
        shape=f"{size} T={size.trained}",
        mode="forward + backward + AdamW",
        ours=name,
        rival="attention",
        **Race(*calls).columns(benchmark),
        **memory(tries),
        floor=flops(calls[0], custom_mapping=CPU_ATTENTION) / limits.sgemm,
        targets={"ratio": 1.0},
        wrong=said,
    )


@pytest.mark.parametrize("name", LINEAR)
def test_a_long_prompt_in_chunks_beside_all_at_once(name, size, source, limits, benchmark, record):
    model = transferred.loaded(transferred.target(size, name, source))
    calls = [transferred.reading(model, size.prompt, chunk) for chunk in (size.chunk, None)]
    tries = [attempt(call) for call in calls]
    record(
        op="a prompt",
        shape=f"{size} T={size.prompt}",
        mode=name,
        ours=f"in chunks of {size.chunk}",
        rival="at once",
        **Race(*calls).columns(benchmark),
        **memory(tries),
        floor=flops(calls[0], custom_mapping=CPU_ATTENTION) / limits.sgemm,
        targets={"ratio": FLAT, "mb": tries[1].mb / 4},
        wrong=wrong(same, *(tried.answer for tried in tries)),
    )


@pytest.mark.parametrize("name", LINEAR)
def test_a_mixer_fitted_to_a_layer(name, limits, benchmark, record, request, tmp_path):
    case = Aligning(192, 256, 4, 2, 64) if request.config.option.small else Aligning()
    source = case.source(tmp_path / "source")
    tried = attempt(lambda: benchmark.pedantic(case.aligned, (source, name), rounds=1))
    (layer,), stages = tried.answer.details["alignment"], tried.answer.details["stages"]
    errors, seconds = layer["error"], layer["seconds"]
    record(
        op="a mixer fitted to a layer of SmolLM-135M",
        shape=str(case),
        mode=f"{name}, error {errors['started']:.2f} to {errors['aligned']:.2f}",
        ours="started, then aligned",
        **dict(rival=None, rival_seconds=None, rival_mb=None),
        **dict(seconds=seconds, seconds_memory_kept=seconds, mb=tried.mb),
        floor=sum(stages[name]["flops"] for name in ("start", "steps")) / limits.sgemm,
        targets={"ms": MOST_SECONDS * 1e3},
        wrong="" if errors["aligned"] < errors["started"] else f"errors {errors}",
    )
