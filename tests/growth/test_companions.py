"""What lies beside the weights travels along: a sentence-transformers folder stays one, at its new width."""

import json
import shutil

import pytest
import torch
from checkpoints import ALL, bert
from safetensors.torch import save_file

import growth
from growth.companions import copy_companions
from growth.errors import Refusal
from growth.loading import quiet

TYPES = "sentence_transformers.models"
POOLING = {"word_embedding_dimension": 96, "pooling_mode_mean_tokens": True, "include_prompt": True}
DENSE = {"in_features": 96, "out_features": 8, "bias": True, "activation_function": "torch.nn.Tanh"}


def write(file, values):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values))


def read(file):
    return json.loads(file.read_text())


def modules(folder, **kinds):
    found = [{"idx": 0, "name": "0", "path": "", "type": f"{TYPES}.Transformer"}]
    found += [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": f"{TYPES}.{kind}"}
        for i, kind in enumerate(kinds, 1)
    ]
    write(folder / "modules.json", found)
    for i, (kind, config) in enumerate(kinds.items(), 1):
        (folder / f"{i}_{kind}").mkdir()
        if config:
            write(folder / f"{i}_{kind}" / "config.json", config)


@pytest.fixture
def src(tmp_path):
    folder = bert(tmp_path / "src", num_hidden_layers=2)
    modules(folder, Pooling=POOLING, Normalize={})
    write(folder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": "q: "}})
    return folder


def with_dense(folder):
    for name in ("1_Pooling", "2_Normalize"):
        shutil.rmtree(folder / name)
    modules(folder, Pooling=POOLING, Normalize={}, Dense=DENSE)
    save_file({"linear.weight": torch.randn(8, 96)}, folder / "3_Dense" / "model.safetensors")


def test_a_folder_of_sentence_transformers_stays_one_and_its_pooling_learns_the_width(src, tmp_path):
    growth.grow(src, tmp_path / "out", method="net2net", hidden_size=120)
    out = tmp_path / "out"
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        assert read(out / name) == read(src / name)
    assert read(out / "1_Pooling" / "config.json") == POOLING | {"word_embedding_dimension": 120}
    assert (out / "2_Normalize").is_dir() and read(out / "config.json")["hidden_size"] == 120


@pytest.mark.parametrize("name", ["word_embedding_dimension", "embedding_dimension"])
@pytest.mark.parametrize("width, becomes", [(96, 120), (50, 50)])
def test_a_pooling_of_another_width_is_left_alone_whatever_the_name_of_its_width(
    tmp_path, name, width, becomes
):
    (tmp_path / "src").mkdir()
    (tmp_path / "out").mkdir()
    modules(tmp_path / "src", Pooling={name: width, "pooling_mode": "mean"})
    copy_companions(tmp_path / "src", tmp_path / "out", (96, 120))
    assert read(tmp_path / "out" / "1_Pooling" / "config.json") == {name: becomes, "pooling_mode": "mean"}


def test_a_module_with_weights_travels_where_the_width_stays(src, tmp_path):
    with_dense(src)
    growth.grow(src, tmp_path / "out", method="stack", num_layers=4)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / "3_Dense" / name).read_bytes() == (src / "3_Dense" / name).read_bytes()


def test_a_module_whose_weights_no_longer_fit_is_refused_by_name(src, tmp_path):
    with_dense(src)
    message = (
        "3_Dense: expected .* 96, which becomes 120, got model.safetensors of its Dense module; grow the"
    )
    with pytest.raises(Refusal, match=message):
        growth.grow(src, tmp_path / "out", method="net2net", hidden_size=120)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["../secret", "/etc", "a/b", ".."])
def test_a_module_outside_its_folder_is_refused(tmp_path, path):
    (tmp_path / "secret").mkdir()
    for name in ("src", "out"):
        (tmp_path / name).mkdir()
    write(tmp_path / "src" / "modules.json", [{"path": path, "type": "x.Pooling"}])
    with pytest.raises(Refusal, match="expected modules in folders beside it"):
        copy_companions(tmp_path / "src", tmp_path / "out", (1, 2))


@pytest.mark.parametrize("found", [{}, [3], [{"path": "1_Pooling"}]], ids=str)
def test_modules_of_another_shape_are_refused(src, tmp_path, found):
    write(src / "modules.json", found)
    with pytest.raises(Refusal, match="modules.json: expected a list of objects with 'path' and 'type'"):
        growth.grow(src, tmp_path / "out", method="stack", num_layers=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["grow", "transfer", "shrink"])
@pytest.mark.parametrize(
    "name, text, said",
    [
        ("tokenizer.json", '{"version": ', "JSON, got Expecting value"),
        ("tokenizer_config.json", "\ufeff{}", "JSON, got Unexpected UTF-8 BOM"),
        ("added_tokens.json", "[]", "an object, got list"),
        ("modules.json", "{}", "a list of objects"),
        ("1_Pooling/config.json", "[", "JSON, got Expecting value"),
    ],
)
def test_a_broken_file_beside_the_weights_is_refused_before_any_work(verb, name, text, said, tmp_path):
    with quiet():
        ALL["llama"](tmp_path / "src")
    if "Pooling" in name:
        modules(tmp_path / "src", Pooling={})
    (tmp_path / "src" / name).write_text(text)
    options = {} if verb == "transfer" else {"num_layers": 2 if verb == "shrink" else 4}
    for dst in (None, tmp_path / "out"):
        with pytest.raises(Refusal, match=f"src/{name}: expected {said}.*; copy or download it again"):
            getattr(growth, verb)(tmp_path / "src", dst, dry_run=not dst, **options)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_read_where_the_tokenizer_is_may_be_anything(tmp_path):
    with quiet():
        ALL["llama"](tmp_path / "src")
    (tmp_path / "src/vocab.json").write_text("")
    growth.grow(tmp_path / "src", tmp_path / "out", num_layers=4)
    assert (tmp_path / "out/vocab.json").read_text() == ""


def test_how_images_are_read_travels_and_the_longest_text_stays(src, tmp_path):
    for name in ("preprocessor_config.json", "processor_config.json"):
        write(src / name, {"size": {"height": 32, "width": 32}})
    tokenizer = read(src / "tokenizer_config.json") | {"model_max_length": 17}
    write(src / "tokenizer_config.json", tokenizer)
    growth.grow(src, tmp_path / "out", method="net2net", hidden_size=120)
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        assert read(tmp_path / "out" / name) == read(src / name)
