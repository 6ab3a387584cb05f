"""Every way to compute a sequence gives the same logits: whole, in pieces, one by one, padded, generated."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedConfig,
    StaticCache,
)

from lcikernels.models.cache import RecurrentLayer

PATTERNS = ["A", "R", "M", "S", "RAMS", "AR", "WAR"]
RECURRENT = ["R", "M", "S", "RAMS"]
TOLERANCE = {"rtol": 0, "atol": 1e-11}  # float64, logits of 1 to 10
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def in_pieces(model, cache, ids: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    """The logits of ids, fed to the cache in pieces of these sizes; positions count what is kept."""
    out, end = [], 0
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    for piece in ids.split(sizes, dim=1):
        part = slice(end, end + piece.shape[1])
        end = part.stop
        padded = (
            {"attention_mask": mask[:, :end], "position_ids": positions[:, part]} if mask is not None else {}
        )
        out.append(model(piece, cache=cache, **padded).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sizes", [[1] * 17, [9, 1, 1, 6], [2, 15]], ids=["one by one", "prefill", "chunks"])
def test_pieces_equal_the_whole_sequence(tiny, ids, pattern, sizes):
    model = tiny(pattern)
    whole = model(ids).logits
    assert whole.abs().max() > 1
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        torch.testing.assert_close(in_pieces(model, cache, ids, sizes), whole, **TOLERANCE)
        assert cache.get_seq_length() == 17


@pytest.mark.parametrize("pattern", RECURRENT)
def test_pieces_have_gradients_through_the_cache(tiny, ids, pattern):
    model = tiny(pattern)
    first = model.model.layers[0].mixer
    with torch.enable_grad():
        gradients = []
        for sizes in ([17], [9, 1, 7]):
            logits = in_pieces(model, DynamicCache(config=model.config), ids, sizes)
            gradients.append(torch.autograd.grad(logits[:, -1].square().sum(), list(first.parameters())))
    for pieces, whole in zip(*gradients):
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_anywhere_changes_nothing(tiny, ids, pattern):
    """Left, in the middle, and right, in a prefill, in a later piece, and alone in a step."""
    model = tiny(pattern)
    mask = torch.ones(2, 17, dtype=torch.long)
    # A window counts the padding in it, as transformers' caches do.
    mask[0, [0, 1, 2, 15, 16] if "W" in pattern else [0, 1, 2, 8, 9, 13, 16]] = 0
    kept = mask[0].bool()
    alone, whole = model(ids[:1, kept]).logits, model(ids[1:]).logits
    for sizes in ([17], [5, 8, 4], [1] * 17):
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
            out = in_pieces(model, cache, ids, sizes, mask)
            torch.testing.assert_close(out[:1, kept], alone, **TOLERANCE)
            torch.testing.assert_close(out[1:], whole, **TOLERANCE)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_left_padded_batch_generates_what_each_row_does_alone(tiny, ids, pattern):
    model = tiny(pattern)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    batch = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, start in enumerate((6, 0)):
        single = model.generate(ids[row : row + 1, start:], **GREEDY)
        assert torch.equal(batch[row, start:], single[0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generation_is_the_same_with_every_kind_of_cache(tiny, ids, pattern):
    model = tiny(pattern)
    want = model.generate(ids, **GREEDY, use_cache=False)
    assert torch.equal(want, model.generate(ids, **GREEDY))
    assert torch.equal(want, model.generate(ids, **GREEDY, prefill_chunk_size=4))
    assert torch.equal(want, model.generate(ids, **GREEDY, cache_implementation="static"))
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(want[:, 17:], model.generate(inputs_embeds=embedded, **GREEDY))
    with torch.inference_mode():
        assert torch.equal(want, model.generate(ids, **GREEDY))
    beams = GREEDY | {"num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))
    sample = {"max_new_tokens": 8, "do_sample": True, "top_k": 20}
    torch.manual_seed(3)
    want = model.generate(ids, **sample, use_cache=False)
    torch.manual_seed(3)
    assert torch.equal(want, model.generate(ids, **sample))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_chat_goes_on_where_it_was(tiny, ids, pattern):
    """Two turns on one cache, whose second holds what the first wrote, against everything anew."""
    model = tiny(pattern)
    cache = DynamicCache(config=model.config)
    first = model.generate(ids[:, :9], cache=cache, **GREEDY)
    second = torch.cat([first, ids[:, 9:]], 1)
    got = model.generate(second, cache=cache, **GREEDY)
    assert torch.equal(got, model.generate(second, use_cache=False, **GREEDY))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_prefix_serves_many_ends(tiny, ids, pattern):
    """Generating changes the cache it is given, so each end gets a copy."""
    model = tiny(pattern)
    prefix = DynamicCache(config=model.config)
    model(ids[:, :9], cache=prefix)
    for end in (ids[:, 9:], ids[:, 9:].flip(1)):
        whole = torch.cat([ids[:, :9], end], 1)
        got = model.generate(whole, cache=copy.deepcopy(prefix), **GREEDY)
        assert torch.equal(got, model.generate(whole, use_cache=False, **GREEDY))


@pytest.mark.parametrize("pattern", ["R", "M", "S"])
def test_a_cache_made_in_inference_mode_can_be_used_outside(tiny, ids, pattern):
    model = tiny(pattern)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        in_pieces(model, cache, ids[:, :9], [8, 1])
    out = in_pieces(model, cache, ids[:, 9:11], [1, 1])
    with torch.inference_mode():
        out = torch.cat([out, in_pieces(model, cache, ids[:, 11:], [1, 5])], 1)
    torch.testing.assert_close(out, model(ids).logits[:, 9:], **TOLERANCE)


@pytest.mark.parametrize("pattern", ["ARMS", "RA"])
def test_a_compiled_step_decodes_as_the_whole_model(tiny, ids, pattern):
    """Each step is one graph, on the cache whose attention layers have one size."""
    torch._dynamo.reset()
    model = tiny(pattern)
    cache = StaticCache(config=model.config, max_cache_len=20)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = [model(ids[:, :14], cache=cache).logits]
    logits += [step(ids[:, i : i + 1], cache=cache).logits for i in range(14, 17)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, **TOLERANCE)


def test_generation_compiles_attention_by_itself(tiny, ids):
    """As on an accelerator, where transformers compiles every step on a StaticCache."""
    torch._dynamo.reset()
    model = tiny("AA")
    compiled = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compiled._compile_all_devices = True
    got = model.generate(ids, **GREEDY, cache_implementation="static", compile_config=compiled)
    assert torch.equal(got, model.generate(ids, **GREEDY, use_cache=False))
    assert "_compiled_call" in vars(model)


@pytest.mark.parametrize("pattern", RECURRENT)
def test_the_cache_of_a_recurrent_layer_does_not_grow_over_100_tokens(tiny, ids, pattern):
    model = tiny(pattern, torch.float32)
    cache = DynamicCache(config=model.config)
    model(ids[:, :16], cache=cache)
    # Float32, 2 rows: retention 4 heads x 8 x 8; Mamba 64 channels x (16 states + 3 last inputs); Mamba-2 64
    # channels x 128 states + 3 last inputs of 64 channels, B and C.
    numbers = {"A": 0, "R": 4 * 8 * 8, "M": 64 * (16 + 3), "S": 64 * 128 + 3 * (64 + 128 + 128)}
    size = 4 * 2 * sum(numbers[letter] for letter in pattern)
    assert recurrent_bytes(cache) == size
    model.generate(ids, cache=cache, max_new_tokens=100, do_sample=False)
    assert cache.get_seq_length() == 16 + 100
    assert recurrent_bytes(cache) == size


def recurrent_bytes(cache: DynamicCache) -> int:
    """Bytes of memory that the recurrent layers hold on to; a view counts as all that it keeps alive."""
    layers = [layer for layer in cache.layers if isinstance(layer, RecurrentLayer)]
    states = [x for layer in layers for x in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    return sum(x.untyped_storage().nbytes() for x in states if x is not None)


def test_a_cache_that_does_not_fit_the_pattern_is_refused(tiny, ids):
    model = tiny("RA")
    message = r"must be DynamicCache\(config=model.config\), with a RecurrentLayer in layers \[0\]"
    for cache in (DynamicCache(), DynamicCache(config=tiny("AR").config), ((ids, ids),)):
        with pytest.raises(ValueError, match=message):
            model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"must be DynamicCache\(config=model.config\), got Encoder"):
        tiny("A")(ids, cache=EncoderDecoderCache(DynamicCache(), DynamicCache()))


def test_a_cache_that_forgets_or_moves_is_refused(tiny, ids):
    sliding = DynamicCache(
        config=PreTrainedConfig(num_hidden_layers=1, sliding_window=4, layer_types=["sliding_attention"])
    )
    with pytest.raises(ValueError, match="cache must be without a window.* in layer 0, got a window"):
        tiny("A")(ids, cache=sliding)
    model = tiny("RA")
    mixed = DynamicCache(config=model.config)
    mixed.layers[1] = sliding.layers[0]
    with pytest.raises(ValueError, match="cache must be without a window.* in layer 1, got a window"):
        model(ids, cache=mixed)
    windowed = tiny("AW", sliding_window=4)
    for other, message in {
        "AA": "with a window of 4, in layer 1, got none",
        "WW": "without a window, .*, in layer 0, got a window",
        "AAW": r"DynamicCache\(config=model.config\), with a window in layers \[1\], got",
    }.items():
        with pytest.raises(ValueError, match=f"cache must be {message}"):
            windowed(ids, cache=DynamicCache(config=tiny(other, sliding_window=4).config))
    with pytest.raises(ValueError, match="cache must be with a window of 4, in layer 1, got 6"):
        windowed(ids, cache=DynamicCache(config=tiny("AW", sliding_window=6).config))
    with pytest.raises(ValueError, match="cache must be without offloading"):
        model.generate(ids, **GREEDY, cache_implementation="offloaded")
    with pytest.raises(ValueError, match="only supported for models with only full attention"):
        model.generate(ids, **GREEDY, cache_implementation="quantized")


def test_a_mask_that_does_not_cover_the_past_is_refused(tiny, ids):
    model = tiny("R")
    cache = DynamicCache(config=model.config)
    model(ids[:, :9], cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, past \+ T\] = \[2, 17\].*\(2, 8\)"):
        model(ids[:, 9:], attention_mask=torch.ones(2, 8), cache=cache)


@pytest.mark.parametrize("pattern", RECURRENT)
def test_assisted_generation_is_refused_where_a_state_cannot_rewind(tiny, ids, pattern):
    attention, model = tiny("A"), tiny(pattern)
    for assistance in ({"assistant_model": attention}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(ids[:1], **GREEDY, **assistance)
    with pytest.raises(ValueError, match="a recurrent state cannot forget its last tokens"):
        attention.generate(ids[:1], **GREEDY, assistant_model=model)


def test_assisted_generation_of_attention_gives_the_same_text(tiny, ids):
    for model in (tiny("A"), tiny("WA", sliding_window=5)):
        want = model.generate(ids[:1], **GREEDY)
        assert torch.equal(want, model.generate(ids[:1], **GREEDY, prompt_lookup_num_tokens=3))
        assert torch.equal(want, model.generate(ids[:1], **GREEDY, assistant_model=tiny("AA")))
