"""Names on disk and weights: read both ways, nothing unknown, nothing missing."""

import pytest
import torch
from checkpoints import FAMILIES, bert, gpt2, neox
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXModel

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.families import FAMILIES as TABLES
from growth.families.lci import LCI
from growth.inspection import LEMON, inspect
from growth.loading import load_model
from growth.plan import Source
from growth.sizes import Sizes, resized
from lcikernels.models import LCIConfig, LCIForCausalLM


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """A checkpoint with a head of its own: all the tensors there are."""
    return Source(Checkpoint(FAMILIES[request.param](tmp_path / "source", tie_word_embeddings=False)))


def test_every_tensor_survives_being_read_and_written(family):
    for name, (entry, _) in family.table.items():
        x = family.checkpoint.read(name)
        assert torch.equal(entry.to_disk(entry.from_disk(x)), x)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_names_exactly_what_transformers_writes(tmp_path, name, tied):
    source = Source(Checkpoint(FAMILIES[name](tmp_path / "source", tie_word_embeddings=tied)))
    assert set(source.table) == set(source.checkpoint.names)


def test_queries_are_the_first_rows_of_each_head(source):
    found = Source(Checkpoint(source))
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    q, k, v = found.table[name][0].from_disk(found.checkpoint.read(name))
    per_head = found.checkpoint.read(name).view(4, 3, 24, 96)
    assert torch.equal(q, per_head[:, 0].reshape(96, 96)) and torch.equal(v, per_head[:, 2].reshape(96, 96))


def test_gpt_2_s_fused_projection_computes_q_k_and_v(tmp_path):
    folder = gpt2(tmp_path / "source")
    attention = load_model(folder).transformer.h[1].attn
    x = torch.randn(5, 96)
    fused = attention.c_attn(x).detach()
    tensors = {}
    source = Source(Checkpoint(folder))
    for kind in ("weight", "bias"):
        name = f"transformer.h.1.attn.c_attn.{kind}"
        entry, layer = source.table[name]
        parts = entry.from_disk(source.checkpoint.read(name))
        tensors |= {weight.name.format(layer): part for weight, part in zip(entry.weights, parts)}
    for part, own in zip("qkv", fused.split(96, dim=1)):
        W, b = (tensors[f"layers.1.mixer.{part}.{kind}"] for kind in ("weight", "bias"))
        assert torch.allclose(x @ W.T + b, own, atol=1e-5)


def test_every_wire_that_a_weight_has_is_declared(family):
    model = family.model.architecture
    weights = (*model.outside, *model.layered.values())
    assert {wire for weight in weights for wire in weight.wires} <= set(model.wires)


@pytest.mark.parametrize("pattern", ["AAA", "RRR", "MMM", "RAM", "SSS", "SMA"])
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
    model = LCI.model(config)
    shapes = {name: entry.shape(model.architecture) for name, (entry, _) in model.table().items()}
    assert shapes == {name: tuple(x.shape) for name, x in LCIForCausalLM(config).named_parameters()}


def test_groups_of_mamba_2_s_heads_do_not_widen():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mamba2_num_heads": 4}
    model = LCI.model(LCIConfig(**sizes, pattern="RS", mamba2_n_groups=2))
    with pytest.raises(Refusal, match="mamba2_n_groups: expected 1, got 2"):
        resized(model, Sizes(hidden=64), LEMON.layers)


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
    assert Source(checkpoint).where("head.weight", None) == "lm_head.weight"


def hub_s_gpt2(tensors):
    """No prefix, the masks of every layer, and the head once more."""
    head = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(3)}
    masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(3)}
    tensors |= {name.removeprefix("transformer."): tensors.pop(name) for name in list(tensors)}
    tensors |= head | masks


def google_s_bert(tensors):
    """gamma and beta, the decoder once more, and all that a masked language model does not use."""
    for name in list(tensors):
        new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[new] = tensors.pop(name)
    decoder = {"weight": "bert.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}
    for kind, twin in decoder.items():
        tensors[f"cls.predictions.decoder.{kind}"] = tensors[twin].clone()
    for name, rows in {"bert.pooler.dense": 96, "cls.seq_relationship": 2}.items():
        tensors |= {f"{name}.weight": torch.ones(rows, 96), f"{name}.bias": torch.ones(rows)}
    tensors["bert.embeddings.position_ids"] = torch.arange(32)[None]


@pytest.mark.parametrize(
    "write, change, kind", [(gpt2, hub_s_gpt2, "GPT2LMHeadModel"), (bert, google_s_bert, "BertForMaskedLM")]
)
def test_files_as_they_were_published_grow_and_what_is_left_behind_is_named(tmp_path, write, change, kind):
    src = rewrite(write(tmp_path / "src"), change)
    assert any("residual" in line for line in inspect(src).lines())
    report = growth.grow(src, tmp_path / "out", method="lemon", hidden_size=192, num_layers=4)
    agreement = growth.check(src, tmp_path / "out")
    assert agreement.limit and agreement.kept
    used = {name for row in report.plan.rows for name in row.sources}
    assert used | set(report.plan.dropped) == set(Checkpoint(src).names)
    twins = {name: why for name, why in report.plan.dropped.items() if why.startswith("it repeats ")}
    assert set(twins.values()) <= {f"it repeats {name}" for name in Checkpoint(src).names}
    assert {report.plan.dropped[name] for name in report.plan.dropped.keys() - twins} == {
        f"a {kind} has none"
    }
    assert twins.keys() == {name for name in report.plan.dropped if "decoder" in name or "lm_head" in name}
    assert twins or kind == "GPT2LMHeadModel"
    assert not any("h.0.ln" in name or "LayerNorm" in name for name in report.plan.dropped)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tied_head_that_is_stored_and_differs_is_refused(tmp_path, name):
    """transformers reads it as a head of its own."""
    (head, twin), *_ = TABLES[name].tied.items()

    def change(tensors):
        tensors[head] = tensors[twin] + 1

    folder = rewrite(FAMILIES[name](tmp_path / "src", tie_word_embeddings=True), change)
    with pytest.raises(Refusal, match=f"{head}: expected the values of {twin}.*; set tie_word_embeddings"):
        Source(Checkpoint(folder))


def test_models_that_the_tables_do_not_describe_are_refused(tmp_path):
    crossed = gpt2(tmp_path / "crossed", add_cross_attention=True)
    with pytest.raises(Refusal, match="add_cross_attention: expected a model of text alone"):
        growth.grow(crossed, tmp_path / "out", method="lemon", num_layers=4)
    with pytest.raises(Refusal, match="a masked language model, got a decoder"):
        growth.grow(
            bert(tmp_path / "decoder", is_decoder=True), tmp_path / "out", method="lemon", num_layers=4
        )


def test_gpt_2_s_neurons_are_written_down_only_where_they_do_not_follow_from_the_width(tmp_path):
    src = gpt2(tmp_path / "src", n_inner=None)
    sizes = {"wide": {"hidden_size": 120}, "more": {"hidden_size": 120, "ffn_size": 500}}
    for name, size in sizes.items():
        growth.grow(src, tmp_path / name, method="lemon", **size)
        assert growth.check(src, tmp_path / name).kept
    inner = [Checkpoint(tmp_path / name).config.n_inner for name in sizes]
    assert inner == [None, 500]


def test_a_refusal_lists_what_is_unknown_and_what_is_missing(tmp_path):
    def change(tensors):
        tensors["gpt_neox.layers.9.mlp.new"] = tensors.pop("gpt_neox.embed_in.weight")

    folder = rewrite(neox(tmp_path / "wrong"), change)
    with pytest.raises(
        Refusal, match=r"unknown: gpt_neox.layers.9.mlp.new, missing: gpt_neox.embed_in.weight"
    ):
        Source(Checkpoint(folder))


@pytest.mark.parametrize(
    "added, remedy",
    [("qweight", "quantized: restore them to floats first"), ("lora_A.default.weight", "merge_and_unload")],
)
def test_quantized_weights_and_adapters_that_no_configuration_tells_of_have_their_remedies(
    tmp_path, added, remedy
):
    def change(tensors):
        module = "gpt_neox.layers.1.attention.dense"
        tensors[f"{module}.{added}"] = torch.zeros(2, dtype=torch.int32)

    with pytest.raises(Refusal, match=f"unknown: gpt_neox.layers.1.attention.dense.{added}, .*{remedy}"):
        Source(Checkpoint(rewrite(neox(tmp_path / "packed"), change)))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    def change(tensors):
        tensors["gpt_neox.final_layer_norm.bias"] = torch.zeros(95)

    folder = rewrite(neox(tmp_path / "wrong"), change)
    with pytest.raises(Refusal, match=r"final_layer_norm.bias: expected shape \(96,\).*got \(95,\)"):
        Source(Checkpoint(folder))


def test_a_model_without_its_head_is_refused(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    GPTNeoXModel(config).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match="missing"):
        Source(Checkpoint(tmp_path))
