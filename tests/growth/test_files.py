"""Checkpoints on disk: whole or not there, one tensor at a time, readable by transformers."""

import json

import pytest
import torch
from checkpoints import neox
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import growth
from growth import writing
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.folders import staged
from growth.record import RECORD


def test_a_folder_appears_only_when_all_of_it_is_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as folder:
        (folder / "half").write_text("done")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "out") as folder:
        (folder / "all").write_text("done")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "all"]


def test_shards_are_bounded_and_loaded_by_transformers(source, tmp_path, monkeypatch):
    monkeypatch.setitem(writing.write_checkpoint.__kwdefaults__, "shard_bytes", 200_000)
    growth.grow(source, tmp_path / "out", method="lemon", hidden_size=120)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(x.numel() * 4 for x in load_file(shard).values()) <= 200_000 for shard in shards)
    assert growth.check(source, tmp_path / "out").kept
    assert len(Checkpoint(tmp_path / "out").names) == len(Checkpoint(source).names)


def test_the_result_carries_tokenizer_and_history(source, tmp_path):
    growth.grow(source, tmp_path / "out", method="stack", num_layers=6, seed=3)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode(list(b"def f(): ...")) == "def f(): ..."
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["method"] == "stack" and record["seed"] == 3 and record["from"]["num_layers"] == 3
    names = {row["name"] for row in record["tensors"]}
    assert names == set(Checkpoint(tmp_path / "out").names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_checkpoint_stays_16_bit_and_keeps_its_promise_but_for_rounding(tmp_path, dtype):
    src = neox(tmp_path / "src", dtype)
    growth.grow(src, tmp_path / "out", method="lemon", hidden_size=168)
    grown = Checkpoint(tmp_path / "out")
    assert {grown.dtype(name) for name in grown.names} == {dtype}
    agreement = growth.check(src, tmp_path / "out")
    assert agreement.kept and agreement.stored > agreement.float32 > 0


def test_the_same_call_writes_the_same_bytes(source, tmp_path):
    for name in ("a", "b"):
        growth.grow(source, tmp_path / name, method="lemon", hidden_size=168, num_layers=4)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_tied_head_that_a_file_holds_all_the_same_is_left_alone(tmp_path):
    src = neox(tmp_path / "src", tie_word_embeddings=True)
    tensors = load_file(src / "model.safetensors")
    tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"].clone()
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    assert growth.grow(src, tmp_path / "out", method="lemon", hidden_size=120).lossless
    assert growth.check(src, tmp_path / "out").kept


def test_a_broken_promise_is_found(source, tmp_path):
    growth.grow(source, tmp_path / "out", method="lemon", hidden_size=168)
    assert growth.check(source, tmp_path / "out").kept
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["gpt_neox.final_layer_norm.weight"] *= 1.001
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert not growth.check(source, tmp_path / "out").kept


def test_models_of_different_vocabularies_are_not_compared(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(Refusal, match="vocabulary of 256, got 200"):
        growth.check(source, tmp_path / "other")


def test_an_index_that_names_an_absent_shard_is_refused(source, tmp_path):
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "src", max_shard_size="200KB")
    next((tmp_path / "src").glob("model-00002*")).unlink()
    with pytest.raises(Refusal, match="model-00002.*expected a safetensors file, got none there"):
        Checkpoint(tmp_path / "src")
