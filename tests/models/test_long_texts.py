"""What a long text costs: a state of one size, keys of attention alone, a prompt read in chunks."""

import pytest
import torch
from memory import Memory
from transformers import DynamicCache

from lcikernels.models.cache import state_bytes

RECURRENT = ["R", "M", "S", "RMS"]
LONG, CHUNK = 32768, 1024
WINDOW = 6
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def tokens(count: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(64, (rows, count), generator=torch.Generator().manual_seed(2))


def test_a_cache_grows_in_attention_alone_and_under_a_window_up_to_its_length(tiny):
    """In float32, 2 rows, 2 heads of 8 dims for keys and values, after so many tokens and one more."""
    model = tiny("RAMWS", torch.float32, sliding_window=WINDOW, num_key_value_heads=2)
    held = {}
    for T in (3, 31, 127, 511):
        cache = DynamicCache(config=model.config)
        model(tokens(T), cache=cache)
        model(tokens(1), cache=cache)
        held[T + 1] = state_bytes(cache)
    each = 4 * 2 * 2 * (2 * 8)  # bytes of a token's keys and values
    for T, sizes in held.items():
        assert sizes[1] == each * T
        assert sizes[3] == each * min(T, WINDOW)
        assert [sizes[i] for i in (0, 2, 4)] == [held[4][i] for i in (0, 2, 4)]
    numbers = [4 * 8 * 8, 64 * (16 + 3), 64 * 128 + 3 * (64 + 128 + 128)]
    assert [held[512][i] for i in (0, 2, 4)] == [4 * 2 * number for number in numbers]


@pytest.mark.parametrize("pattern", ["A", "W", *RECURRENT, "RAMS", "WSR"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_in_chunks_is_continued_as_the_whole_one(tiny, ids, pattern, cache):
    """Also where a row is padded, so that some chunks are padding alone."""
    model = tiny(pattern, sliding_window=WINDOW)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for given in ({}, {"attention_mask": mask}):
        want = model.generate(ids, **GREEDY, **given, use_cache=False)
        for size in (1, 4, 16, 100):
            chunks = {"prefill_chunk_size": size, "cache_implementation": cache}
            assert torch.equal(model.generate(ids, **GREEDY, **given, **chunks), want), size


@pytest.mark.parametrize("pattern", ["A", "W", *RECURRENT, "RAMS", "WSR"])
def test_a_second_prompt_in_chunks_goes_on_where_the_first_ended(tiny, ids, pattern):
    model = tiny(pattern, sliding_window=WINDOW)
    cache, chunks = DynamicCache(config=model.config), {"prefill_chunk_size": 3}
    first = model.generate(ids[:, :9], cache=cache, **GREEDY, **chunks)
    second = torch.cat([first, ids[:, 9:]], 1)
    got = model.generate(second, cache=cache, **GREEDY, **chunks)
    assert torch.equal(got, model.generate(second, use_cache=False, **GREEDY))


@pytest.mark.parametrize("pattern", RECURRENT)
def test_a_long_prompt_in_chunks_takes_the_memory_of_a_chunk(tiny, pattern):
    """Of 32768 tokens, with the logits of the last; in float64, whose rounding tells no difference."""
    model, ids = tiny(pattern), tokens(LONG, 1)
    most, logits = {}, {}
    for size in (LONG, CHUNK):
        cache = DynamicCache(config=model.config)
        with Memory((*model.parameters(), ids)) as memory:
            before = memory.most
            for chunk in ids.split(size, dim=1):
                out = model(chunk, cache=cache, logits_to_keep=1)
        most[size], logits[size] = memory.most - before, out.logits
        assert out.logits.shape == (1, 1, 64) and cache.get_seq_length() == LONG
    torch.testing.assert_close(logits[CHUNK], logits[LONG], rtol=0, atol=1e-9)
    assert most[LONG] > 8 * LONG * 32  # a layer's stream
    assert most[CHUNK] < most[LONG] / 16


@pytest.mark.parametrize("pattern", RECURRENT)
def test_generating_from_a_long_prompt_in_chunks_keeps_no_more_than_a_chunk(tiny, pattern):
    model, ids = tiny(pattern, torch.float32), tokens(LONG, 1)
    most, written = {}, {}
    for size in (None, CHUNK):
        with Memory((*model.parameters(), ids)) as memory:
            before = memory.most
            written[size] = model.generate(ids, **GREEDY, prefill_chunk_size=size)
        most[size] = memory.most - before
    assert torch.equal(written[None], written[CHUNK])
    # Tokens and masks of the whole prompt stay: 64 bytes a token are room for eight of int64.
    assert most[CHUNK] < most[None] / 16 + 64 * LONG
