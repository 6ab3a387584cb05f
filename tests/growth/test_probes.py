"""Two models are compared by input of their family's kind, as long as both take it."""

import pytest
import torch
from checkpoints import bert, gpt2, neox, saved
from transformers import BertConfig, BertModel, RobertaConfig, RobertaForMaskedLM

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal, several
from growth.probes import probe

SIZES = {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 160}


def roberta(folder, **more):
    sizes = SIZES | {"vocab_size": 257, "max_position_embeddings": 32, "pad_token_id": 5} | more
    return saved(RobertaForMaskedLM, RobertaConfig(**sizes), folder, torch.float32)


def headless(folder):
    config = BertConfig(**SIZES, vocab_size=257, max_position_embeddings=32)
    return saved(BertModel, config, folder, torch.float32)


def read(folder, *more, **options):
    return probe(Checkpoint(folder), Checkpoint(folder), *more, **options)


def test_a_language_model_reads_as_many_tokens_as_it_has_positions(source):
    assert read(source)["input_ids"].shape == (2, 32)
    assert read(source, batch=3, length=5)["input_ids"].shape == (3, 5)
    assert not read(source, seed=1)["input_ids"].equal(read(source)["input_ids"])


def test_roberta_s_positions_begin_after_its_pad_token_and_no_token_is_one(tmp_path):
    src = roberta(tmp_path / "src")
    ids = read(src)["input_ids"]
    assert ids.shape[1] == 32 - 5 - 1 and not (ids == 5).any()
    growth.grow(src, tmp_path / "out", method="lemon", hidden_size=192)
    agreement = growth.check(src, tmp_path / "out")
    assert agreement.kept and agreement.limit


def test_a_masked_model_reads_masks_and_both_types_of_tokens(tmp_path):
    inputs = read(bert(tmp_path / "src"))
    masked = (inputs["input_ids"] == 256).double().mean()
    assert 0 < masked < 0.5
    assert set(inputs["token_type_ids"].unique().tolist()) == {0, 1}
    assert "token_type_ids" not in read(roberta(tmp_path / "roberta", type_vocab_size=1))


def test_a_text_is_read_from_its_beginning_by_the_source_s_tokenizer(source, text, tmp_path):
    ids = read(source, text)["input_ids"]
    assert bytes(ids.flatten().tolist()) == text.read_bytes()[:64]
    short = tmp_path / "short.txt"
    short.write_text("hi")
    assert read(source, short)["input_ids"].shape[0] == 1
    growth.grow(source, tmp_path / "out", method="lemon", num_layers=4)
    assert growth.check(source, tmp_path / "out", text=text).kept


def test_models_that_read_different_things_are_refused(source, tmp_path):
    with pytest.raises(Refusal, match="the source's kind of input of tokens, got masked"):
        growth.check(source, bert(tmp_path / "bert"))
    with pytest.raises(Refusal, match="the source's vocabulary of 256, got 300"):
        growth.check(source, neox(tmp_path / "other", vocab_size=300))


def test_models_without_a_head_are_compared_by_the_channels_that_both_have(tmp_path):
    src = headless(tmp_path / "src")
    growth.grow(src, tmp_path / "out", method="lemon", hidden_size=192, num_layers=3)
    agreement = growth.check(src, tmp_path / "out")
    assert agreement.limit and agreement.kept and agreement.compared == "output"
    assert "max |output difference|" in str(agreement)
    with pytest.raises(Refusal, match="expected logits, as the source gives, got last_hidden_state"):
        growth.check(bert(tmp_path / "bert"), src)


def test_what_was_lost_is_told_where_no_equality_was_promised(tmp_path):
    src = gpt2(tmp_path / "src")
    report = growth.grow(src, tmp_path / "out", method="net2net", hidden_size=120)
    agreement = growth.check(src, tmp_path / "out")
    assert agreement.limit is None and agreement.lost == tuple(report.notes) != ()
    assert str(agreement).endswith(f"no equality was promised: {several(agreement.lost)}")
