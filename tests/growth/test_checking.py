"""`check` judges a promise by the source it was made for, by the tensors' dtype, and says where it broke."""

import json

import pytest
import torch
from checkpoints import ALL, bert, gpt2, neox, saved
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, SwinConfig
from transformers.utils import logging

import growth
from growth import card
from growth.errors import Refusal
from growth.loading import quiet
from lcikernels.models import LCIConfig, LCIForCausalLM


@pytest.fixture(scope="module")
def grown(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("grown") / "out"
    growth.grow(source, out, method="lemon", hidden_size=168, num_layers=5)
    return out


def changed(folder, name, by):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = by(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_another_source_is_refused_and_so_are_swapped_arguments(source, grown, tmp_path):
    other = neox(tmp_path / "other")
    changed(other, "gpt_neox.final_layer_norm.bias", lambda x: x + 1)
    with pytest.raises(Refusal, match="expected the source that .*/out was made of, .*source, got other"):
        growth.check(other, grown)
    with pytest.raises(Refusal, match="got what was made of it first; swap the two"):
        growth.check(grown, source)
    assert growth.check(source, grown).kept


def test_what_grew_and_shrank_back_to_the_very_weights_is_checked_both_ways(source, tmp_path):
    growth.grow(source, tmp_path / "large", growth.Sizes(layers=4), "net2net")
    report = growth.shrink(tmp_path / "large", tmp_path / "back", growth.Sizes(layers=3))
    assert report.notes == ("layers: 1 of 4 left out, number 3",)
    assert growth.check(tmp_path / "large", tmp_path / "back").float32 == 0
    assert growth.check(tmp_path / "back", tmp_path / "large").kept  # the source's weights
    with pytest.raises(Refusal, match="swap the two"):
        growth.check(tmp_path / "large", source)


def hybrid(folder):
    """An LCI model of a retention, a Mamba and an attention layer."""
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 160, "vocab_size": 256}
    config = LCIConfig(**sizes, num_hidden_layers=3, pattern="RMA", state_size=8)
    return saved(LCIForCausalLM, config, folder, torch.float32)


@pytest.mark.parametrize(
    "family, name, where",
    [
        (neox, "gpt_neox.layers.3.mlp.dense_4h_to_h.bias", "gpt_neox.layers.3.mlp.dense_4h_to_h"),
        (neox, "gpt_neox.layers.1.attention.query_key_value.weight", "gpt_neox.layers.1.attention.dense"),
        (gpt2, "transformer.h.1.ln_2.weight", "transformer.h.1.ln_2"),
        (bert, "bert.encoder.layer.0.output.LayerNorm.bias", "bert.encoder.layer.0.output.LayerNorm"),
        (hybrid, "model.layers.1.mixer.A_log", "model.layers.1.mixer.out_proj"),
        (hybrid, "model.layers.3.mixer_norm.weight", "model.layers.3.mixer_norm"),
        (neox, "gpt_neox.final_layer_norm.bias", "the last norm or the head"),
        (bert, "cls.predictions.bias", "the last norm or the head"),
    ],
)
def test_where_two_models_first_differ_is_named(tmp_path, family, name, where):
    src, out = family(tmp_path / "src"), tmp_path / "out"
    growth.grow(src, out, method="lemon", hidden_size=192, num_layers=5)
    assert growth.check(src, out).first == ""
    changed(out, name, lambda x: 1.5 * x + 0.1)
    agreement = growth.check(src, out)
    assert not agreement.kept and agreement.first == where
    assert f"they first differ in {where}" in str(agreement)


def test_after_transfer_the_first_fresh_mixer_is_named(source, tmp_path):
    growth.transfer(source, tmp_path / "out", keep_attention=[0])
    assert growth.check(source, tmp_path / "out").first == "model.layers.1.mixer.o_proj"


def test_what_a_library_says_of_its_kernels_is_not_passed_on(tmp_path):
    said, logger = [], logging.get_logger("transformers")
    with quiet():
        src = ALL["granitemoehybrid"](tmp_path / "src")
    heard = logging.logging.Handler()
    heard.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(heard)
    logging.warning_once.cache_clear()
    try:
        assert growth.check(src, src).kept and not said
    finally:
        logger.removeHandler(heard)


def test_an_embedding_scaled_in_another_place_is_no_difference(tmp_path):
    """Gemma's own class multiplies within its embedding, ours behind it."""
    src = ALL["gemma3_text"](tmp_path / "src")
    growth.transfer(src, tmp_path / "out", mixers="attention")
    assert growth.check(src, tmp_path / "out").first == ""
    growth.transfer(src, tmp_path / "retnet", keep_attention=[0])
    assert growth.check(src, tmp_path / "retnet").first == "model.layers.1.mixer_out_norm"


@pytest.mark.parametrize("named", ["float32", None])
def test_the_limit_follows_the_dtype_of_the_tensors_not_that_of_the_configuration(tmp_path, named):
    src = neox(tmp_path / "src", torch.float16)
    config = json.loads((src / "config.json").read_text()) | {"dtype": named}
    (src / "config.json").write_text(json.dumps({key: x for key, x in config.items() if x is not None}))
    growth.grow(src, tmp_path / "out", method="lemon", hidden_size=168)
    agreement = growth.check(src, tmp_path / "out")
    assert agreement.kept and agreement.stored_dtype == "float16"
    assert agreement.limit > 1e-3 * max(1.0, agreement.largest) > agreement.float32
    judged, beside = str(agreement).split("; ")
    assert judged.endswith(f"), promised at most {agreement.limit:.1e} there: kept")
    assert beside == f"{agreement.stored:.2e} in float16, as it is stored, with each model's rounding"


def test_one_figure_is_told_of_one_dtype_and_one_loss_of_several(source, tmp_path):
    growth.grow(source, tmp_path / "out", method="net2net", hidden_size=168)
    agreement = growth.check(source, tmp_path / "out")
    assert str(agreement).count("float32") == 1 and len(agreement.lost) > 1
    assert str(agreement).endswith(f"promised: {agreement.lost[0]}; and {len(agreement.lost) - 1} more")


def test_the_card_says_what_it_is_and_what_was_measured(tmp_path):
    src = neox(tmp_path / "src")
    (src / "README.md").write_text(
        "---\nlanguage: en\nlicense:\n- mit\n- apache-2.0\nlicense_link: L\n---\nlicense: no\n"
    )
    growth.grow(src, tmp_path / "out", method="lemon", hidden_size=168)
    card = tmp_path / "out" / "README.md"
    before = card.read_text()
    licence = "license:\n- mit\n- apache-2.0\nlicense_link: L\n"
    assert before.startswith(f'---\nbase_model: "src"\n{licence}library_name:')
    assert "method lemon" in before and "Not measured yet" in before and "license: no" not in before
    assert 'AutoModelForCausalLM.from_pretrained("out")' in before
    figures = str(growth.check(src, tmp_path / "out"))
    after = card.read_text()
    assert figures in after and "Not measured yet" not in after
    growth.check(src, tmp_path / "out")
    assert card.read_text() == after
    growth.transfer(tmp_path / "out", tmp_path / "retnet")
    assert 'from_pretrained("retnet", trust_remote_code=True)' in (tmp_path / "retnet/README.md").read_text()


NAMES = {
    "models--gpt2/snapshots/607a": "gpt2",
    "models--EleutherAI--pythia-14m/snapshots/f33c": "EleutherAI/pythia-14m",
    "a: b #c": "a: b #c",
    "- x/..": None,
}


@pytest.mark.parametrize("path", NAMES)
def test_the_head_of_a_card_names_the_base_model_whatever_its_name(tmp_path, path):
    card.write_card(tmp_path, 'a"b', tmp_path / path, GPTNeoXConfig(), ["made"], "", "")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == (NAMES[path] or tmp_path.name)


def test_where_nothing_inside_was_compared_no_place_is_named(source, grown, tmp_path):
    """Models of other depths, with no record between them."""
    deeper = neox(tmp_path / "deeper", num_hidden_layers=4)
    agreement = growth.check(source, deeper)
    assert agreement.first == "" and agreement.limit is None
    assert not (deeper / "README.md").exists()


def test_a_number_that_is_none_is_a_difference(tmp_path):
    src, out = neox(tmp_path / "src"), tmp_path / "out"
    growth.grow(src, out, method="lemon", num_layers=4)
    changed(out, "gpt_neox.layers.1.mlp.dense_4h_to_h.bias", lambda x: x * float("nan"))
    agreement = growth.check(src, out)
    assert not agreement.kept and agreement.first == "gpt_neox.layers.1.mlp.dense_4h_to_h"


def test_a_model_that_gives_no_numbers_is_compared_with_nothing(source, tmp_path):
    broken = neox(tmp_path / "broken")
    changed(broken, "gpt_neox.final_layer_norm.bias", lambda x: x * float("nan"))
    for pair in (broken, broken), (broken, source), (source, broken):
        with pytest.raises(Refusal, match="broken: expected finite numbers out of the model, got others"):
            growth.check(*pair)


def test_figures_of_another_source_stay_out_of_the_card(source, tmp_path):
    growth.grow(source, tmp_path / "out", method="stack", num_layers=6)
    other = neox(tmp_path / "other")
    changed(other, "gpt_neox.final_layer_norm.bias", lambda x: x + 1)
    growth.check(other, tmp_path / "out")
    assert "Not measured yet" in (tmp_path / "out" / "README.md").read_text()


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    src, out = neox(tmp_path / "src"), tmp_path / "out"
    growth.grow(src, out, method="lemon", num_layers=4)
    changed(out, "gpt_neox.layers.0.attention.dense.bias", lambda x: x[1:].clone())
    with pytest.raises(Refusal, match="mismatched_keys"):
        growth.check(src, out)


def test_a_model_of_no_family_that_reads_no_words_is_refused(tmp_path):
    SwinConfig().save_pretrained(tmp_path)
    save_file({f"a{i}": torch.zeros(1) for i in range(12)}, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match="expected a model that reads words or images, got a swin, of no"):
        growth.check(tmp_path, tmp_path)
