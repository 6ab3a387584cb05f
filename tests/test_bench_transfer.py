"""The benchmarks of what transfer makes compute what they say, at sizes that take no time."""

import pytest
import torch

from benchmarks import bench_gpu, measure, report, transferred
from benchmarks.answers import same
from benchmarks.transferred import PATTERNS, Size
from lcikernels.models.cache import state_bytes

SIZE = Size(64, 2, 64, (16, 64), 3, 32, 64, 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return transferred.source(SIZE, tmp_path_factory.mktemp("transferred") / "source")


@pytest.mark.parametrize("name", PATTERNS)
def test_a_cache_is_filled_to_its_length_and_decoding_gives_its_places_back(source, name):
    model = transferred.loaded(transferred.target(SIZE, name, source))
    assert model.config.pattern == (2 * PATTERNS[name])[:2]
    transferred.as_the_whole(model, 3)
    sizes = []
    for context in SIZE.contexts:
        cache = transferred.filled(model, context, SIZE.decoded)
        before = state_bytes(cache)
        assert all(layer.get_seq_length() == context for layer in cache.layers)
        logits = transferred.decoding(model, cache, SIZE.decoded)()
        assert logits.shape == (1, SIZE.decoded, SIZE.vocabulary) and logits.isfinite().all()
        assert all(layer.get_seq_length() == context for layer in cache.layers)
        assert state_bytes(cache) == before
        sizes.append(sum(before))
    assert (sizes[0] == sizes[1]) == ("A" not in PATTERNS[name])


def test_the_source_s_cache_is_read_whole(source):
    """What stands at its first place moves the logits of a token far behind it, and the places are kept."""
    model = transferred.loaded(source)
    cache = transferred.filled(model, 64, SIZE.decoded)
    call = transferred.decoding(model, cache, SIZE.decoded)
    first, again = call(), call()
    assert torch.equal(first, again)
    with torch.inference_mode():
        cache.layers[0].values[:, :, 0] += 100
    assert not torch.equal(call(), first)


@pytest.mark.parametrize("name", ["RetNet", "Mamba-2"])
def test_a_prompt_in_chunks_gives_the_logits_of_all_at_once(source, name):
    model = transferred.loaded(transferred.target(SIZE, name, source))
    whole, chunks = (transferred.reading(model, SIZE.prompt, chunk)() for chunk in (None, SIZE.chunk))
    same(chunks, whole)
    with pytest.raises(AssertionError, match="error"):
        same(chunks + whole.abs().max(), whole)


def test_a_row_of_a_gpu_s_table_has_the_times_of_one_token(source, monkeypatch):
    """On a CPU that plays the GPU; the clock is not asked."""
    called = []
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(measure, "gpu_race", lambda *calls: [called.append(call()) or 3.0 for call in calls])
    monkeypatch.setattr(transferred, "Size", lambda: SIZE)
    limits = measure.GpuLimits(1e12, 1e12, 1e12, 1e9, 100, 1e14)
    row = bench_gpu.token("Mamba-2", 64, source, limits)
    assert row["wrong"] == "" and row["seconds"] == row["rival_seconds"] == 3.0 / SIZE.decoded
    assert len(called) == 2 and all(x.dtype == torch.bfloat16 for x in called)
    assert "after 64, " in report.gpu_cells(row | {"red": ""})[0] and row["memory"] > 0
    assert bench_gpu.TRANSFERRED == tuple(PATTERNS) and bench_gpu.CONTEXTS == Size().contexts
