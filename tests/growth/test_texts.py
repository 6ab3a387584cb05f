"""Documents out of rows and data sets; corpora that stay on disk; windows that know their documents."""

import json
import os
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from checkpoints import ALL, bert, inputs
from transformers import MambaConfig, MambaForCausalLM

import growth
from growth.demo.corpus import byte_tokenizer
from growth.errors import Refusal
from growth.loading import load_model
from growth.locks import alone_in
from growth.shrinking.redundancy import redundancy
from growth.training import corpus, data, sampled, texts
from growth.training.corpus import kept_beside, read_corpus
from growth.training.data import Windows, examples_of
from growth.training.packing import refuse_mixing
from growth.training.task import split
from growth.training.texts import documents, load_text

ROWS = ["first\nrow", "zweite Zeile ä", " ", "\u2028 and a last one"]
KEPT = [row for row in ROWS if row.strip()]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(folder):
    """The same rows in every format, and as files of text."""
    datasets = pytest.importorskip("datasets")
    rows = [{"id": i, "text": row} for i, row in enumerate(ROWS)]
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(rows[:2]) + b"\r\n" + lines(rows[2:])[:-1])
    (folder / "rows.json").write_bytes(lines(rows))
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(folder / "rows.parquet")
    datasets.disable_progress_bars()
    data.save_to_disk(folder / "saved")
    (folder / "files").mkdir()
    for i, row in enumerate(ROWS):
        (folder / f"files/{i}.txt").write_text(row)
    return folder


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return write(tmp_path_factory.mktemp("formats"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "saved", "files"])
def test_every_format_gives_the_same_documents(formats, name):
    assert load_text(formats / name) == KEPT
    found = read_corpus(formats / name, byte_tokenizer())
    assert found.ids.tolist() == list("".join(KEPT).encode())
    ends = np.cumsum([len(row.encode()) for row in KEPT])
    assert found.starts.tolist() == [0, *ends[:-1]]


def test_a_folder_is_read_through_all_formats_and_its_data_sets(formats):
    assert load_text(formats) == KEPT * 5


def test_the_field_of_rows_is_chosen_by_its_name(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines([{"content": "a", "text": 1}]))
    assert load_text(tmp_path / "x.jsonl", field="content") == ["a"]


def test_documents_come_in_pieces_whatever_is_read_at_a_time(tmp_path, monkeypatch):
    text = "één\r\ntwee 漢字\rdrei\n\n" * 9
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.jsonl").write_bytes(lines([{"text": text}, {"text": "x"}]))
    alike = text.replace("\r\n", "\n").replace("\r", "\n")
    monkeypatch.setattr(texts, "PIECE", 10)
    for block in (4, 5, 7, 1000):
        monkeypatch.setattr(texts, "BLOCK", block)
        found = list(documents(tmp_path))
        assert all(len(piece) <= 10 for piece, _ in found)
        assert "".join(piece + "|" * last for piece, last in found) == f"{alike}|{text}|x|"


def test_bad_rows_are_refused_by_their_number(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    good = {"text": "fine"}
    table = pyarrow.table({"text": ["a", None], "id": [1, 2]})
    parquet.write_table(table, tmp_path / "null.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "null.parquet").read_bytes()[:60])
    for name, content in {
        "none.jsonl": lines([good, {"content": "x", "id": 1}]),
        "number.jsonl": lines([good, good, {"text": 5}]),
        "null.jsonl": lines([{"text": None}]),
        "list.json": b'[{"text": "a"}]',
        "broken.jsonl": lines([good]) + b'\n{"text": "a\n',
        "deep.jsonl": b"[" * 200_000,
        "latin.jsonl": lines([good]) + b'{"text": "caf\xe9"}',
        "utf16.jsonl": '{"text": "a"}'.encode("utf-16"),
        "blank.jsonl": lines([{"text": " \n"}]),
        "pretty.json": b'{\n  "text": "a"\n}',
    }.items():
        (tmp_path / name).write_bytes(content)
    for name, said in {
        "none.jsonl": "none.jsonl, line 2: expected a field 'text', got content, id; pass .* --text-field",
        "number.jsonl": "number.jsonl, line 3: expected a string in 'text', got int; ",
        "null.jsonl": "null.jsonl, line 1: expected a string in 'text', got null; ",
        "list.json": "list.json, line 1: expected a JSON object, got list; write one object a line",
        "broken.jsonl": "broken.jsonl, line 3: expected a JSON object, got Unterminated string",
        "deep.jsonl": "deep.jsonl, line 1: expected a JSON object, got ",
        "latin.jsonl": "latin.jsonl, line 2: expected UTF-8 text, got byte 0xe9 at 13; ",
        "utf16.jsonl": "utf16.jsonl: expected UTF-8 text, got UTF-16, by its first bytes; ",
        "blank.jsonl": "blank.jsonl: expected text, got an empty file; ",
        "pretty.json": "pretty.json, line 1: expected a JSON object, got .*; write one object a line, or",
        "null.parquet": "null.parquet, row 2: expected a string in 'text', got null; ",
        "cut.parquet": "cut.parquet: expected a Parquet file, got ",
    }.items():
        with pytest.raises(Refusal, match=said) as refusal:
            load_text(tmp_path / name)
        assert "\n" not in str(refusal.value) and "; " in str(refusal.value)
    with pytest.raises(Refusal, match="null.parquet: expected a field 'body', got text, id; "):
        load_text(tmp_path / "null.parquet", field="body")


def test_data_sets_are_refused_where_they_are_several_or_damaged_or_cannot_be_read(
    formats, tmp_path, monkeypatch
):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"body": ["x"]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "splits")
    said = "splits: expected one split of a data set, got all of them; name .*splits/test, .*splits/train"
    with pytest.raises(Refusal, match=said):
        load_text(tmp_path / "splits")
    with pytest.raises(Refusal, match="splits/train: expected a field 'text', got body; "):
        load_text(tmp_path / "splits/train")
    assert load_text(tmp_path / "splits/train", field="body") == ["x"]
    (tmp_path / "splits/test/state.json").write_text("{")
    with pytest.raises(Refusal, match="test: expected a data set that save_to_disk wrote, got .*; save it"):
        load_text(tmp_path / "splits/test")
    for library, name in {"datasets": "saved", "pyarrow": "rows.parquet"}.items():
        monkeypatch.setitem(sys.modules, library, None)
        said = rf"{name}: expected {library}, which reads it, got none .*; pip install 'lcikernels\[data\]'"
        with pytest.raises(Refusal, match=said):
            load_text(formats / name)


# ---- many tokens


def test_a_corpus_beyond_memory_is_mapped_from_a_file_and_cut_into_the_same_windows(
    formats, tmp_path, monkeypatch
):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "!"
    held = examples_of(formats, tokenizer, 4, pack=True)
    monkeypatch.setattr(corpus, "HELD", 20)
    monkeypatch.setattr(texts, "PIECE", 8)
    for cache in (None, tmp_path / "cache"):
        mapped = examples_of(formats, tokenizer, 4, pack=True, cache=cache)
        assert isinstance(mapped.rows.base.base, np.memmap) or isinstance(mapped.rows.base, np.memmap)
        assert mapped.fingerprint() == held.fingerprint() and len(mapped) == len(held) > 9
        for a, b in zip(mapped.hold_out(3, seed=5), held.hold_out(3, seed=5)):
            assert torch.equal(a.windows, b.windows)
    kept = sorted(x.name for x in (tmp_path / "cache").iterdir())
    assert kept == ["ids.bin", "key.json", "lock", "starts.bin"]


def test_what_was_cut_once_is_found_again_until_file_field_or_tokenizer_are_others(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "HELD", 20)
    data, cache, tokenizer = tmp_path / "x.jsonl", tmp_path / "cache", byte_tokenizer()
    data.write_bytes(lines([{"text": "a" * 30, "body": "b" * 30}]))

    def found(field="text"):
        return bytes(read_corpus(data, tokenizer, field=field, cache=cache).ids.astype(np.uint8))

    first = found()
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "encoded", None)
        assert found() == first == b"a" * 30
    assert found("body") == b"b" * 30
    tokenizer.eos_token = "!"
    assert found("body") == b"b" * 30 + b"!"
    data.write_bytes(lines([{"body": "c" * 31}]))
    assert found("body") == b"c" * 31 + b"!"
    os.truncate(cache / "ids.bin", 5)
    assert found("body") == b"c" * 31 + b"!"
    (cache / "key.json").write_text("{")
    assert found("body") == b"c" * 31 + b"!"
    monkeypatch.setattr(texts, "PIECE", 8)  # so that the disk has some of them when it fails
    data.write_bytes(lines([{"body": "c" * 31}]) + b"{")
    with pytest.raises(Refusal, match="line 2: expected a JSON object"):
        found("body")
    assert not cache.exists()


def test_of_several_processes_one_writes_and_the_others_wait_for_it_or_do_without(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "HELD", 20)
    data, cache = tmp_path / "x.txt", tmp_path / "cache"
    data.write_text("a" * 30)
    first = read_corpus(data, byte_tokenizer(), cache=cache)
    key = (cache / "key.json").read_text()
    (cache / "key.json").unlink()
    monkeypatch.setenv("RANK", "1")
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            (cache / "key.json").write_text(key)

    monkeypatch.setattr(corpus.time, "sleep", wait)
    assert read_corpus(data, byte_tokenizer(), cache=cache).ids.filename == cache / "ids.bin"
    assert len(waits) == 3
    monkeypatch.setattr(corpus, "PATIENCE", 0)
    alone = read_corpus(data, byte_tokenizer(), cache=tmp_path / "unseen").ids
    assert isinstance(alone, np.memmap) and np.array_equal(alone, first.ids)
    assert not (tmp_path / "unseen").exists()


def test_tokens_stay_beside_a_run_that_may_go_on_and_go_with_any_other(tmp_path):
    out, run = tmp_path / "out", tmp_path / "out.unfinished"
    for goes_on in (True, False):
        run.mkdir() if goes_on else run.rmdir()
        with pytest.raises(KeyError), kept_beside(out, run) as cache:
            cache.mkdir(exist_ok=True)
            raise KeyError
        assert (tmp_path / "out.tokens").exists() == goes_on


def test_what_somebody_keeps_where_tokens_go_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "HELD", 20)
    (tmp_path / "x.txt").write_text("a" * 30)
    for name in ("out.tokens/shard0/mine.bin", "out.tokens/data/mine.bin"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    with kept_beside(tmp_path / "out", tmp_path / "out.unfinished") as cache:
        read_corpus(tmp_path / "x.txt", byte_tokenizer(), cache=cache / "validation")
    assert {str(x.relative_to(cache)) for x in cache.rglob("*.bin")} >= {"shard0/mine.bin", "data/mine.bin"}
    assert not (cache / "validation").exists()


def test_tokens_that_another_run_writes_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "HELD", 20)
    data, out = tmp_path / "x.txt", tmp_path / "out"
    data.write_text("a" * 30)
    cache = tmp_path / "out.tokens/data"
    cache.mkdir(parents=True)
    (cache / "ids.bin").write_bytes(b"half of them")
    with alone_in(cache), pytest.raises(Refusal, match="still going on"):
        with kept_beside(out, tmp_path / "out.unfinished"):
            read_corpus(data, byte_tokenizer(), cache=cache)
    assert (cache / "ids.bin").read_bytes() == b"half of them"
    with kept_beside(out, tmp_path / "out.unfinished"):
        assert len(read_corpus(data, byte_tokenizer(), cache=cache).ids) == 30
    assert not cache.parent.exists()


def test_reading_and_training_on_a_large_corpus_takes_memory_for_a_part_of_it(tmp_path, monkeypatch):
    size = 6_000_000
    with (tmp_path / "x.txt").open("w") as file:
        for i in range(size // 100):
            file.write(f"{i:099d}\n")
    monkeypatch.setattr(corpus, "HELD", 1 << 16)
    monkeypatch.setattr(texts, "PIECE", 1 << 14)
    monkeypatch.setattr(texts, "BLOCK", 1 << 14)
    monkeypatch.setattr("growth.training.data.SOME", 1 << 14)
    tokenizer = byte_tokenizer()
    tokenizer("warm")
    tracemalloc.start()  # which numpy tells of its arrays, and no mapped file
    windows, held_out = split(tmp_path / "x.txt", None, tokenizer, 1000)
    told = windows.fingerprint()
    sum(int(windows[i]["input_ids"][0]) for i in range(0, len(windows), 7))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(windows) + len(held_out) == size // 1000 and told.startswith(f"{len(windows)} windows")
    assert most < size  # as it is, 2 bytes a token would be twice that, int64 eight times


# ---- packed windows


def test_places_begin_anew_with_each_document_and_nothing_predicts_its_first_token():
    windows = Windows(torch.arange(1, 13), 4, np.array([0, 2, 3, 9]))
    batch = windows.batch([0, 1, 2])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 3], [0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 6, 7, 8], [-100, -100, 11, 12]]
    assert {name: x.tolist() for name, x in windows[2].items()} == {
        n: x[2].tolist() for n, x in batch.items()
    }
    assert windows.fingerprint() != Windows(torch.arange(1, 13), 4).fingerprint()
    assert windows.fingerprint() != Windows(torch.arange(1, 13), 4, np.array([0])).fingerprint()


MIXING = [name for name in ALL if name.startswith("granitemoehybrid")]
TELLING = [name for name in ALL if not any(x in name for x in ("bert", "t5")) and name not in MIXING]


@pytest.mark.parametrize("name", MIXING)
def test_a_mamba_of_transformers_that_reads_on_across_documents_is_refused(tmp_path, name):
    with pytest.raises(Refusal, match="pack: .* whose logits change by .* by what is before"):
        refuse_mixing(load_model(ALL[name](tmp_path)))


@pytest.mark.parametrize("name", TELLING)
def test_in_every_family_a_packed_document_is_read_as_it_is_alone(tmp_path, name):
    model = load_model(ALL[name](tmp_path))
    refuse_mixing(model)
    ids = inputs(model.config, T=12)["input_ids"].flatten()
    windows = Windows(ids, 12, np.array([0, 5, 12, 19]))
    losses = []
    for first, last in ((0, 5), (5, 12), (12, 19), (19, 24)):
        part = ids[None, first:last]
        losses.append(model(input_ids=part, labels=part, use_cache=False).loss.item() * (last - first - 1))
    expected = torch.tensor([sum(losses[:2]), sum(losses[2:])]) / 10
    torch.testing.assert_close(windows.losses(model), expected, rtol=2e-5, atol=0)
    batch = windows.batch([0, 1]) | {"use_cache": False}
    assert model.eval()(**batch).loss.item() == pytest.approx(sum(losses) / 20, rel=2e-5)


def test_models_that_run_documents_into_each_other_are_refused_by_name(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    for model, said in (
        (MambaForCausalLM(MambaConfig(**sizes)), "MambaForCausalLM, "),
        (load_model(bert(tmp_path / "bert")), "BertForMaskedLM, "),
    ):
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        with pytest.raises(
            Refusal, match=f"pack: expected a model that keeps .*, got {said}.*; train without"
        ):
            refuse_mixing(model)


def test_windows_that_do_not_know_their_documents_cannot_be_packed():
    with pytest.raises(Refusal, match="pack: expected data whose documents are known, got 3 windows; "):
        examples_of(Windows(torch.arange(12), 4), None, 4, pack=True)
    windows = Windows(torch.arange(12), 4, np.array([0]))
    assert examples_of(windows, None, 4, pack=True) is windows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "saved", "text.txt"])
def test_parts_of_a_file_make_up_the_whole(tmp_path, name):
    """Every row is in one of them, and of a text all but the rest of a line at each seam."""
    datasets, parquet = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    rows = [f"{i} ä漢" + "." * (i % 7) for i in range(40)]
    (tmp_path / "rows.jsonl").write_bytes(lines([{"text": row} for row in rows]))
    (tmp_path / "text.txt").write_text("\n".join(rows))
    data = datasets.Dataset.from_dict({"text": rows})
    parquet.write_table(data.data.table, tmp_path / "rows.parquet", row_group_size=6)
    data.save_to_disk(tmp_path / "saved")
    file = tmp_path / name
    for count in (1, 3, 17, *[500] * (name in ("rows.jsonl", "text.txt"))):  # parts of less than a character
        bounds = [i / count for i in range(count + 1)]
        parts = [list(texts.documents_in(file, name, "text", part)) for part in zip(bounds, bounds[1:])]
        found = [piece for part in parts for piece, _ in part]
        if name != "text.txt":
            assert found == rows
        elif count < 20:
            kept = "\n".join(found).split("\n")
            assert [row for row in kept if row in rows] == [row for row in rows if row in kept]
            assert len(kept) > len(rows) - count
        assert all(part for part in parts) or count > 3


def small_samples(monkeypatch):
    """Whatever is read is too much to be read whole."""
    monkeypatch.setattr(sampled, "SMALL", 0)
    monkeypatch.setattr(sampled, "TOKEN", 1)
    monkeypatch.setattr(sampled, "LITTLE", 64)


def test_some_windows_are_drawn_from_everywhere_and_the_rest_is_not_read(tmp_path, monkeypatch):
    """Two files of different formats, of a byte a token: a line has 10 tokens, its number among them."""
    (tmp_path / "a.txt").write_text("".join(f"{i:09d}\n" for i in range(800)))
    (tmp_path / "b.jsonl").write_bytes(lines([{"text": f"{i:09d}\n"} for i in range(800, 1000)]))
    read, counted = [], texts._blocks
    monkeypatch.setattr(texts, "_blocks", lambda *args: (read.append(len(x)) or x for x in counted(*args)))
    assert sampled.some_tokens(tmp_path, byte_tokenizer(), 20, 32) is None, "12 kB are read whole"
    small_samples(monkeypatch)
    drawn = [sampled.some_tokens(tmp_path, byte_tokenizer(), 20, 32, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    numbers = [int(bytes(window.tolist()).split()[0]) for window in drawn[0].view(32, 20)]
    assert numbers == sorted(numbers) and numbers[-1] >= 800
    assert max(b - a for a, b in zip([0, *numbers], [*numbers, 1000])) < 1000 / 32 * 3
    assert sum(read) < 3 * 32 * 4 * 64, "of each part some pieces"
    many = sampled.some_tokens(tmp_path, byte_tokenizer(), 20, 400)
    assert len({int(bytes(x.tolist()).split()[0]) for x in many.view(400, 20)}) == 400, "none twice"
    assert sampled.some_tokens(tmp_path, byte_tokenizer(), 20, 520) is None, "more than there is"


@pytest.mark.parametrize("name", ["rows.parquet", "saved"])
def test_windows_of_rows_are_drawn_from_all_of_a_file(tmp_path, monkeypatch, name):
    """Also where the file is a single group."""
    datasets, parquet = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    rows = datasets.Dataset.from_dict({"text": [f"{i:09d}\n" for i in range(1000)]})
    parquet.write_table(rows.data.table, tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    small_samples(monkeypatch)
    drawn = [sampled.some_tokens(tmp_path / name, byte_tokenizer(), 20, 32, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    numbers = [0, *(int(bytes(window.tolist()).split()[0]) for window in drawn[0].view(32, 20)), 1000]
    assert max(b - a for a, b in zip(numbers, numbers[1:])) < 1000 / 32 * 3


def test_a_row_is_refused_by_its_number_in_the_file(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    table = pyarrow.table({"text": ["a"] * 900 + [None] + ["a"] * 99})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=400)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "saved"):
        with pytest.raises(Refusal, match=f"{name}, row 901: expected a string"):
            list(texts.documents_in(tmp_path / name, name, "text", (0.7, 1.0)))


def test_paths_are_any_iterable_and_a_sample_refuses_what_the_whole_would(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    (tmp_path / "a.txt").write_text("a" * 90)
    for windows in (None, 3):
        found = examples_of(tmp_path.glob("*"), tokenizer, 4, cache=tmp_path / "cache", windows=windows)
        assert len(found) == 22
    assert len(read_corpus(tmp_path.glob("*.txt"), tokenizer, cache=tmp_path / "cache").ids) == 90
    small_samples(monkeypatch)
    empty, folder = tmp_path / "empty.txt", tmp_path / "folder"
    folder.mkdir()
    for path in (empty, folder / "empty.txt"):
        path.write_text("")
    for path, said in ((empty, "an empty file"), (folder, r"a folder without any \(1 files\)")):
        for windows in (None, 3):
            with pytest.raises(Refusal, match=f"data {path}: expected text, got {said}; name a file"):
                examples_of([tmp_path / "a.txt", path], tokenizer, 4, windows=windows)
    (folder / "empty.txt").unlink()
    for name in texts.SAVED:
        (folder / name).write_text("{}")
    (folder / "gone.arrow").symlink_to(tmp_path / "nothing")
    said = "data .*gone.arrow: expected a file that can be read, got No such file .*; check its links"
    for how in ({"windows": 3}, {"cache": tmp_path / "cache"}):
        with pytest.raises(Refusal, match=said):
            examples_of(folder, tokenizer, 4, **how)


def test_first_tokens_are_those_of_all_and_nothing_behind_them_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i}\n" for i in range(9000)))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    found = sampled.first_tokens(tmp_path, byte_tokenizer(), 300, "text")
    assert bytes(found.tolist()) == (tmp_path / "a.txt").read_bytes()[:300]
    assert len(sampled.first_tokens(tmp_path / "a.txt", byte_tokenizer(), 10**6, "text")) == 43890


@pytest.mark.parametrize("verb", ["check", "redundancy", "align", "ligo", "gradmax"])
def test_who_takes_some_windows_reads_no_more(source, tmp_path, monkeypatch, verb):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog.\n" * 200)
    small_samples(monkeypatch)
    monkeypatch.setattr(data, "read_corpus", lambda *args: pytest.fail("it read everything"))
    few = {"batch_size": 2, "sequence_length": 8, "data": file}
    how = growth.Alignment(steps=1, batches=1, batch_size=2, sequence_length=8)
    if verb == "check":
        (tmp_path / "z.txt").write_bytes(b"\xff")  # which is no text
        growth.check(source, source, text=tmp_path, length=8)
    elif verb == "redundancy":
        redundancy(source, file, windows=3, sequence_length=8, cache=tmp_path / "cache")
    elif verb == "align":
        growth.transfer(source, tmp_path / "out", mixers="retention", align=how, data=file, dry_run=True)
    else:
        method = growth.Ligo(steps=2, **few) if verb == "ligo" else growth.GradMax(batches=2, **few)
        growth.grow(source, tmp_path / "out", growth.Sizes(ffn=192), method, allow_lossy=True)
