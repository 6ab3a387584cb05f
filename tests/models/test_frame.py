"""Every field of the frame is computed, and the same in every way to compute a sequence."""

from itertools import pairwise

import pytest
import torch
from model_frames import FRAMES
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from lcikernels.models import LCIConfig, LCIForCausalLM

EXACT = {"rtol": 0, "atol": 1e-11}  # float64, logits of 1 to 10
GREEDY = {"max_new_tokens": 6, "do_sample": False}
BOUNDS = [0, 7, 8, 17]


@pytest.fixture(params=FRAMES)
def frame(request, tiny) -> LCIForCausalLM:
    pattern, fields = FRAMES[request.param]
    return tiny(pattern, **fields)


def read(model, cache, ids: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([model(piece, cache=cache).logits for piece in ids.split(sizes, dim=1)], 1)


@torch.no_grad()
def test_pieces_steps_and_whole_sequences_give_the_same(frame, ids):
    whole = frame(ids).logits
    assert whole.abs().max() > 0.5
    for sizes in ([9, 1, 1, 6], [3, 14]):
        for cache in (
            DynamicCache(config=frame.config),
            StaticCache(config=frame.config, max_cache_len=20),
        ):
            torch.testing.assert_close(read(frame, cache, ids, sizes), whole, **EXACT)


@torch.no_grad()
def test_generation_is_the_same_with_and_without_a_cache_and_in_chunks(frame, ids):
    want = frame.generate(ids, **GREEDY, use_cache=False)
    assert torch.equal(want, frame.generate(ids, **GREEDY))
    assert torch.equal(want, frame.generate(ids, **GREEDY, prefill_chunk_size=4))
    assert torch.equal(want, frame.generate(ids, **GREEDY, cache_implementation="static"))
    static = GREEDY | {"cache_implementation": "static", "prefill_chunk_size": 7}
    assert torch.equal(want, frame.generate(ids, **static))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    batch = frame.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(batch[0, 6:], frame.generate(ids[:1, 6:], **GREEDY)[0])
    assert torch.equal(batch[1], want[1])


@torch.no_grad()
def test_packed_sequences_give_what_each_gives_alone(frame, ids):
    alone = torch.cat([frame(ids[:1, a:b]).logits for a, b in pairwise(BOUNDS)], 1)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDS)])[None]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    for told in ({"position_ids": positions}, {"cu_seq_lens_q": bounds}):
        torch.testing.assert_close(frame(ids[:1], **told).logits, alone, **EXACT)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(frame, ids):
    mask = torch.ones_like(ids)
    mask[0, [0, 1, 2, 15, 16]] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    got = frame(ids, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(got[:1, 3:15], frame(ids[:1, 3:15]).logits, **EXACT)
    torch.testing.assert_close(got[1:], frame(ids[1:]).logits, **EXACT)


@torch.no_grad()
def test_eager_attention_computes_what_sdpa_does(frame, ids):
    want = frame(ids).logits
    frame.set_attn_implementation("eager")
    torch.testing.assert_close(frame(ids).logits, want, **EXACT)


def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(frame, ids):
    gradients = []
    for checkpointing in (False, True):
        frame.train().zero_grad()
        if checkpointing:
            frame.activation_checkpointing_enable()
        frame(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: x.grad.clone() for name, x in frame.named_parameters()})
    # softmax gives keys' bias, which moves all scores of a query alike, a gradient of rounding errors alone
    assert not [name for name, x in gradients[0].items() if not x.any()]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@torch.no_grad()
def test_saved_models_load_as_they_were_and_in_bfloat16(frame, ids, tmp_path):
    frame.float().save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.config.to_diff_dict() == frame.config.to_diff_dict()
    want = frame(ids).logits
    assert torch.equal(loaded(ids).logits, want)
    for half in (
        LCIForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        loaded.to(torch.bfloat16),
    ):
        got = half(ids).logits
        assert got.dtype == torch.bfloat16 and (got.float() - want).norm() < 0.05 * want.norm()
        for (name, x), y in zip(half.named_parameters(), frame.parameters()):
            kept = name.endswith(("A_log", "dt_bias", "dt_proj.bias"))
            assert x.dtype == (torch.float32 if kept else torch.bfloat16), name
            assert not kept or torch.equal(x, y)


@torch.no_grad()
@pytest.mark.parametrize("name", ["everything", "dynamic"])
def test_a_compiled_step_decodes_as_the_whole_model(tiny, ids, name):
    """As one graph, with a window's cache and angles that depend on the length."""
    torch._dynamo.reset()
    pattern, fields = FRAMES[name]
    model = tiny(pattern, **fields)
    cache = StaticCache(config=model.config, max_cache_len=20)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = [model(ids[:, :15], cache=cache).logits]
    logits += [step(ids[:, i : i + 1], cache=cache).logits for i in (15, 16)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, **EXACT)


# Fields that change no tensor's shape: what each is against, and what else it needs.
MOVES = {
    "norm_eps": ("AR", 0.5, {}),
    "norm_placement": ("AR", "around", {"norm": "rms"}),
    "use_parallel_residual": ("AR", False, {}),
    "hidden_act": ("A", "silu", {}),
    "embedding_scale": ("A", 2.0, {"norm_placement": "inside"}),
    "residual_scale": ("A", 0.5, {}),
    "logits_scale": ("A", 0.5, {}),
    "final_softcap": ("A", 1.0, {}),
    "attention_scale": ("A", 0.9, {}),
    "attention_softcap": ("A", 1.0, {}),
    "scale_attention_by_layer": ("AA", True, {}),
    "sliding_window": ("W", 3, {"sliding_window": 5}),
    "position_embedding_type": ("AR", "none", {}),
    "no_rope_layers": ("RA", [0], {}),
    "zero_centered_norms": ("A", True, {"norm": "rms"}),
    "max_position_embeddings": (
        "R",
        4,
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 9.0}},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("field", MOVES)
def test_a_field_moves_the_logits(tiny, ids, field):
    pattern, value, others = MOVES[field]
    one, other = tiny(pattern, **others), tiny(pattern, **others | {field: value})
    weights = dict(other.named_parameters())
    for name, x in one.named_parameters():
        if name in weights:
            weights[name].copy_(x)
    assert (one(ids).logits - other(ids).logits).abs().max() > 1e-3


@torch.no_grad()
def test_a_window_of_all_tokens_is_no_window_and_one_of_two_sees_two(tiny, ids):
    model = tiny("A", num_key_value_heads=2)
    for window, lost in ((17, 0), (2, 15)):
        other = tiny("W", num_key_value_heads=2, sliding_window=window)
        other.load_state_dict(model.state_dict())
        moved = (other(ids).logits - model(ids).logits).abs().amax((0, 2)) > 1e-9
        assert moved.sum() == lost and not moved[:2].any()


@torch.no_grad()
def test_the_cache_of_a_window_holds_no_more_than_the_window(tiny, ids):
    model = tiny("WR", sliding_window=5)
    cache = DynamicCache(config=model.config)
    model.generate(ids, cache=cache, max_new_tokens=40, do_sample=False)
    assert cache.layers[0].keys.shape == (2, 4, 4, 8) and cache.get_seq_length() == 56


@torch.no_grad()
def test_longrope_reads_the_text_anew_where_it_turns_all_tokens(tiny, ids):
    """Where the text grows past the trained length: step by step, padded, in chunks, and in a second turn."""
    _, fields = FRAMES["longrope"]
    rope = fields["rope_parameters"] | {"original_max_position_embeddings": 20}
    model = tiny("AR", rope_parameters=rope, max_position_embeddings=80)
    want = model.generate(ids, **GREEDY, use_cache=False)
    for options in ({}, {"prefill_chunk_size": 5}, {"cache_implementation": "static"}):
        assert torch.equal(want, model.generate(ids, **GREEDY, **options))
    long = torch.cat([ids, ids], 1)
    want = model.generate(long, **GREEDY, use_cache=False)
    for options in ({}, {"prefill_chunk_size": 5}):
        assert torch.equal(want, model.generate(long, **GREEDY, **options))
        cache = DynamicCache(config=model.config)
        model(ids, cache=cache)
        assert torch.equal(want, model.generate(long, **GREEDY, cache=cache, **options))
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    padded = model.generate(ids, attention_mask=mask, **GREEDY | {"max_new_tokens": 12})
    alone = model.generate(ids[:, 4:], **GREEDY | {"max_new_tokens": 12}, use_cache=False)
    assert torch.equal(padded[:, 4:], alone)
    cache = DynamicCache(config=model.config)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="input_ids must be the whole text where it grows past"):
        model.generate(ids, attention_mask=torch.ones(2, 34), cache=cache, **GREEDY)


def test_text_longer_than_the_table_of_positions_is_refused(tiny, ids):
    model = tiny("AR", position_embedding_type="learned", max_position_embeddings=16)
    with pytest.raises(ValueError, match="position_ids must be below max_position_embeddings=16.*, got 16"):
        model(ids)
    with torch.no_grad():
        model(ids, position_ids=torch.arange(17)[None] % 9)


def test_an_older_configuration_loads(tmp_path, tiny):
    tiny("AR", norm_eps=0.01).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"norm_eps": 0.01' in text and "layer_norm_eps" not in text
    (tmp_path / "config.json").write_text(text.replace('"norm_eps"', '"layer_norm_eps"'))
    config = LCIConfig.from_pretrained(tmp_path)
    assert config.norm_eps == config.layer_norm_eps == 0.01 and "layer_norm_eps" not in config.to_dict()
    assert LCIForCausalLM.from_pretrained(tmp_path).model.norm.eps == 0.01
