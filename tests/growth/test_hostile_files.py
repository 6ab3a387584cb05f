"""Checkpoints made to harm: every verb refuses them in one line, and takes nothing of what they claim.

Each call runs in a forked process that has ROOM more memory and a minute; "MemoryError" is no refusal.
"""

import json
import os
import shutil
import struct

import pytest
from checkpoints import neox
from limited import limited

import growth
from growth.checkpoint import INDEX, WEIGHTS, Checkpoint
from growth.inspection import inspect
from growth.methods import METHODS
from growth.training import trainer  # noqa: F401  - what a run imports, before the fork

ROOM = 2**29  # bytes: half a GB, where files claim 10^12 and more


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint, the text beside it, its header and what lies behind that."""
    folder = tmp_path_factory.mktemp("whole")
    raw = (neox(folder / "src", num_hidden_layers=2) / WEIGHTS).read_bytes()
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    (size,) = struct.unpack("<Q", raw[:8])
    return folder, json.loads(raw[8 : 8 + size]), raw[8 + size :]


@pytest.fixture
def src(whole, tmp_path):
    """The same checkpoint, to be changed."""
    return shutil.copytree(whole[0] / "src", tmp_path / "src")


VERBS = {
    "inspect": lambda src, out, whole: [*inspect(src).lines()],
    "grow": lambda src, out, whole: growth.grow(src, out, method="lemon", num_layers=3),
    "shrink": lambda src, out, whole: growth.shrink(src, out, num_layers=1),
    "transfer": lambda src, out, whole: growth.transfer(src, out),
    "train": lambda src, out, whole: growth.train(
        src, whole[0] / "text.txt", out, steps=1, batch_size=1, sequence_length=16
    ),
    "check": lambda src, out, whole: growth.check(whole[0] / "src", src),
}
LOADING = ("train", "check")  # the verbs that make a model of transformers of it
RECORDING = [verb for verb in VERBS if verb != "inspect"]  # which reads neither a record nor companions


@pytest.fixture
def refused(src, whole, tmp_path):
    """That these verbs refuse `src` in one line with a remedy, which holds `message`, and leave nothing."""

    def check(message="", verbs=VERBS):
        before = sorted(tmp_path.rglob("*"))
        for verb in verbs:
            found = limited(lambda verb=verb: VERBS[verb](src, tmp_path / "out", whole), ROOM)
            assert found.kind == "Refusal", (verb, found)
            assert message in found.said and "; " in found.said and "\n" not in found.said, (verb, found)
            assert not {"MemoryError", "allocate"} & set(found.said.split()), (verb, found)
            assert len(found.said) < 5000, (verb, found)
            assert sorted(tmp_path.rglob("*")) == before, verb

    return check


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def file_of(header, body, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def headers(header, body):
    """Name -> a file of safetensors that is none, made of one that is."""
    told = {name: entry for name, entry in header.items() if name != "__metadata__"}
    first, second = sorted(told, key=lambda name: told[name]["data_offsets"])[:2]
    (begin, end), (_, after) = told[first]["data_offsets"], told[second]["data_offsets"]

    def but(name, **values):
        return file_of(header | {name: told[name] | values}, body)

    def also(shape, name="extra", dtype="F32"):
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body)]}
        return file_of(header | {name: entry}, body)

    later = {
        name: entry if name == first else entry | {"data_offsets": [x + 8 for x in entry["data_offsets"]]}
        for name, entry in told.items()
    }
    twice = f', "{first}": {json.dumps(told[first])}}}'.encode()
    return {
        "nothing": b"",
        "half a length": b"\x08\0\0\0",
        "a header beyond the file": file_of(header, body, 10 * len(body)),
        "a header of 2^63 bytes": file_of(header, body, 2**63),
        "a header of 2^64 - 1 bytes": file_of(header, body, 2**64 - 1),
        "no header": file_of(header, body, 0),
        "no JSON": file_of(b"{nonsense", body),
        "a list": file_of(b"[1]", body),
        "no UTF-8": file_of(b'{"\xff": 1}', body),
        "JSON that is deep": file_of(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, body),
        "tensors that overlap": but(second, data_offsets=[begin, begin + after - end]),
        "a hole": file_of(later, body + bytes(8)),
        "offsets that run backwards": but(first, data_offsets=[end, begin]),
        "offsets below zero": but(first, data_offsets=[-8, end]),
        "offsets past the end": file_of(header, body[:-64]),
        "offsets of 2^64": but(first, data_offsets=[0, 2**64]),
        "bytes of nobody": file_of(header, body + bytes(64)),
        "a shape whose product overflows": but(first, shape=[2**40, 2**40]),
        "a shape of 10^18 numbers": but(first, shape=[10**18]),
        "10^18 rows of nothing": also([10**18, 0]),
        "nothing in 10^18 columns": also([0, 10**18]),
        "thousands of axes": also([1] * 5000 + [0]),
        "a shape below zero": but(first, shape=[-1, -96]),
        "a shape that is a word": but(first, shape="wide"),
        "a dtype of nobody": but(first, dtype="F99"),
        "a name that is there twice": file_of(json.dumps(header).encode()[:-1] + twice, body),
        "metadata of objects": file_of(header | {"__metadata__": {"a": {"b": "c"}}}, body),
        "a name that leads out": also([0], "../../etc/passwd"),
        "a name of two lines": also([0], "a\nb\n" * 100),
        "a name of a megabyte": also([0], "a" * 10**6),
    }


FILES = [*headers({"a": {"data_offsets": [0, 8]}, "b": {"data_offsets": [8, 16]}}, bytes(16))]


@pytest.mark.parametrize("name", FILES)
def test_a_safetensors_file_that_lies_is_refused(whole, src, refused, name):
    (src / WEIGHTS).write_bytes(headers(*whole[1:])[name])
    refused(WEIGHTS if not name.startswith("a name of") and "leads out" not in name else "src")


CONFIG = {
    "10^12 channels": {"hidden_size": 10**12},
    "10^12 channels, as a float": {"hidden_size": 1e12},
    "channels that no entry holds": {"hidden_size": 2**23},
    "neurons that no entry holds": {"intermediate_size": 2**23},
    "10^9 layers": {"num_hidden_layers": 10**9},
    "10^12 words": {"vocab_size": 10**12},
    "words that no entry holds": {"vocab_size": 2**24 - 24},
    "10^9 heads": {"num_attention_heads": 10**9},
    "a head of 10^12": {"head_dim": 10**12},
    "10^12 positions": {"max_position_embeddings": 10**12},
    "10^9 classes": {"num_labels": 10**9},
    "layers below zero": {"num_hidden_layers": -1},
    "channels that are a word": {"hidden_size": "96"},
    "channels that are no number": {"hidden_size": float("nan")},
    "endless words": {"vocab_size": float("inf")},
    "another file of weights": {"transformers_weights": "other.safetensors"},
    "a file of weights that leads out": {"transformers_weights": "../src/model.safetensors"},
    "a pickle of weights": {"transformers_weights": "adapter_model.bin"},
    "a field with a method's name": {"save_pretrained": 5},
    "classes that are a number": {"architectures": 5},
    "classes that are numbers": {"architectures": [5]},
    "10^9 layers of T5": {"model_type": "t5", "num_decoder_layers": 10**9},
    "10^6 layers of T5": {"model_type": "t5", "num_decoder_layers": 10**6},
    "10^9 experts": {"model_type": "mixtral", "num_local_experts": 10**9},
    "10^7 experts": {"model_type": "mixtral", "num_local_experts": 10**7},
    "10^9 layers of another's part": {"model_type": "llava", "text_config": {"num_hidden_layers": 10**9}},
}


@pytest.mark.parametrize("name", CONFIG)
def test_a_configuration_that_lies_is_refused(src, refused, name):
    change(src / "config.json", **CONFIG[name])
    refused()


@pytest.mark.parametrize("field", [{"hidden_act": "theirs"}, {"rope_parameters": {"rope_type": "theirs"}}])
def test_what_transformers_does_not_compute_is_refused_by_what_loads_it(src, refused, field):
    change(src / "config.json", **field)
    refused("expected a language model", LOADING)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_no_kernel_is_fetched_that_a_configuration_names(src, whole, tmp_path, name):
    """transformers would ask the Hub for it, and run what comes."""
    change(src / "config.json", **{name: "theirs/kernel"})
    assert growth.check(src, whole[0] / "src").float32 == 0
    growth.train(src, whole[0] / "text.txt", tmp_path / "out", steps=1, batch_size=1, sequence_length=16)
    assert "theirs" not in (tmp_path / "out/config.json").read_text()


def test_outputs_have_names_whatever_a_configuration_asks_for(src, whole, tmp_path):
    change(src / "config.json", return_dict=False, output_hidden_states=True)
    assert growth.check(whole[0] / "src", src, generate=2).float32 == 0
    few = {"steps": 1, "batch_size": 1, "sequence_length": 16}
    growth.train(src, whole[0] / "text.txt", tmp_path / "out", teacher=src, **few)
    ligo = METHODS["ligo"](data=str(whole[0] / "text.txt"), **few)
    growth.grow(src, tmp_path / "grown", method=ligo, num_layers=3)


def test_json_beyond_any_memory_is_refused_unread(src, refused):
    for name, verbs in {
        "growth.json": RECORDING,
        "generation_config.json": RECORDING,
        "config.json": VERBS,
    }.items():
        with (src / name).open("ab") as stream:
            stream.truncate(2 * 10**9)  # a hole: no disk is taken
        refused(name, verbs)
        (src / name).unlink()


def shards(src):
    """The checkpoint in two shards; what its index says."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(src).save_pretrained(src / "two", max_shard_size="300KB")
    (src / WEIGHTS).unlink()
    for file in (src / "two").glob("model*"):
        file.rename(src / file.name)
    shutil.rmtree(src / "two")
    return json.loads((src / INDEX).read_text())["weight_map"]


INDICES = {
    "a file above": lambda of, first: of | {first: "../model.safetensors"},
    "a file of the system": lambda of, first: of | {first: "/etc/passwd"},
    "a folder": lambda of, first: of | {first: "."},
    "the folder above": lambda of, first: of | {first: ".."},
    "a shard that is not there": lambda of, first: of | {first: "model-9.safetensors"},
    "a shard that is no name": lambda of, first: of | {first: "model\0.safetensors"},
    "another's shard": lambda of, first: of | {first: max({*of.values()} - {of[first]})},
    "no shard for a tensor": lambda of, first: {name: file for name, file in of.items() if name != first},
    "a tensor of no shard": lambda of, first: of | {"theirs": of[first]},
    "numbers": lambda of, first: dict.fromkeys(of, 5),
    "nothing": lambda of, first: {},
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_lies_is_refused(src, refused, name):
    where = shards(src)
    (src / INDEX).write_text(json.dumps({"weight_map": INDICES[name](where, min(where))}))
    refused("src")


def test_a_name_in_two_shards_is_refused(src, refused):
    first, second, *_ = sorted({*shards(src).values()})
    shutil.copy(src / first, src / second)
    refused("that no other shard holds")


LINKED = ["config.json", "tokenizer.json", "generation_config.json", "growth.json", "1_Pooling"]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_folder_is_not_followed(src, refused, tmp_path, name):
    """What lies there is the user's own: it would be copied into the result, and go where that goes."""
    (tmp_path / "own").mkdir()
    if (src / name).exists():
        (src / name).rename(tmp_path / "own" / name)
    else:
        (tmp_path / "own/secret").write_text("{}")
    target = tmp_path / "own" / name if (tmp_path / "own" / name).exists() else tmp_path / "own/secret"
    (src / name).symlink_to(target if name != "1_Pooling" else tmp_path / "own")
    refused("expected a file in its folder, got a link to")


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_may_lie_on_another_disk(src, whole, tmp_path, sharded):
    """They are read, never copied as files: the result holds its own, and theirs stay as they are."""
    (tmp_path / "disk").mkdir()
    if sharded:
        shards(src)
    moved = [file for file in src.iterdir() if file.name.startswith("model")]
    assert len(moved) > 2 if sharded else [file.name for file in moved] == [WEIGHTS]
    for file in moved:
        file.rename(tmp_path / "disk" / file.name)
        file.symlink_to(tmp_path / "disk" / file.name)
    before = {file: file.read_bytes() for file in (tmp_path / "disk").iterdir()}
    assert growth.check(whole[0] / "src", src).float32 == 0
    growth.grow(src, tmp_path / "grown", method="lemon", num_layers=3)
    growth.train(src, whole[0] / "text.txt", tmp_path / "out", steps=1, batch_size=1, sequence_length=16)
    assert not any(x.is_symlink() for out in ("grown", "out") for x in (tmp_path / out).rglob("*"))
    assert {file: file.read_bytes() for file in (tmp_path / "disk").iterdir()} == before


@pytest.mark.parametrize("leads", ["/etc/passwd", "/dev/zero", "/", "nowhere", WEIGHTS, "../secret"])
def test_a_link_to_what_holds_no_tensors_is_refused(src, refused, tmp_path, leads):
    (tmp_path / "secret").write_text("a word that nobody else knows")
    (src / WEIGHTS).unlink()
    (src / WEIGHTS).symlink_to(leads)
    refused("safetensors file, got")


def test_links_within_the_folder_and_within_the_cache_of_the_hub_are_followed(src, tmp_path):
    snapshot = tmp_path / "models--owner--name/snapshots/1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--name/blobs").mkdir()
    for file in src.iterdir():
        shutil.copy(file, blob := tmp_path / "models--owner--name/blobs" / file.name)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (src / WEIGHTS).rename(src / "other.safetensors")
    (src / WEIGHTS).symlink_to("other.safetensors")
    assert Checkpoint(src).fingerprint() == Checkpoint(snapshot).fingerprint()


BAD_TOKENIZERS = {
    "garbage": b"\x00\xff garbage",
    "no tokenizer": b'{"version": "1.0", "model": null}',
    "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "10^9 merges of nothing": json.dumps(
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": [["x", "y"]]}}
    ).encode(),
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_a_tokenizer_that_is_garbage_is_refused_by_what_reads_with_it(src, refused, name):
    (src / "tokenizer.json").write_bytes(BAD_TOKENIZERS[name])
    refused("expected a tokenizer that transformers can load", ["train"])


RECORDS = {
    "a list": [],
    "nothing": {},
    "a verb of nobody": {"verb": "eval"},
    "a lineage of numbers": {"lineage": [5]},
    "tensors of numbers": {"tensors": [5]},
    "masks of words": {"closed": {"wires": {"a": "b"}, "layers": {}}},
    "losses that are a number": {"lost": 5},
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_lies_is_refused(src, refused, tmp_path, name):
    growth.grow(src, tmp_path / "grown", method="lemon", num_layers=3)
    record, lie = json.loads((tmp_path / "grown/growth.json").read_text()), RECORDS[name]
    (src / "growth.json").write_text(json.dumps(record | lie if lie and isinstance(lie, dict) else lie))
    refused("growth.json: expected", RECORDING)
