"""From files to windows of tokens: what is text, how it is cut, what is refused."""

import codecs
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import bert
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    RobertaConfig,
)

from growth.demo.corpus import byte_tokenizer
from growth.errors import Refusal
from growth.training import corpus, texts
from growth.training.corpus import tokens
from growth.training.data import Windows, collator, window_length
from growth.training.session import _numbered
from growth.training.task import split
from growth.training.texts import load_text
from lcikernels.models import LCIConfig


def test_byte_tokenizer_gives_every_byte_its_own_number_and_decodes_exactly(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f():\n\treturn 'é 漢字 🙂'  # \r\n\x7f\x00 <|endoftext|>"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert len(tokenizer) == 256 and sorted(tokenizer.get_vocab().values()) == list(range(256))


def test_tokens_are_the_bytes_of_all_texts_in_order():
    texts = ["first\n", "", "zweite Zeile ä"]
    assert tokens(texts, byte_tokenizer()).tolist() == list("".join(texts).encode())


def test_every_text_ends_with_the_end_of_text_token_where_there_is_one():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "!"
    assert tokens(["ab", "c"], tokenizer).tolist() == list(b"ab!c!")


def test_windows_follow_each_other_and_drop_the_rest():
    windows = Windows(torch.arange(11), 4)
    assert len(windows) == 2
    assert windows[1]["input_ids"].tolist() == windows[1]["labels"].tolist() == [4, 5, 6, 7]


def test_held_out_windows_are_not_trained_on_and_the_same_for_the_same_seed():
    windows = Windows(torch.arange(40), 4)
    rest, held_out = windows.hold_out(3, seed=5)
    assert sorted(rest.windows[:, 0].tolist() + held_out.windows[:, 0].tolist()) == list(range(0, 40, 4))
    assert torch.equal(windows.hold_out(3, seed=5)[1].windows, held_out.windows)
    assert not torch.equal(windows.hold_out(3, seed=6)[1].windows, held_out.windows)


def test_windows_of_a_masked_model_are_masked_as_bert_s_were(tmp_path):
    windows = Windows(torch.randint(256, (200 * 32,)), 32)
    batch = collator(AutoModelForMaskedLM, bert(tmp_path / "bert"))([windows[i] for i in range(200)])
    x, y = batch.pop("input_ids"), batch.pop("labels")
    assert not batch
    truth, label = windows.windows, y != -100
    assert torch.equal(y[label], truth[label]) and torch.equal(x[~label], truth[~label])
    mask, same = x[label] == 256, x[label] == truth[label]
    shares = torch.stack([label.float().mean(), mask.float().mean(), same.float().mean()])
    # Of 6400 tokens, and of the 960 that are labels: three standard deviations are 0.013, 0.039 and 0.029.
    assert (shares - torch.tensor([0.15, 0.8, 0.1])).abs().lt(torch.tensor([0.014, 0.04, 0.03])).all(), shares


def test_masks_are_drawn_anew_for_every_batch_and_process_and_again_from_a_checkpoint(tmp_path):
    mask = collator(AutoModelForMaskedLM, bert(tmp_path / "bert"))
    items = [{"input_ids": torch.arange(32)}] * 4

    def masks(seed, process, last):
        args = SimpleNamespace(seed=seed, process_index=process, world_size=2)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = 4, 1
        batch = _numbered(mask, args, last)
        return [tuple(batch(items)["labels"].flatten().tolist()) for _ in range(3)]

    first = masks(0, 0, None)
    assert len({*first, *masks(1, 0, None), *masks(0, 1, None)}) == 9
    assert masks(0, 0, "run/checkpoint-1")[:2] == first[1:]


def test_windows_of_a_causal_model_stay_as_they_are_and_a_tokenizer_without_a_mask_is_refused(tmp_path):
    assert collator(AutoModelForCausalLM, tmp_path) is None
    with pytest.raises(Refusal, match="expected a tokenizer with a mask token, got none; "):
        collator(AutoModelForMaskedLM, bert(tmp_path / "bert", masked=False))


def test_a_folder_is_read_in_the_order_of_names_without_hidden_and_empty_files(tmp_path):
    for name, text in {"b.txt": "B", "a/z.py": "A", ".git/config": "no", "empty.py": " \n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_text(tmp_path) == ["A", "B"]


def test_a_folder_is_read_through_its_links(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.txt").write_text("X")
    (tmp_path / "folder/a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder/b.txt").symlink_to(tmp_path / "elsewhere/x.txt")
    assert load_text(tmp_path / "folder") == ["X", "X"]


def test_a_byte_order_mark_is_no_text_and_lines_end_alike(tmp_path):
    (tmp_path / "marked.txt").write_bytes(codecs.BOM_UTF8 + "é\r\nb\rc\n\ufeffd".encode())
    assert load_text(tmp_path / "marked.txt") == ["é\nb\nc\n\ufeffd"]


def test_text_that_cannot_be_used_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    for name, content in {
        "empty.txt": b" \n",
        "bare.txt": codecs.BOM_UTF8,
        "latin.txt": b"caf\xe9",
        "marked latin.txt": codecs.BOM_UTF8 + b"caf\xe9",
        "utf16.txt": "text".encode("utf-16"),
        "utf32.txt": "text".encode("utf-32"),
        "unmarked.txt": "text".encode("utf-16-le"),
    }.items():
        (tmp_path / name).write_bytes(content)
    for name, target in {"loose": "nowhere", "loop": "loop"}.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    for name, target in {"dangling": "nowhere", "turning": "link", "round": "."}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "link").symlink_to(tmp_path / name / target)
    os.mkfifo(tmp_path / "pipe")
    for name, got in {
        "empty.txt": "an empty file",
        "bare.txt": "an empty file",
        "latin.txt": "byte 0xe9 at 3",
        "marked latin.txt": "byte 0xe9 at 6",
        "utf16.txt": "UTF-16, by its first bytes; convert it to UTF-8",
        "utf32.txt": "UTF-32, by its first bytes; convert it to UTF-8",
        "unmarked.txt": "NUL bytes, the first at 1; is it UTF-16, or binary?",
        "none": r"a folder without any \(0 files\)",
        "absent.txt": "nothing there",
        "loose": "a link to nothing",
        "loop": "Too many levels of symbolic links",
        "dangling/link": "a link to nothing",
        "dangling": "a link to nothing",
        "turning": "Too many levels of symbolic links",
        "round": "a link back to .*/round, where it lies",
        "pipe": "a pipe or a device",
    }.items():
        with pytest.raises(Refusal, match=f"data .*/{name}.*: expected .*, got {got}.*") as refusal:
            load_text(tmp_path / name)
        assert "\n" not in str(refusal.value) and "; " in str(refusal.value)
    for nothing in ("", ["", tmp_path], "a\0b"):
        with pytest.raises(Refusal, match="^validation: expected the name of a file or a folder, got '"):
            load_text(nothing, "validation")

    def forbidden(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(Refusal, match="latin.txt: expected a file that can be read, got Permission denied; "):
        load_text(tmp_path / "latin.txt")


ROTARY, LEARNED = GPTNeoXConfig(max_position_embeddings=64), GPT2Config(n_positions=64)
RETENTION = LCIConfig(pattern="RMS", num_hidden_layers=3, max_position_embeddings=64)
WINDOWS = {length: Windows(torch.arange(256), length) for length in (32, 128)}


def test_windows_are_as_long_as_what_was_given_or_the_model_allows():
    assert window_length(ROTARY, "text", None, None) == window_length(LEARNED, "text", "more", 64) == 64
    assert window_length(LEARNED, WINDOWS[32], "text", None) == 32
    assert window_length(ROTARY, "text", WINDOWS[32], 32) == 32
    assert window_length(RETENTION, "text", None, 128) == 128  # a state has no positions
    assert window_length(GPT2Config(n_positions=4096), "text", None, None) == 2048
    roberta = RobertaConfig(max_position_embeddings=34, pad_token_id=1)  # positions begin behind the pad
    assert window_length(roberta, "text", None, None) == 32


def test_windows_that_do_not_fit_the_model_or_each_other_are_refused_with_their_lengths():
    for said, config, text, validation, length in (
        (
            "sequence length: expected at most 64 tokens, .*, got 65; choose at most 64$",
            LEARNED,
            "",
            None,
            65,
        ),
        ("got 65; choose at most 64, or raise max_position_embeddings in its", ROTARY, "", None, 65),
        ("data: expected at most 64 tokens, .*, got 128; ", ROTARY, WINDOWS[128], None, None),
        ("validation: expected at most 64 tokens, .*, got 128; ", LEARNED, "", WINDOWS[128], None),
        (
            "validation: expected windows of 32 .*, as the data has, got 128; ",
            ROTARY,
            *WINDOWS.values(),
            None,
        ),
        (
            "data: expected windows of 16 .*, as the sequence length has, got 32",
            ROTARY,
            WINDOWS[32],
            None,
            16,
        ),
        ("sequence length: expected at least 2, got 1; ", ROTARY, "", None, 1),
    ):
        with pytest.raises(Refusal, match=said):
            window_length(config, text, validation, length)


def test_too_little_text_is_refused_with_what_there_is_and_a_length_that_works(tmp_path):
    (tmp_path / "short.txt").write_text("x" * 40)
    short, tokenizer = tmp_path / "short.txt", byte_tokenizer()
    said = "validation: expected at least 41 tokens, one window, got 40; .* a sequence length of at most 40$"
    with pytest.raises(Refusal, match=said):
        split(WINDOWS[32], short, tokenizer, 41)
    windows, held_out = split(short, short, tokenizer, 40)
    assert len(windows) == len(held_out) == 1
    with pytest.raises(Refusal, match="data: expected at least 2 windows of 40 tokens, one to .*, got 1; "):
        split(short, None, tokenizer, 40)
    windows, held_out = split(short, None, tokenizer, 20)
    assert len(windows) == len(held_out) == 1
    said = (
        "at least one batch on each of 2 processes, 6 windows of 20 tokens, got 1 windows besides 1 held out"
    )
    with pytest.raises(Refusal, match=said):
        windows.refuse_unfit(3, GPT2Config(vocab_size=256), processes=2, held_out=1)
    with pytest.raises(Refusal, match="tokens below the model's 256, got -1"):
        Windows(torch.full((4,), -1), 4).refuse_unfit(1, GPT2Config(vocab_size=256))


def test_a_long_text_is_cut_at_line_ends_and_nothing_is_lost():
    given = ["one\ntwo\nthree four five six\n\n" * 3, "x", "y" * 35]
    blocks = ((text[i : i + 7] for i in range(0, 99, 7)) for text in given)
    found = (piece for document in blocks for piece in texts.pieces(document, 10))
    pieces = [piece for batch in corpus.batches(found, 10) for piece in batch]
    assert all(len(piece) <= 10 for piece, _ in pieces)
    assert "".join(piece + "|" * last for piece, last in pieces) == "|".join(given) + "|"
    assert [piece for piece, _ in pieces][:2] == ["one\ntwo\n", "three four"]
