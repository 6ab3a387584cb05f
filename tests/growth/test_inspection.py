"""`inspect` says what a checkpoint is made of and what each verb does with it, by trying."""

import json
import re

import pytest
import torch
from checkpoints import ALL, bert, gpt2, saved
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import growth
from growth.errors import Refusal
from growth.inspection import inspect
from lcikernels.models import LCIConfig, LCIForCausalLM

SIZES = {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 160}
SIZES |= {"vocab_size": 256, "max_position_embeddings": 32}
GROUPS = SIZES | {"num_key_value_heads": 2}
MAKERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPS)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPS, head_dim=32)),
    "bert": (BertModel, BertConfig(**SIZES)),
    "lci": (LCIForCausalLM, LCIConfig(**SIZES, pattern="RAM", state_size=8)),
}


@pytest.fixture(scope="module", params=[*MAKERS, "gpt2"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "gpt2":
        return gpt2(path)
    return saved(*MAKERS[request.param], path, torch.float32)


def made(name, tmp_path):
    return saved(*MAKERS[name], tmp_path / name, torch.float32)


def ways(found):
    return {way.size: way for way in found.grow}


def test_every_tensor_and_every_wire_is_named_in_the_lines_and_in_json(folder):
    found = inspect(folder)
    text, told = "\n".join(found.lines()), json.loads(json.dumps(found.json()))
    assert text.startswith(f"{folder}: {found.family}, 3 layers, {len(found.tensors)} tensors")
    for held in found.tensors:
        assert held.name in text
    for name, wire in found.wires.items():
        assert f"wire {name.replace('{}', '*')}" in text and told["wires"][name]["units"] == wire.units
    assert found.parameters == sum(torch.Size(held["shape"]).numel() for held in told["tensors"])
    assert told["wires"]["vocab"]["fixed"] and not told["wires"]["residual"]["fixed"]


@pytest.mark.parametrize("size, flag", [("hidden size", "hidden_size"), ("layers", "num_layers")])
def test_what_is_said_to_be_lossless_grows_by_lemon_and_the_rest_is_refused(folder, tmp_path, size, flag):
    tried = ways(inspect(folder))[size].lossless
    assert tried
    for number, losses in tried.items():
        if losses:
            with pytest.raises(Refusal):
                growth.grow(folder, method="lemon", dry_run=True, **{flag: int(number)})
        else:
            assert growth.grow(folder, method="lemon", dry_run=True, **{flag: int(number)}).lossless


def test_widths_follow_the_heads_where_these_have_no_size_of_their_own(tmp_path):
    llama, qwen3 = (ways(inspect(made(name, tmp_path))) for name in ("llama", "qwen3"))
    assert llama["hidden size"].to.startswith("to any multiple of the head size 24")
    assert "given" not in llama["hidden size"].to, "heads that do not divide it are refused by transformers"
    assert llama["heads"].to == "to any number above"
    assert qwen3["hidden size"].to == "to any number above"
    heads = ways(inspect(gpt2(tmp_path / "gpt2")))
    assert "given" not in heads["hidden size"].to
    assert heads["heads"].to == "to any number above, the width with them"
    assert growth.grow(tmp_path / "gpt2", num_heads=5, method="lemon", dry_run=True).sizes["hidden-size"]


def test_norms_after_the_sum_lose_their_statistics_at_all_but_whole_multiples(tmp_path):
    found = inspect(made("bert", tmp_path))
    way = ways(found)["hidden size"]
    assert way.lossless["192"] == [] and "embed_norm: the mean and variance" in way.lossless["120"][0]
    assert found.parts == ("pooler",) and found.auto == "AutoModel"
    assert found.train.startswith("no: ")


def test_groups_of_heads_are_told_where_a_model_has_them(tmp_path):
    groups = ways(inspect(made("llama", tmp_path)))["kv heads"]
    assert groups.have == 2 and groups.lossless == {"3 groups of 2": [], "2 groups of 3": []}
    assert "kv heads" not in ways(inspect(made("bert", tmp_path)))


@pytest.mark.parametrize(
    "name, told",
    [
        ("gpt_neox", "to retention, mamba, mamba2, or a pattern of these with what the layers are now (AAA)"),
        (
            "gemma3_text",
            "to retention, mamba, mamba2, or a pattern of these with what the layers are now (WWA)",
        ),
        ("lci RAM", "to retention, mamba, mamba2, or a pattern of these with what the layers are now (RAM)"),
        ("bert", "no: {src}: expected a decoder out of gpt_neox, "),
        ("t5", "no: {src}: expected a decoder out of gpt_neox, "),
    ],
)
def test_only_what_can_be_transferred_is_said_to_be(tmp_path, name, told):
    src = ALL[name](tmp_path / "src")
    said = inspect(src).transfer
    assert said.startswith(told.format(src=src))
    kept = said.partition("now (")[2].removesuffix(")")
    for pattern in filter(None, (kept, "RRR", "MMM", "SSS")):
        if said.startswith("to"):
            growth.transfer(src, pattern=pattern, dst=tmp_path / "none", dry_run=True)
        else:
            with pytest.raises(Refusal):
                growth.transfer(src, pattern=pattern, dst=tmp_path / "none", dry_run=True)


def test_a_mixer_that_a_source_cannot_have_is_named_with_the_reason(tmp_path):
    """Retention turns as full attention does; where no layer has that, nothing says how."""
    alone = {"sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}, "full_attention": None}
    src = ALL["lci AAA"](tmp_path / "src", pattern="WWW", sliding_window=8, rope_parameters=alone)
    told = inspect(src).transfer
    assert told.startswith(
        "to mamba, mamba2, or a pattern of these with what the layers are now (WWW); not to r"
    )
    assert "rope_parameters['full_attention']" in told


def test_a_setting_that_cannot_be_transferred_is_named(tmp_path):
    src = ALL["qwen2"](tmp_path / "src", sliding_window=1)
    assert re.match("no: qwen2: expected .*sliding_window", inspect(src).transfer)


def test_layers_whose_number_counts_are_not_added(tmp_path):
    way = ways(inspect(gpt2(tmp_path / "src", scale_attn_by_inverse_layer_idx=True)))["layers"]
    assert way.lossless == {} and "a layer's number enters its attention" in way.to


def test_a_masked_model_is_trained_on_masked_text(tmp_path):
    assert "masked" in inspect(bert(tmp_path / "src")).train
