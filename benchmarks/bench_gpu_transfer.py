"""What a transfer is for, on a GPU: a token after a long text, beside the source's; in bfloat16.

    python -m pytest -rfEs benchmarks/bench_gpu.py benchmarks/bench_gpu_transfer.py

is what `make gpu` runs. Through Python, so that at this size its time counts more than the GPU's. Tokens one
by one are checked against the whole text in float32, before they are timed.
"""

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.answers import wrong

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.filterwarnings("ignore"),
]
NAMES = ["RetNet", "Mamba", "Mamba-2", "hybrid of RetNet"]
CONTEXTS = [1024, 4096, 16384, 65536]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    for needed in ("transformers", "accelerate"):
        pytest.importorskip(needed)
    from benchmarks import transferred  # with transformers

    return transferred.source(transferred.Size(), tmp_path_factory.mktemp("transferred") / "source")


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_token_beside_the_source_s(name, context, source, chip, benchmark, record):
    record(**benchmark.pedantic(measured, (name, context, source, chip)))


def measured(name: str, context: int, source: Path, limits: gpu.Limits) -> dict[str, object]:
    """A row of the report: times of one token, memory of the state over that of the source's keys."""
    from benchmarks import transferred
    from lcikernels.models.cache import state_bytes

    size, sides, said = transferred.Size(), [], []
    for folder in (transferred.target(size, name, source), source):
        model = transferred.loaded(folder).to(gpu.DEVICE)
        said.append(wrong(transferred.as_the_whole, model, size.decoded))
        model.bfloat16()
        cache = transferred.filled(model, context, size.decoded)
        call = transferred.decoding(model, cache, size.decoded)
        sides.append((model, sum(state_bytes(cache)), call))
    (model, held, ours), (_, its, rival) = sides
    seconds, rival_seconds = (x / size.decoded for x in gpu.race(ours, rival))
    read, flops = transferred.least(model, held)
    return dict(
        op="a token",
        shape=str(size),
        mode=f"after {context}, {held / 1e6:.1f} MB of state",
        ours=name,
        rival=f"attention, {its / 1e6:.1f} MB of keys and values",
        seconds=seconds,
        rival_seconds=rival_seconds,
        floor=limits.floor(read, flops=flops),
        elements=size.vocabulary,
        memory=held / its,
        targets={"ratio": 1} if context > CONTEXTS[0] else {},
        wrong=said[0] or said[1],
    )
