"""Checkpoints that are hostile, damaged or odd: told in one line, early; nothing is written, nothing run."""

import json
import os
import shutil
from dataclasses import fields

import pytest
import torch
from checkpoints import gpt2, neox
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import growth
from growth.checkpoint import INDEX, Checkpoint
from growth.errors import Refusal
from growth.methods import METHODS
from growth.transferring.align import Alignment

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture
def src(source, tmp_path):
    """A source of one's own, to be changed."""
    return shutil.copytree(source, tmp_path / "src")


@pytest.fixture
def refused(src, tmp_path):
    """That growth of `src` is refused in one line which says so, and leaves nothing."""

    def check(message: str, verb=growth.grow, **options):
        options = options or ({"method": "lemon", "num_layers": 4} if verb is growth.grow else {})
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(Refusal, match=message) as refusal:
            verb(src, tmp_path / "out", **options)
        assert len(str(refusal.value).splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == before

    return check


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CONFIG = {
    "heads below zero": ({"num_attention_heads": -2}, "num_attention_heads: expected 1 to"),
    "no words": ({"vocab_size": 0}, "vocab_size: expected 1 to"),
    "neurons below zero": ({"intermediate_size": -1}, "intermediate_size: expected 1 to"),
    "a width beyond any machine": ({"hidden_size": 10**30}, "hidden_size: expected 1 to"),
    "layers beyond any machine": ({"num_hidden_layers": 10**6}, "expected at most 40 layers"),
    "more layers than there are": ({"num_hidden_layers": 4}, "missing: gpt_neox.layers.3"),
    "heads that do not divide": ({"num_attention_heads": 5}, "hidden size is not divisible"),
    "a dtype of nobody": ({"dtype": "float99"}, "expected a configuration"),
    "a width that is a list": ({"hidden_size": [96]}, "expected a configuration"),
    "positions that are a word": ({"rope_parameters": "x"}, "expected a configuration"),
    "neurons of GPT-2 below zero": ({"model_type": "gpt2", "n_inner": -1}, "n_inner: expected 1 to"),
    "an eps below zero": ({"layer_norm_eps": -1.0}, "layer_norm_eps: expected at least 0, and finite"),
    "an eps of nothing": ({"layer_norm_eps": float("nan")}, "layer_norm_eps: expected at least 0"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "that is not quantized"),
    "compressed": ({"compression_config": {"format": "pack-quantized"}}, "not quantized, got compression"),
    "a kind of nobody": (
        {"model_type": "gpt-neoxx"},
        "got 'gpt-neoxx'; if that is a slip, write gpt_neox; Python code",
    ),
    "no kind": ({"model_type": None}, "expected a configuration"),
}


@pytest.mark.parametrize("name", CONFIG)
def test_a_configuration_that_cannot_be_is_refused(src, refused, name):
    values, message = CONFIG[name]
    change(src / "config.json", **values)
    refused(message)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_to_be_merged_first(src, refused, whole):
    """Beside the weights of its base model, too: without it these are another model."""
    (src / "adapter_config.json").write_text("{}")
    growth.grow(src, src.parent / "out", method="lemon", num_layers=4)  # nothing is left of the adapter
    shutil.rmtree(src.parent / "out")
    (src / "adapter_model.safetensors").touch()
    if not whole:
        (src / "config.json").unlink()
        (src / "model.safetensors").unlink()
    refused("expected a whole model, got an adapter .*; merge it into its base model .* merge_and_unload")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.gguf"])
def test_weights_in_another_format_are_named(src, refused, name):
    (src / "model.safetensors").rename(src / name)
    refused(f"expected a safetensors file, got {name} alone; .* save it with save_pretrained")


def test_a_model_with_another_head_or_of_no_known_kind_is_told_what_it_is(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 256}
    LlamaForSequenceClassification(LlamaConfig(num_hidden_layers=1, **sizes)).save_pretrained(
        tmp_path / "head"
    )
    head = "name a LlamaForCausalLM: this is a LlamaForSequenceClassification, whose head is not taken"
    small = DistilBertConfig(dim=32, n_heads=2, hidden_dim=64, n_layers=1, vocab_size=256)
    DistilBertForMaskedLM(small).save_pretrained(tmp_path / "unknown")
    with pytest.raises(Refusal, match=head):
        growth.grow(tmp_path / "head", tmp_path / "out", method="lemon", num_layers=2)
    with pytest.raises(Refusal, match=head):
        growth.check(tmp_path / "head", tmp_path / "head")
    with pytest.raises(Refusal, match="expected a causal language model, .* got distilbert; name another"):
        growth.check(tmp_path / "unknown", tmp_path / "unknown")


@pytest.mark.parametrize(
    "text", [DEEP, "[1]", "", "\x00", "3"], ids=["deep", "list", "empty", "NUL", "number"]
)
@pytest.mark.parametrize("name", ["config.json", INDEX, "growth.json", "generation_config.json"])
def test_json_of_another_shape_is_refused_wherever_it_stands(src, refused, name, text):
    if name == INDEX:
        (src / "model.safetensors").rename(src / "model-00001-of-00001.safetensors")
    (src / name).write_text(text)
    refused(f"{name}: expected")


@pytest.mark.parametrize(
    "weight_map",
    [
        [], 3, {"a": 3}, {"a": "x" * 300}, {"a": "../x"}, {"a": "model-1.safetensors"},
        {"a": "b/../model-1.safetensors"}, None,
    ],
)  # fmt: skip
def test_an_index_that_leads_astray_is_refused(src, refused, weight_map):
    (src / "model.safetensors").rename(src / "model-1.safetensors")
    whole = dict.fromkeys(load_file(src / "model-1.safetensors"), "model-1.safetensors")
    whole.pop("embed_out.weight")
    (src / INDEX).write_text(json.dumps({"weight_map": whole if weight_map is None else weight_map}))
    refused("expected a safetensors file" if "xxx" in str(weight_map) else f"{INDEX}: expected")


def test_a_tensor_that_two_shards_hold_is_refused(src, refused):
    tensors = load_file(src / "model.safetensors")
    (src / "model.safetensors").unlink()
    for i in (1, 2):
        save_file(tensors, src / f"model-{i}.safetensors", {"format": "pt"})
    where = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(tensors)}
    (src / INDEX).write_text(json.dumps({"weight_map": where}))
    refused("expected tensors that no other shard holds")


DTYPES = [torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_no_floats_are_refused(src, refused, text, dtype):
    file = src / "model.safetensors"
    save_file({name: x.to(dtype) for name, x in load_file(file).items()}, file, {"format": "pt"})
    for verb in (growth.grow, growth.transfer):
        refused("expected a dtype out of F64, F32, F16, BF16", verb)
    refused("expected a dtype out of", lambda src, out: growth.train(src, text, out, steps=1))


def test_each_tensor_keeps_its_own_dtype(src, tmp_path):
    """As peers' checkpoints have it: norms and one layer in float32, the rest in 16 bits."""
    file = src / "model.safetensors"
    exact = ("norm", "layers.1.")
    tensors = load_file(file)
    save_file(
        {name: x if any(part in name for part in exact) else x.bfloat16() for name, x in tensors.items()},
        file,
        {"format": "pt"},
    )
    for name, make in {
        "grown": lambda out: growth.grow(src, out, method="lemon", num_layers=4),
        "transferred": lambda out: growth.transfer(src, out, mixers="attention"),
    }.items():
        make(tmp_path / name)
        kinds = {key: x.dtype for key, x in load_file(tmp_path / name / "model.safetensors").items()}
        layer = {"grown": "gpt_neox.layers.1.", "transferred": "model.layers.1."}[name]
        for key, dtype in kinds.items():
            want = torch.float32 if "norm" in key or key.startswith(layer) else torch.bfloat16
            assert dtype == want or "layers.3" in key, key  # which LEMON adds
        assert growth.check(src, tmp_path / name).kept


def test_the_rates_of_a_mamba_stay_in_float32_beside_16_bits(tmp_path):
    growth.transfer(neox(tmp_path / "src", torch.bfloat16), tmp_path / "out", mixers="mamba")
    kinds = {name: x.dtype for name, x in load_file(tmp_path / "out" / "model.safetensors").items()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert kinds == {name: x.dtype for name, x in loaded.named_parameters()}
    assert kinds["model.layers.0.mixer.A_log"] == torch.float32
    assert kinds["model.layers.0.mixer.in_proj.weight"] == torch.bfloat16


def test_two_names_of_one_tensor_are_refused_unless_they_are_equal(tmp_path):
    src = gpt2(tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    name = "transformer.h.0.ln_1.weight"
    tensors["h.0.ln_1.weight"] = tensors[name].clone()
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    assert growth.grow(src, tmp_path / "out", method="lemon", num_layers=4).lossless
    tensors["h.0.ln_1.weight"] += 1
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match="expected the values of .*, another name of the same weight"):
        growth.grow(src, tmp_path / "other", method="lemon", num_layers=4)


def test_the_python_of_a_checkpoint_is_never_run_nor_asked_about(src, refused, monkeypatch, text):
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked"))
    ran = src / "ran"
    (src / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    change(src / "config.json", model_type="theirs", auto_map=dict.fromkeys(classes, "theirs.C"))
    refused("Python code that comes with a checkpoint is not run")
    refused("is not run", lambda src, out: growth.train(src, text, out, steps=1))
    change(src / "config.json", model_type="gpt_neox")
    change(src / "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.C", None]})
    growth.check(src, src)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["a folder", "a dangling link", "a link to itself"])
def test_what_only_looks_like_a_tokenizer_is_no_reason_to_fail(src, tmp_path, kind):
    beside = src / "tokenizer_old"
    beside.mkdir() if kind == "a folder" else beside.symlink_to(
        beside if "itself" in kind else tmp_path / "nowhere"
    )
    (src / "vocab.zip").write_text("theirs")
    growth.grow(src, tmp_path / "out", method="lemon", num_layers=4)
    assert not {"tokenizer_old", "vocab.zip"} & {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("kind", ["a folder", "a dangling link", "a pipe"])
def test_a_tokenizer_that_cannot_be_read_is_refused(src, refused, kind):
    file = src / "tokenizer.json"
    file.unlink()
    {"a folder": file.mkdir, "a pipe": lambda: os.mkfifo(file)}.get(kind, lambda: file.symlink_to("no"))()
    refused("tokenizer.json: expected a file of the tokenizer, got (a folder, a pipe|No such file)")


def test_a_tokenizer_arrives_whole_with_its_chat_templates(src, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(src)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(src)
    GenerationConfig(max_new_tokens=7).save_pretrained(src)
    growth.grow(src, tmp_path / "out", method="lemon", num_layers=4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7


def test_a_chain_of_growth_is_recorded(src, tmp_path):
    growth.grow(src, tmp_path / "a", method="lemon", num_layers=4)
    growth.grow(tmp_path / "a", tmp_path / "b", method="stack", num_layers=8, seed=7)
    growth.transfer(tmp_path / "b", tmp_path / "c")
    record = Checkpoint(tmp_path / "c").record()
    assert [(x["verb"], x["method"]) for x in record["lineage"]] == [("grow", "lemon"), ("grow", "stack")]
    fingerprints = [Checkpoint(x).fingerprint() for x in (src, tmp_path / "a", tmp_path / "b")]
    assert [x["fingerprint"] for x in (*record["lineage"], record)] == fingerprints
    assert record["lineage"][1]["seed"] == 7 and "tensors" not in record["lineage"][1]


def test_a_fingerprint_is_of_the_contents_not_of_the_files(src, tmp_path):
    """However the tensors are spread over shards; another number or setting is another checkpoint."""
    first = Checkpoint(src).fingerprint()
    AutoModelForCausalLM.from_pretrained(src).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shutil.copy(src / "config.json", tmp_path / "shards")
    assert Checkpoint(tmp_path / "shards").fingerprint() == first
    tensors = load_file(src / "model.safetensors")
    tensors["gpt_neox.final_layer_norm.bias"][0] += 1
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    assert Checkpoint(src).fingerprint() != first


def test_the_output_says_what_was_written(tmp_path):
    src = gpt2(tmp_path / "src", torch.bfloat16)
    change(src / "config.json", architectures=["GPT2Model"], dtype="float32", attn_pdrop=0.3)
    growth.grow(src, tmp_path / "out", method="lemon", num_layers=4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["dtype"] == "bfloat16"
    assert config["attn_pdrop"] == 0.3


def test_dropout_that_has_no_place_in_the_target_is_reported(tmp_path):
    src = neox(tmp_path / "src", hidden_dropout=0.25)
    report = growth.transfer(src, tmp_path / "out")
    assert report.notes == ("hidden_dropout 0.25 of the source is left behind: an LCI model has no dropout",)
    assert "hidden_dropout 0.25" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("size", ["hidden_size", "num_layers", "ffn_size"])
def test_a_target_that_no_machine_holds_is_refused(refused, size):
    refused("at most 16,777,216, got", method="lemon", **{size: 24 * 10**9})


ODD = (None, {}, [None], float("nan"), 1e300, -1e300, 10**30, -1, 0, 1.5, "", "x", True, (1, 2), object())
CALLS = {
    "grow": {"num_layers": 4} | dict.fromkeys(("shard_bytes", "dtype", "policy", "seed", "method")),
    "shrink": {"num_layers": 2} | dict.fromkeys(("shard_bytes", "dtype", "layers", "score", "seed")),
    "transfer": dict.fromkeys(
        "mixers pattern keep_attention copy decays retention_heads start align format seed".split()
    ),
}


@pytest.mark.parametrize("verb, name", [(verb, name) for verb in CALLS for name in CALLS[verb]])
def test_a_value_of_another_type_is_refused_or_served(source, verb, name):
    """By calls from Python: the command line reads what is typed as what it is to be."""
    usual = {key: value for key, value in CALLS[verb].items() if value is not None}
    for odd in ODD:
        try:
            getattr(growth, verb)(source, dry_run=True, **usual | {name: odd})
        except Refusal as refusal:
            assert "; " in str(refusal) and "\n" not in str(refusal)


@pytest.mark.parametrize("options", [*METHODS.values(), Alignment], ids=lambda x: x.__name__)
def test_an_option_of_another_type_is_refused(options):
    for x in fields(options):
        for odd in ODD if x.name != "data" else ():  # which may be anything that examples come from
            try:
                options(**{x.name: odd})
            except Refusal:
                continue
            assert odd is None or type(odd) in (int, float, bool, str, tuple), (x.name, odd)
