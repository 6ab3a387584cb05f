"""XATL: what two architectures share is copied, the rest starts fresh, and nothing is lost unnoticed."""

import json

import pytest
import torch
from checkpoints import neox
from transformers import AutoModelForCausalLM

import growth
from growth.checkpoint import Checkpoint


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"use_parallel_residual": False},
        {"attention_bias": False},
        {"tie_word_embeddings": True},
        {"hidden_act": "relu"},
    ],
    ids=str,
)
def test_attention_in_every_layer_gives_the_source_s_logits(tmp_path, kind):
    src = neox(tmp_path / "src", **kind)
    report = growth.transfer(src, tmp_path / "out", mixers="attention")
    agreement = growth.check(src, tmp_path / "out")
    assert report.lossless and not report.plan.dropped
    assert agreement.kept and agreement.float32 < 1e-5


@pytest.mark.parametrize(
    "copy, kept",
    [("norms", set()), ("mlp", {"mlp"}), ("output", {"mlp", "o"}), ("all", {"mlp", "o", "q", "k", "v"})],
)
def test_each_copy_mode_copies_what_it_says(source, tmp_path, copy, kept):
    growth.transfer(source, tmp_path / "out", mixers="retention", copy=copy)
    old, new = Checkpoint(source), Checkpoint(tmp_path / "out")
    pairs = {
        "mlp": ("gpt_neox.layers.1.mlp.dense_4h_to_h.weight", "model.layers.1.mlp.down_proj.weight"),
        "o": ("gpt_neox.layers.1.attention.dense.weight", "model.layers.1.mixer.o_proj.weight"),
    }
    qkv = old.read("gpt_neox.layers.1.attention.query_key_value.weight").view(4, 3, 24, 96)
    same = {part for part, (a, b) in pairs.items() if torch.equal(old.read(a), new.read(b))}
    same |= {
        part
        for i, part in enumerate("qkv")
        if torch.equal(qkv[:, i].flatten(0, 1), new.read(f"model.layers.1.mixer.{part}_proj.weight"))
    }
    assert same == kept
    assert torch.equal(old.read("gpt_neox.embed_in.weight"), new.read("model.embed_tokens.weight"))


@pytest.mark.parametrize("copy", ["norms", "mlp"])
def test_attention_in_every_layer_is_lossless_only_with_the_feed_forward_blocks(source, tmp_path, copy):
    report = growth.transfer(source, tmp_path / "out", mixers="attention", copy=copy)
    assert report.lossless == (copy == "mlp") == (growth.check(source, tmp_path / "out").float32 < 1e-5)


def test_every_source_tensor_is_used_or_named_as_dropped(source, tmp_path):
    report = growth.transfer(source, tmp_path / "out", pattern="RMA", dry_run=True)
    used = {name for row in report.plan.rows for name in row.sources}
    assert used | set(report.plan.dropped) == set(Checkpoint(source).names)
    assert not used & set(report.plan.dropped)
    assert "gpt_neox.layers.1.attention.dense.weight" in report.plan.dropped  # Mamba has no place for it
    assert not any("layers.2" in name for name in report.plan.dropped)  # attention is copied whole
    assert not (tmp_path / "out").exists()


def test_a_fresh_tensor_depends_on_its_name_and_the_seed_alone(source, tmp_path):
    for name, pattern, seed in (("a", "RAM", 0), ("b", "RRA", 0), ("c", "RAM", 1)):
        growth.transfer(source, tmp_path / name, pattern=pattern, seed=seed)
    q, x = "model.layers.0.mixer.q_proj.weight", "model.layers.2.mixer.A_log"
    a, b, c = (Checkpoint(tmp_path / name) for name in "abc")
    assert torch.equal(a.read(q), b.read(q)) and not torch.equal(a.read(q), c.read(q))
    assert torch.equal(a.read(x)[0], torch.arange(1, 17).log())


def test_the_norm_in_front_of_a_fresh_mixer_is_not_held_still(source, tmp_path):
    growth.transfer(source, tmp_path / "out", pattern="RMA")
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "growth.json").read_text())["tensors"]}
    frozen = {layer: rows[f"model.layers.{layer}.mixer_norm.weight"]["freeze"] for layer in range(3)}
    assert frozen == {0: True, 1: False, 2: True}
    assert rows["model.layers.1.mlp_norm.weight"]["freeze"] and rows["lm_head.weight"]["freeze"]
    assert not any(row["freeze"] for row in rows.values() if row["origin"] == "initialised")


@pytest.mark.parametrize("pattern", ["RRR", "MMM", "RAM"])
def test_a_transferred_checkpoint_writes_text_with_plain_transformers(source, tmp_path, pattern):
    growth.transfer(source, tmp_path / "out", pattern=pattern)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    text = model.generate(torch.tensor([[100, 101, 102]]), max_new_tokens=8, do_sample=False)
    assert text.shape == (1, 11)
