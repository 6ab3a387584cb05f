"""Models of the Hub by their names: from the cache where nothing can be downloaded, in one line where not."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from checkpoints import neox
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    IncompleteSnapshotError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.repocard import ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

import growth
from growth import hub
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.inspection import inspect

FIRST, SECOND = "1" * 40, "2" * 40
ANSWER = SimpleNamespace(headers={}, request=None)


@pytest.fixture
def cache(source, tmp_path, monkeypatch):
    """A cache as the Hub's library lays it out, with two revisions of owner/name; main is the first."""
    cache = tmp_path / "cache"
    model = cache / "models--owner--name"
    deeper = neox(tmp_path / "deeper", num_hidden_layers=4)
    for revision, folder, ref in ((FIRST, source, "main"), (SECOND, deeper, "deeper")):
        snapshot = model / "snapshots" / revision
        (model / "blobs").mkdir(parents=True, exist_ok=True)
        (model / "refs").mkdir(exist_ok=True)
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            blob = model / "blobs" / f"{ref}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        (model / "refs" / ref).write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


def state(folder):
    return {file: file.is_file() and file.read_bytes() for file in sorted(folder.rglob("*"))}


def test_every_verb_takes_a_model_of_the_hub_by_its_name_and_leaves_the_cache_alone(cache, tmp_path, text):
    before = state(cache)
    growth.grow("owner/name", "grown", method="lemon", num_layers=4)
    growth.transfer("owner/name", "moved", mixers="attention")
    growth.train("owner/name", text, "trained", steps=1, batch_size=2, sequence_length=16)
    assert growth.check("owner/name", "grown").kept and growth.check("owner/name", "owner/name").kept
    assert next(inspect("owner/name").lines()).startswith("owner/name: gpt_neox, 3 layers")
    assert state(cache) == before
    for name in ("grown", "moved", "trained"):
        assert ModelCard.load(tmp_path / name / "README.md").data.base_model == "owner/name"
        assert AutoTokenizer.from_pretrained(tmp_path / name).decode([104, 105]) == "hi"
        assert not any(file.is_symlink() for file in (tmp_path / name).iterdir())
    assert json.loads((tmp_path / "grown" / "growth.json").read_text())["source"] == "owner/name"
    assert "growth check owner/name FOLDER" in (tmp_path / "moved" / "README.md").read_text()


def test_what_is_checked_in_the_cache_keeps_its_card(cache):
    growth.grow("owner/name", "grown", method="lemon", num_layers=4)
    model = cache / "models--owner--grown"
    shutil.copytree("grown", model / "snapshots" / FIRST)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(FIRST)
    before = state(cache)
    assert growth.check("owner/name", "owner/grown").kept
    assert state(cache) == before


@pytest.mark.parametrize("revision", ["deeper", SECOND])
def test_a_revision_is_named_behind_an_at_sign(cache, tmp_path, revision):
    assert Checkpoint("owner/name").config.num_hidden_layers == 3
    assert Checkpoint(f"owner/name@{revision}").config.num_hidden_layers == 4
    growth.grow(f"owner/name@{revision}", "out", method="lemon", num_layers=5)
    assert Checkpoint("out").record()["source"] == f"owner/name@{revision}"
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "owner/name"


def test_a_folder_wins_over_a_model_of_the_hub(cache, tmp_path):
    neox(tmp_path / "owner" / "name", num_hidden_layers=5)
    checkpoint = Checkpoint("owner/name")
    assert checkpoint.config.num_hidden_layers == 5 and str(checkpoint.path) == "owner/name"


@pytest.mark.parametrize(
    "name", ["nothing/there", "nothing", "../x", "/abs/x", "a/b/c", "owner/name@other", "owner/other@main"]
)
def test_what_is_nowhere_is_refused_in_one_line_and_nothing_is_written(cache, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refusal, match=f"^{name}: expected a checkpoint folder .* got nothing there.*; name"):
        growth.grow(name, "out", method="lemon", num_layers=4)
    assert sorted(tmp_path.rglob("*")) == before


REASONS = {
    "a gated one": (GatedRepoError("gated", response=ANSWER), "got a gated model; ask for access"),
    "no such one": (RepositoryNotFoundError("no", response=ANSWER), "nothing there, and no such model"),
    "no such revision": (
        RevisionNotFoundError("no", response=ANSWER),
        "got no revision other; name a",
    ),
    "no network": (ConnectionError("Name or service not known"), "Name or service not known"),
    "no answer": (TimeoutError("timed out\nat last"), r"\(timed out at last\); name a folder"),
    "a full disk": (OSError(28, "No space left on device"), "No space left on device"),
}


@pytest.mark.parametrize("kind", REASONS)
def test_why_a_model_cannot_be_had_is_said_with_a_remedy_unless_the_cache_has_it(cache, monkeypatch, kind):
    error, message = REASONS[kind]

    def fail(self, *arguments, **options):
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.HfApi, "model_info", fail)
    with pytest.raises(Refusal, match=message) as refusal:
        hub.resolve("owner/name@other")
    assert len(str(refusal.value).splitlines()) == 1
    assert hub.resolve("owner/name").name == FIRST


def test_a_model_that_was_downloaded_in_part_is_refused(cache, monkeypatch):
    def partial(*arguments, **options):
        raise IncompleteSnapshotError("1 file(s) are missing", snapshot_path=str(cache))

    monkeypatch.setattr(hub, "snapshot_download", partial)
    with pytest.raises(Refusal, match="got a part of it in the cache; call `hf download owner/name`"):
        hub.resolve("owner/name")


def test_what_is_downloaded_is_what_is_read(source):
    others = """pytorch_model.bin tf_model.h5 consolidated.safetensors model.fp16.safetensors runs/events
        model.fp16.safetensors.index.json modeling_theirs.py training_args.bin onnx/model.onnx"""
    read = """config.json README.md growth.json generation_config.json model.safetensors adapter_config.json
        model-00001-of-00002.safetensors model.safetensors.index.json tokenizer.json tokenizer_config.json
        vocab.txt merges.txt chat_template.jinja modules.json sentence_bert_config.json
        config_sentence_transformers.json 1_Pooling/config.json 2_Dense/model.safetensors
        preprocessor_config.json"""
    assert set(filter_repo_objects(f"{others} {read}".split(), allow_patterns=hub.WANTED)) == {*read.split()}
    here = [file.name for file in source.iterdir()]
    assert set(filter_repo_objects(here, allow_patterns=hub.WANTED)) == set(here)
