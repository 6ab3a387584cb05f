"""Checkpoints on disk: whole or not there, one tensor at a time, readable by transformers."""

import io
import json
import sys
import weakref

import pytest
import torch
from checkpoints import ALL, neox
from memory import Memory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

import growth
from growth import checkpoint as checkpoint_module
from growth import engine, expand, writing
from growth.checkpoint import INDEX, Checkpoint, chosen_dtype
from growth.errors import Refusal
from growth.folders import staged
from growth.methods import Lemon
from growth.plan import Row, Source
from growth.record import RECORD
from growth.sizes import Sizes, resized
from growth.writing import WriteProgress, write_checkpoint

RECORDED = {"verb": "grow", "method": "lemon", "source": "src", "parameters": (1, 2), "lossless": False}
RECORDED |= {"lineage": []}


def test_a_folder_appears_only_when_all_of_it_is_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as folder:
        (folder / "half").write_text("done")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "out") as folder:
        (folder / "all").write_text("done")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "all"]


def test_threads_are_as_they_were_where_writing_is_refused(tmp_path):
    """Also while the error, and with it every frame that it went through, is alive."""
    src, threads = neox(tmp_path / "src"), torch.get_num_threads()
    tensors = load_file(src / "model.safetensors")
    tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"][0, 0] = torch.nan
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    torch.set_num_threads(3)
    try:
        with pytest.raises(Refusal, match="finite numbers") as held:
            growth.grow(src, tmp_path / "out", hidden_size=192)
        assert held.traceback and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_no_second_embedding_is_held_where_the_width_scales_it(tmp_path, monkeypatch):
    """Gemma's is multiplied block by block."""
    monkeypatch.setattr(expand, "BLOCK", 2**12)
    source = Source(Checkpoint(ALL["gemma"](tmp_path / "src", torch.bfloat16, vocab_size=1000)))
    config = resized(source.model, Sizes(128), Lemon().layers)
    target = source.family.model(config, source.model.parts)
    old, new = source.model.architecture, target.architecture
    plan = engine.plan_growth(source, target, Lemon().maps(old, new), seed=0)
    row = next(row for row in plan.rows if row.shape == (1000, 128))
    with Memory() as memory:
        assert sum(len(block) for block in row.recipe(source)) == 1000
    assert 1000 * 64 * 2 in memory.made and 1000 * 64 * 4 not in memory.made


def test_shards_are_bounded_and_loaded_by_transformers(source, tmp_path):
    growth.grow(source, tmp_path / "out", method="lemon", hidden_size=120, shard_bytes=200_000)
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


ROWS = [
    Row("odd", (3,), "bfloat16", "copied"),
    Row("wide", (4, 5), "float32", "copied"),
    Row("scalar", (), "float64", "copied"),
    Row("empty", (0, 3), "float16", "copied"),
    Row("empty again", (0, 3), "float16", "copied"),
    Row("half", (7, 2, 3), "float16", "copied"),
    Row("no columns", (2, 0), "float32", "copied"),
    Row("last", (5,), "bfloat16", "copied"),
]


def blocks_of(x):
    """A tensor in blocks of one row and of the rest."""
    return [x] if x.ndim == 0 else [x[:1], x[1:1], x[1:]]


@pytest.mark.parametrize("shard_bytes", [1, 90, 10**9])
def test_blocks_become_the_tensors_of_aligned_files_that_safetensors_reads(source, tmp_path, shard_bytes):
    """Of every dtype, in any order of dtypes, of no dimension or no entries, a file each or all in one."""
    made = {row.name: torch.randn(row.shape, dtype=torch.float64) for row in ROWS}
    blocks = ((row, blocks_of(made[row.name])) for row in ROWS)
    out, src = tmp_path / "out", Checkpoint(source)
    write_checkpoint(out, GPTNeoXConfig(), blocks, ROWS, src, RECORDED, shard_bytes=shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {name: x for file in files for name, x in load_file(file).items()}
    assert found.keys() == made.keys()
    for row in ROWS:
        assert torch.equal(found[row.name], made[row.name].to(getattr(torch, row.dtype))), row
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
        head, entries = header(file)
        for name, entry in entries.items():
            (begin, end), x = entry["data_offsets"], found[name]
            assert (8 + head + begin) % x.itemsize == 0 and end - begin == x.nbytes
        sizes = [found[name].nbytes for name in entries]
        assert sum(sizes) <= shard_bytes or sum(map(bool, sizes)) == 1
    assert len(files) == {1: 7, 90: 4, 10**9: 1}[shard_bytes]
    assert (tmp_path / "out" / INDEX).exists() == (len(files) > 1)


def header(file):
    """The size of a safetensors file's header, and its tensors."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0 and entries.pop("__metadata__")
    return size, entries


def test_a_block_is_asked_for_when_the_one_before_is_gone(source, tmp_path):
    """Of a tensor of any size one block is in memory."""
    alive = []

    def block(i):
        assert not any(x() is not None for x in alive), i
        x = torch.full((2, 1000), float(i))
        alive.append(weakref.ref(x))
        return x

    rows = [Row(name, (6, 1000), "bfloat16", "copied") for name in "ab"]
    made = ((row, (block(i) for i in range(3))) for row in rows)
    write_checkpoint(tmp_path / "out", GPTNeoXConfig(), made, rows, Checkpoint(source), RECORDED)
    assert len(alive) == 6
    x = load_file(tmp_path / "out" / "model.safetensors")["b"]
    assert x[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("shape", [(3, 2), (5, 2), (4, 3), (4,), ()], ids=str)
def test_blocks_that_are_not_the_row_are_never_written(source, tmp_path, shape):
    rows = [Row("w", (4, 2), "float32", "copied")]
    with pytest.raises(AssertionError):
        made = iter([(rows[0], (torch.ones(shape),))])
        write_checkpoint(tmp_path / "out", GPTNeoXConfig(), made, rows, Checkpoint(source), RECORDED)
    assert list(tmp_path.iterdir()) == []


def test_shards_and_index_are_called_and_counted_as_transformers_does(source, tmp_path):
    growth.grow(source, tmp_path / "ours", method="lemon", hidden_size=120, shard_bytes=200_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    ours, theirs = (json.loads((tmp_path / name / INDEX).read_text()) for name in ("ours", "theirs"))
    assert ours["metadata"] == theirs["metadata"] and ours["weight_map"].keys() == theirs["weight_map"].keys()
    for index, folder in ((ours, "ours"), (theirs, "theirs")):
        files = {file.name for file in (tmp_path / folder).glob("*.safetensors")}
        assert set(index["weight_map"].values()) == files and len(files) > 2
        assert files == {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_of_a_tensor_are_those_of_the_whole(tmp_path, dtype):
    checkpoint = Checkpoint(neox(tmp_path / "src", dtype))
    for name in checkpoint.names:
        whole = checkpoint.read(name)
        for rows in (slice(0, 1), slice(5, 17), slice(9, None), slice(3, 3)):
            assert torch.equal(checkpoint.read(name, rows), whole[rows])


def test_a_fingerprint_reads_blocks_and_is_that_of_the_whole(source, monkeypatch):
    checkpoint = Checkpoint(source)
    whole = checkpoint.fingerprint()
    monkeypatch.setattr(checkpoint_module, "BLOCK", 200)
    assert [len(block) for block in checkpoint.blocks("embed_out.weight")] == [2] * 128
    assert checkpoint.fingerprint() == whole


def test_rows_of_a_source_that_vanished_are_refused(tmp_path):
    checkpoint = Checkpoint(neox(tmp_path / "src"))
    (tmp_path / "src" / "model.safetensors").unlink()
    with pytest.raises(Refusal, match="model.safetensors: expected .*, got none there any more"):
        checkpoint.read("embed_out.weight", slice(0, 2))


def test_a_long_write_tells_its_bytes_in_lines(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writing, "SECONDS", 0)
    rows = [Row("w", (4, 250), "float32", "copied")]
    made = iter([(rows[0], torch.ones(4, 250).split(1))])
    monkeypatch.setattr(writing, "GB", 1000)
    write_checkpoint(tmp_path / "out", GPTNeoXConfig(), made, rows, Checkpoint(source), RECORDED)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"growth: {i}.0 of 4.0 GB written" for i in (1, 2, 3, 4)]


def test_a_terminal_shows_the_bytes_and_is_left_clean(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with WriteProgress("out", 4_000_000) as progress:
        progress.wrote(1_000_000)
        progress._bar.refresh()
        assert "1.0/4.0 MB" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")


def test_a_dtype_to_write_in_is_one_that_growth_computes_in():
    for name in ("float64", "float32", "float16", "bfloat16", None):
        assert chosen_dtype(name) == name
    for name in ("int8", "float8_e4m3fn", "half", "", "F32"):
        with pytest.raises(Refusal, match="dtype: expected one of float64, float32, float16, bfloat16, got"):
            chosen_dtype(name)
