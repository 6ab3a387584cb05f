"""What callers of transformers' models expect of one: its arguments and its outputs."""

import pytest
import torch
from transformers import DynamicCache

TOLERANCE = {"rtol": 0, "atol": 1e-11}  # float64, logits of 1 to 10


@pytest.mark.parametrize(
    "keyword", ["past", "cache_params", "labelz", "cu_seqlens", "cache_position", "token_type_ids"]
)
def test_an_unknown_keyword_is_an_error_that_names_it(tiny, ids, keyword):
    model = tiny("R")
    for callee in (model, model.model):
        with pytest.raises(TypeError, match=keyword):
            callee(ids, **{keyword: None})


def test_the_old_name_of_the_cache_is_served_with_a_warning_as_transformers_serves_it(tiny, ids):
    model = tiny("RA")
    cache = DynamicCache(config=model.config)
    for callee, end in ((model, 4), (model.model, 9)):
        with torch.no_grad(), pytest.warns(FutureWarning, match="Use `cache` instead"):
            callee(ids[:, cache.get_seq_length() : end], past_key_values=cache)
    with torch.no_grad():
        got = model(ids[:, 9:], cache=cache)
        torch.testing.assert_close(got.logits, model(ids).logits[:, 9:], **TOLERANCE)
        assert got.cache is cache


def test_attention_layers_give_their_weights_and_others_say_that_they_have_none(tiny, ids):
    model = tiny("RAMA")
    with pytest.raises(ValueError, match="output_attentions must be False, or attn_implementation='eager'"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions must be False where no layer is attention"):
        tiny("RM")(ids, output_attentions=True)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    fused = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    out = model(ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(out.logits[mask.bool()], fused[mask.bool()], **TOLERANCE)
    assert [x.shape for x in out.attentions] == [(2, 4, 17, 17)] * 2
    for weights in out.attentions:
        kept = weights[0, :, 6:]
        torch.testing.assert_close(kept.sum(-1), torch.ones_like(kept[..., 0]))
        assert not weights[1].triu(1).any() and not kept[..., :6].any()
    assert model(ids).attentions is None
    steps = {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True}
    steps = model.generate(ids, max_new_tokens=2, do_sample=False, **steps)
    assert [x.shape for x in steps.attentions[1]] == [(2, 4, 1, 18)] * 2
    assert [x.shape for x in steps.hidden_states[1]] == [(2, 1, 32)] * 5


def test_hidden_states_are_the_stream_before_every_block_and_after_the_norm(tiny, ids):
    model, seen = tiny("RAMS"), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    out = model(ids, output_hidden_states=True)
    streams = [x for x, _ in seen] + [model.model.norm(seen[-1][1])]
    assert len(out.hidden_states) == 5 and all(map(torch.equal, out.hidden_states, streams))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    first, *_ = model(ids, return_dict=False)
    assert torch.equal(first, out.logits)


def test_embeddings_in_the_place_of_tokens_give_the_same_logits(tiny, ids):
    model = tiny("RAMS")
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids).logits, **TOLERANCE)
    for both_or_neither in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="input_ids must be given, or inputs_embeds, not both"):
            model(**both_or_neither)


def test_a_batch_gives_what_its_rows_give(tiny, ids):
    model = tiny("RAMS")
    rows = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(model(ids).logits, rows, **TOLERANCE)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_is_resized_keeps_what_it_had(tiny, ids, tied):
    model = tiny("RM", tie_word_embeddings=tied)
    want = model(ids).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 and model(ids).logits.shape[-1] == 70
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(model(ids).logits[..., :64], want, **TOLERANCE)


def test_a_cache_is_refused_where_layers_run_twice(tiny, ids):
    model = tiny("RA").train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="cache must be None under gradient checkpointing"):
        model(ids, cache=DynamicCache(config=model.config))


def test_a_rotation_that_is_changed_after_construction_is_refused(tiny, ids):
    """Models of transformers go on with the angles that they were made with, and say nothing."""
    model = tiny("RA")
    want = model(ids).logits
    model.config.rope_parameters = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert torch.equal(model(ids).logits, want)
    for change in ({"rope_type": "linear", "factor": 2.0}, {"rope_theta": 5000.0}):
        model.config.rope_parameters = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5} | change
        with pytest.raises(ValueError, match="config.rope_parameters must be what the model was made with"):
            model(ids)


def test_attention_weights_of_a_window_are_those_of_its_tokens(tiny, ids):
    model = tiny("WA", sliding_window=3, attention_softcap=2.0, num_key_value_heads=2)
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions
    seen = torch.ones(17, 17, dtype=torch.bool).tril()
    assert torch.equal(weights[1] > 0, seen.expand(2, 4, 17, 17))
    assert torch.equal(weights[0] > 0, seen.triu(-2).expand(2, 4, 17, 17))
