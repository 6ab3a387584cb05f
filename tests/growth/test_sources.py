"""Every family of decoders, in the words of our own model: what stays attention computes what it did."""

import json
import math
from dataclasses import fields

import pytest
import torch
from checkpoints import inputs, neox
from decoders import DECODERS
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    DistilBertConfig,
    PreTrainedConfig,
    T5Config,
    ViTConfig,
)

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import quiet
from growth.transferring.sources import SOURCES, lci_config, left_behind, pattern_of, said


def greedy(folder, tokens):
    """The text that a model goes on with, by a cache; it loads with no tensor missing or left."""
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        return model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("name", DECODERS)
def test_what_stays_computes_the_source_s_logits_and_text(decoder, tmp_path, name):
    """Of 40 tokens, where windows are of 8 and rotations change at 16; with a cache too."""
    src = decoder(name)
    config = Checkpoint(src).config
    own = pattern_of(config)
    kept = {"pattern": own} if set(own) - set("AW") else {"mixers": "attention"}
    report = growth.transfer(src, tmp_path / "out", **kept)
    assert report.lossless and not report.plan.dropped
    assert {row.origin for row in report.plan.rows} == {"copied"}
    assert json.loads((tmp_path / "out" / "growth.json").read_text())["lossless"] is True
    for length in (128, 12):
        agreement = growth.check(src, tmp_path / "out", length=length)
        assert agreement.limit == max(1.0, agreement.largest) * 1e-5
        assert agreement.kept, agreement
    tokens = inputs(config, 14)["input_ids"]
    assert torch.equal(greedy(tmp_path / "out", tokens), greedy(src, tokens))


@pytest.mark.parametrize("kind", SOURCES)
def test_every_field_of_a_family_is_read_refused_or_known_to_change_nothing(kind):
    """What a release of transformers adds is found here."""
    own = {x.name for x in fields(CONFIG_MAPPING[kind])} - {x.name for x in fields(PreTrainedConfig)}
    config, read = CONFIG_MAPPING[kind](), set()

    class Watched:
        def __getattr__(self, name):
            read.add(config.attribute_map.get(name, name))
            return getattr(config, name)

    said(Watched())
    pattern_of(Watched())
    left_behind(Watched())
    assert own - read == set(SOURCES[kind].unused)
    assert not read & set(SOURCES[kind].unused)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text", "gpt2", "phi3", "lci around RWA"])
def test_weights_of_16_bits_are_copied_to_the_bit(tmp_path, name):
    """Gemma's gains are stored less one: 1 + w would round them."""
    with quiet():
        src = DECODERS[name](tmp_path / "src", torch.bfloat16)
    growth.transfer(src, tmp_path / "out", pattern=pattern_of(Checkpoint(src).config))
    old, new = Checkpoint(src), Checkpoint(tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "growth.json").read_text())["tensors"]
    for row in rows:
        x, (of,) = new.read(row["name"]), row["sources"]
        whole = old.read(of)
        exact = torch.float32 if row["name"].endswith("A_log") else torch.bfloat16
        assert x.dtype == whole.dtype == exact
        if x.shape == whole.shape and name != "gpt2":
            assert torch.equal(x.view(torch.uint8), whole.view(torch.uint8)), row["name"]
        else:  # a part of a fused one, or turned
            assert set(x.flatten().tolist()) <= set(whole.flatten().tolist()), row["name"]
    assert growth.check(src, tmp_path / "out").kept


def test_an_a_in_the_pattern_is_attention_as_the_source_has_it_there(decoder, tmp_path):
    for given, pattern in (
        ({"pattern": "RAA"}, "RWA"),
        ({"pattern": "RWA"}, "RWA"),
        ({"keep_attention": [1, 2]}, "RWA"),
        ({"mixers": "attention"}, "WWA"),
    ):
        report = growth.transfer(decoder("gemma3_text"), tmp_path / "none", dry_run=True, **given)
        assert report.method == f"xatl {pattern}"
    with pytest.raises(
        Refusal, match=r"layer 2: expected attention .*, got W, .* source has attention \(A\)"
    ):
        growth.transfer(decoder("gemma3_text"), tmp_path / "none", pattern="RRW")


def test_what_was_transferred_is_a_source_again(decoder, tmp_path):
    """Layers whose letters stay are copied as they are, decays too; the rest goes on from attention."""
    growth.transfer(decoder("qwen3"), tmp_path / "one", pattern="RAA", decays=[0.5, 0.8, 0.9, 1.0])
    report = growth.transfer(tmp_path / "one", tmp_path / "two", pattern="RSA")
    origins = {(row.name.split(".")[2], row.origin) for row in report.plan.rows if ".mixer." in row.name}
    assert origins == {("0", "copied"), ("1", "initialised"), ("2", "copied")}
    assert not any("layers.0" in name or "layers.2" in name for name in report.plan.dropped)
    back = growth.transfer(tmp_path / "one", tmp_path / "none", pattern="MAA", dry_run=True).plan.dropped
    assert back["model.layers.0.mixer.g_proj.weight"] == "Mamba has no tensor of this role and shape"
    config = Checkpoint(tmp_path / "two").config
    assert config.retention_log_decay == Checkpoint(tmp_path / "one").config.retention_log_decay
    with pytest.raises(Refusal, match=r"layer 0: .* got A, where the source has retention \(R\).*RAA"):
        growth.transfer(tmp_path / "one", tmp_path / "no", mixers="attention")
    with pytest.raises(Refusal, match="decays: expected none, for the source has layers of retention"):
        growth.transfer(tmp_path / "one", tmp_path / "no", pattern="RRA", decays="learned")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "kind, why",
    [
        (BertConfig, "bert, an encoder, which reads both ways"),
        (T5Config, "t5, an encoder and a decoder"),
        (ViTConfig, "vit, which reads images"),
        (DistilBertConfig, "distilbert"),
    ],
)
def test_what_is_no_decoder_is_refused_with_what_to_pass(tmp_path, kind, why):
    src = neox(tmp_path / "src")
    kind().save_pretrained(src)
    with pytest.raises(
        Refusal, match=f"src: expected a decoder out of gpt_neox, .*got {why}; pass a language"
    ):
        growth.transfer(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, field, value, message",
    [
        (
            "gemma",
            "use_bidirectional_attention",
            True,
            "gemma: use_bidirectional_attention: expected None or False",
        ),
        ("gpt2", "add_cross_attention", True, "add_cross_attention: expected"),
        (
            "qwen2",
            "layer_types",
            ["chunked_attention"] * 3,
            "qwen2: layer_types: expected full_attention or slid",
        ),
        ("qwen2", "sliding_window", None, "qwen2: sliding_window: expected a number of tokens"),
        ("qwen2", "sliding_window", 1, "qwen2: .*sliding_window.*at least 2.*1"),
        ("llama", "hidden_act", "glorious", "llama: .*hidden_act.*'glorious'"),
    ],
)
def test_what_our_model_does_not_compute_is_refused_by_its_field(decoder, name, field, value, message):
    config = AutoConfig.from_pretrained(decoder(name))
    setattr(config, field, value)
    with pytest.raises(Refusal, match=message):
        lci_config(config, pattern_of(config), "float32")


def test_shares_that_training_drops_are_named_as_left_behind():
    config = CONFIG_MAPPING["phi3"](resid_pdrop=0.1, attention_dropout=0.2)
    assert left_behind(config) == (
        "resid_pdrop 0.1 of the source is left behind: an LCI model has no dropout",
        "attention_dropout 0.2 of the source is left behind: an LCI model has no dropout",
    )


def test_a_fused_projection_is_read_once_with_its_bias(decoder, tmp_path, monkeypatch):
    read, whole = Checkpoint.read, []

    def told(checkpoint, name, *rows):  # the fingerprint reads by rows
        whole.extend(() if rows else (name,))
        return read(checkpoint, name, *rows)

    monkeypatch.setattr(Checkpoint, "read", told)
    growth.transfer(decoder("gpt_neox"), tmp_path / "out", mixers="attention")
    fused = [name for name in whole if "query_key_value" in name]
    assert len(fused) == len(set(fused)) == 6


def test_what_lies_alike_is_copied_in_blocks(decoder, tmp_path, monkeypatch):
    read, most = Checkpoint.read, []

    def told(checkpoint, name, *rows):
        x = read(checkpoint, name, *rows)
        most.append(x.numel())
        return x

    monkeypatch.setattr(Checkpoint, "read", told)
    monkeypatch.setattr("growth.checkpoint.BLOCK", 640)
    report = growth.transfer(decoder("gemma3_text"), tmp_path / "out", mixers="attention")
    assert max(most) == 640 and max(math.prod(row.shape) for row in report.plan.rows) > 6000
    monkeypatch.undo()
    assert growth.check(decoder("gemma3_text"), tmp_path / "out").kept


@pytest.mark.parametrize("copy, copied", [("output", {"o"}), ("all", {"q", "k", "v", "o"})])
def test_retention_takes_shared_heads_norms_and_biases_of_attention(decoder, tmp_path, copy, copied):
    """Of 4 heads of 24 that share 2 of keys and values, in a stream of 64."""
    src = decoder("qwen3")
    growth.transfer(src, tmp_path / "out", mixers="retention", copy=copy)
    old, new = Checkpoint(src), Checkpoint(tmp_path / "out")
    config = new.config
    assert (config.retention_num_heads, config.retention_num_kv_heads, config.retention_head_dim) == (
        4,
        2,
        24,
    )
    assert new.shape("model.layers.1.mixer.v_proj.weight") == (48, 64)

    def same(part):
        names = f"model.layers.1.self_attn.{part}.weight", f"model.layers.1.mixer.{part}.weight"
        return torch.equal(old.read(names[0]), new.read(names[1]))

    assert {part for part in "qkvo" if same(f"{part}_proj")} == copied
    assert same("q_norm") and same("k_norm")
    assert "model.layers.1.mixer.g_proj.bias" not in new.names and config.attention_out_bias in (None, False)
    assert greedy(tmp_path / "out", torch.tensor([[3, 4, 5]])).shape == (1, 15)


def test_qwen2_keeps_biases_of_q_k_v_alone(decoder, tmp_path):
    growth.transfer(decoder("qwen2"), tmp_path / "out", pattern="RWM")
    names = Checkpoint(tmp_path / "out").names
    biased = {
        name.split(".mixer.")[1] for name in names if "layers.0.mixer" in name and name.endswith("bias")
    }
    assert biased == {f"{part}_proj.bias" for part in "qkvg"}


@pytest.mark.parametrize(
    "decays, logs",
    [
        ("retnet", None),
        ("alibi", [-(2.0**-2), -(2.0**-4), -(2.0**-6), -(2.0**-8)]),
        ([0.5, 1.0, 0.25, 0.125], [math.log(0.5), 0.0, math.log(0.25), math.log(0.125)]),
    ],
    ids=str,
)
def test_decays_are_those_that_were_asked_for(decoder, tmp_path, decays, logs):
    growth.transfer(decoder("llama"), tmp_path / "out", decays=decays)
    config = Checkpoint(tmp_path / "out").config
    assert config.retention_log_decay == (logs and pytest.approx(logs))
    assert not config.retention_learned_decay


def test_learned_decays_start_as_retnet_s_in_float32_and_go_with_their_heads(tmp_path):
    """A head that is copied when the model grows keeps the decay of the one that it copies."""
    with quiet():
        src = DECODERS["llama"](tmp_path / "src", torch.bfloat16)
    growth.transfer(src, tmp_path / "out", pattern="RAR", decays="learned")
    logs = Checkpoint(tmp_path / "out").read("model.layers.0.mixer.A_log")
    assert logs.dtype == torch.float32
    assert torch.allclose(-logs.exp(), torch.log1p(-torch.exp2(-5.0 - torch.arange(4.0))))
    assert growth.grow(tmp_path / "out", tmp_path / "wide", hidden_size=128).lossless
    wide = Checkpoint(tmp_path / "wide").read("model.layers.0.mixer.A_log")
    # 4 heads in 2 groups: 0 1, 2 3; the new groups are copies.
    assert torch.equal(wide, logs[[0, 1, 2, 3, 0, 1, 2, 3]])
    assert growth.check(tmp_path / "out", tmp_path / "wide").kept


def test_other_heads_of_retention_are_as_wide_together(decoder, tmp_path):
    report = growth.transfer(decoder("qwen3"), tmp_path / "out", retention_heads=2, copy="all")
    assert Checkpoint(tmp_path / "out").config.heads_of("R") == (2, 2, 48)
    origins = {row.name: row.origin for row in report.plan.rows if "layers.0.mixer." in row.name}
    assert origins["model.layers.0.mixer.q_proj.weight"] == "regrouped"
    assert origins["model.layers.0.mixer.o_proj.weight"] == "copied"
    assert not report.plan.dropped


def test_other_heads_than_longrope_has_factors_for_are_refused(decoder, tmp_path):
    with pytest.raises(
        Refusal, match="retention-heads: expected 4, for longrope has .*, got 2; leave it out"
    ):
        growth.transfer(decoder("phi3 longrope"), tmp_path / "out", retention_heads=2)
    assert not (tmp_path / "out").exists()
