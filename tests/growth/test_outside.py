"""What a verb writes lies in its result, in the folders beside it that are told of, or is gone afterwards."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import neox
from transformers import AutoTokenizer

import growth
from growth.errors import Refusal

RESULTS = {"trained", "grown", "learned", "shrunk", "moved", "made", "cut", "nowhere"}
BESIDE = {"", ".unfinished", ".tokens", ".recipe"}  # what a result's folder has behind its name meanwhile
RECIPE = {"steps": [{"grow": {"num-layers": 3}}, {"check": {}}, {"grow": {"num-layers": 4}}]}


def contents(folder):
    """Every file below, and what is in it."""
    files = sorted(file for file in folder.rglob("*"))
    return {
        str(x.relative_to(folder)): x.is_file() and hashlib.sha256(x.read_bytes()).hexdigest() for x in files
    }


def test_no_verb_writes_outside_its_result(tmp_path):
    neox(tmp_path / "src", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    for name in ("work", "home", "tmp", "cache", "here"):
        (tmp_path / name).mkdir()
    kept = {name: contents(tmp_path / name) for name in ("src", "home", "tmp", "here")}
    root = Path(__file__).parents[2]  # before tests/growth, which is no package
    places = {
        "PYTHONPATH": root,
        "HOME": tmp_path / "home",
        "TMPDIR": tmp_path / "tmp",
        "PYTHONDONTWRITEBYTECODE": 1,
    }
    there = {
        name: x for name, x in os.environ.items() if not name.startswith(("HF_HOME", "XDG_", "TRITON_CACHE"))
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).parent.parent / "watched.py", tmp_path],
        env=there | {name: str(x) for name, x in places.items()},
        cwd=tmp_path / "here",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wrote = {*json.loads(done.stdout.splitlines()[-1])}
    assert len(wrote) > 100
    assert not {path for path in wrote if not allowed(Path(path), tmp_path)}
    assert {name: contents(tmp_path / name) for name in kept} == kept
    assert {file.name for file in (tmp_path / "work").iterdir()} == RESULTS
    assert all(file.name[0] != "." for file in (tmp_path / "cache").iterdir())


def allowed(path, folder):
    if path == Path("/dev/null") or path.is_relative_to(folder / "tmp"):
        return True
    if path.is_relative_to(folder / "cache"):
        return True
    if path == folder / "work":  # to be made, where it is not there yet
        return True
    if not path.is_relative_to(folder / "work"):
        return False
    top = path.relative_to(folder / "work").parts[0]
    return top.startswith(".growth-") or top in {name + ending for name in RESULTS for ending in BESIDE}


def test_a_template_that_is_named_as_a_path_is_refused(source, tmp_path, text):
    model = neox(tmp_path / "src")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "x", "tools": "y"}
    tokenizer.save_pretrained(model, save_jinja_files=False)
    config = json.loads((model / "tokenizer_config.json").read_text())
    for name in ("../../out", "/etc/x", "a/b"):
        config["chat_template"] = [{"name": "default", "template": "x"}, {"name": name, "template": "x"}]
        (model / "tokenizer_config.json").write_text(json.dumps(config))
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(Refusal, match="chat_template: expected names of files"):
            growth.train(model, text, tmp_path / "trained", steps=1, batch_size=1, sequence_length=16)
        assert sorted(tmp_path.rglob("*")) == before


SECRETS = ("vocab_file", "merges_file", "tokenizer_file", "name_or_path", "special_tokens_map_file")


@pytest.mark.parametrize("name", SECRETS)
def test_a_tokenizer_that_names_a_file_elsewhere_takes_nothing_of_it(tmp_path, text, name):
    model, secret = neox(tmp_path / "src"), tmp_path / "secret.txt"
    secret.write_text('{"own": "a word that nobody else knows"}')
    config = json.loads((model / "tokenizer_config.json").read_text())
    for path in (str(secret), "../secret.txt"):
        (model / "tokenizer_config.json").write_text(json.dumps(config | {name: path}))
        growth.train(model, text, tmp_path / "out", steps=1, batch_size=1, sequence_length=16)
        growth.grow(model, tmp_path / "out/grown", num_layers=4)
        files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
        assert files and not any(b"nobody else knows" in file.read_bytes() for file in files)
        assert secret.read_text().startswith('{"own"')
        subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)
