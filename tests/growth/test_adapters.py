"""Names on disk and weights: read both ways, nothing unknown, nothing missing."""

import pytest
import torch
from checkpoints import neox
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXModel

from growth.adapters.gpt_neox import GPT_NEOX
from growth.adapters.lci import LCI
from growth.errors import Refusal
from growth.files import Checkpoint
from growth.plan import Source
from lcikernels.models import LCIConfig, LCIForCausalLM


def test_every_tensor_survives_being_read_and_written(source):
    checkpoint = Checkpoint(source)
    for name, (entry, _) in GPT_NEOX.table(checkpoint.config).items():
        x = checkpoint.read(name)
        assert torch.equal(entry.to_disk(entry.from_disk(x, heads=4), heads=4), x)


def test_queries_are_the_first_rows_of_each_head(source):
    checkpoint = Checkpoint(source)
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    q, k, v = GPT_NEOX.table(checkpoint.config)[name][0].from_disk(checkpoint.read(name), heads=4)
    per_head = checkpoint.read(name).view(4, 3, 24, 96)
    assert torch.equal(q, per_head[:, 0].reshape(96, 96)) and torch.equal(v, per_head[:, 2].reshape(96, 96))


def test_every_declared_space_is_used_and_every_used_one_declared(source):
    architecture = GPT_NEOX.describe(Checkpoint(source).config, GPT_NEOX)
    assert {space for weight in architecture.weights for space in weight.spaces}  == set(
        architecture.spaces
    )


@pytest.mark.parametrize("pattern", ["AAA", "RRR", "MMM", "RAM"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_lci_table_names_exactly_the_model_s_tensors(pattern, tied):
    config = LCIConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=8,
        pattern=pattern,
        tie_word_embeddings=tied,
    )
    assert set(LCI.table(config)) == {name for name, _ in LCIForCausalLM(config).named_parameters()}


def test_a_pattern_with_mamba_2_is_refused():
    config = LCIConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, pattern="RS")
    with pytest.raises(Refusal, match="expected mixers A, R and M, got S, Mamba-2; .* no table yet"):
        LCI.table(config)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_names_of_other_versions_and_old_buffers_are_accepted(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
        tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)

    checkpoint = Checkpoint(rewrite(neox(tmp_path / "old"), change))
    assert Source(checkpoint, GPT_NEOX).where("head.weight", None) == "lm_head.weight"


def test_a_refusal_lists_what_is_unknown_and_what_is_missing(tmp_path):
    def change(tensors):
        tensors["gpt_neox.layers.9.mlp.new"] = tensors.pop("gpt_neox.embed_in.weight")

    folder = rewrite(neox(tmp_path / "wrong"), change)
    with pytest.raises(
        Refusal, match=r"unknown: gpt_neox.layers.9.mlp.new, missing: gpt_neox.embed_in.weight"
    ):
        Source(Checkpoint(folder), GPT_NEOX)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    def change(tensors):
        tensors["gpt_neox.final_layer_norm.bias"] = torch.zeros(95)

    folder = rewrite(neox(tmp_path / "wrong"), change)
    with pytest.raises(Refusal, match=r"final_layer_norm.bias: expected shape \(96,\).*got \(95,\)"):
        Source(Checkpoint(folder), GPT_NEOX)


def test_a_model_without_its_head_is_refused(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    GPTNeoXModel(config).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match="missing"):
        Source(Checkpoint(tmp_path), GPT_NEOX)
