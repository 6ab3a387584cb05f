"""The options of `growth train`: each does what it says, or is refused in one line."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import ALL, bert, gpt2, neox, saved
from safetensors.torch import load_file
from transformers import Trainer, ViTConfig, ViTForImageClassification

from growth.errors import Refusal
from growth.training.data import Windows
from growth.training.images import Images
from growth.training.run import newest
from growth.training.trainer import train

TEXT = "".join(chr(97 + i * i % 23) + ("\n" if i % 31 == 30 else "") for i in range(4000))
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
GIVEN = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 2, "save_every": 0}


def copied(name: str) -> bool:
    """The head has another name in memory."""
    return "mlp" in name or name == "embed_out.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A student with a record of copied MLPs and head, a teacher, a text."""
    root = tmp_path_factory.mktemp("options")
    neox(root / "model", **SMALL)
    neox(root / "teacher", **SMALL | {"hidden_size": 32})
    rows = [
        {"name": n, "sources": [], "freeze": "mlp" in n, "origin": "copied" if copied(n) else "initialised"}
        for n in load_file(root / "model/model.safetensors")
    ]
    record = {"verb": "transfer", "method": "xatl", "lossless": False, "fingerprint": "", "lineage": []}
    (root / "model/growth.json").write_text(json.dumps(record | {"tensors": rows}))
    (root / "text.txt").write_text(TEXT)
    rows = (TEXT[i : i + 7 + i % 90] for i in range(0, len(TEXT), 97))
    (root / "rows.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    return root


def run(root, out, model="model", data="text.txt", **settings):
    data = root / data if isinstance(data, str) else data
    return train(root / model, data, out, **GIVEN | settings)


def weights(report):
    return load_file(report.out / "model.safetensors")


def losses(report):
    return [point.loss for point in report.curve]


@pytest.fixture(scope="module")
def plain(root, tmp_path_factory):
    return run(root, tmp_path_factory.mktemp("plain") / "out")


def images():
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randn(24, 1, 8, 8, generator=generator), torch.randint(3, (24,), generator=generator))


def vit(folder):
    config = ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    return saved(ViTForImageClassification, config, folder, torch.float32)


LEARNERS = {
    "gpt_neox": (lambda folder: neox(folder, **SMALL), "text.txt"),
    "gpt2, whose loss does not tell that it shifts": (
        lambda folder: gpt2(
            folder, n_embd=16, n_head=2, n_layer=1, n_inner=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        "text.txt",
    ),
    "bert": (
        lambda folder: bert(folder, **SMALL, hidden_dropout_prob=0, attention_probs_dropout_prob=0),
        "text.txt",
    ),
    "lci": (lambda folder: ALL["lci RAM"](folder, vocab_size=256), "text.txt"),
    "vit": (vit, images()),
}


@pytest.mark.parametrize("kind", LEARNERS)
def test_accumulated_batches_make_the_step_of_one_large_batch(root, tmp_path, monkeypatch, kind):
    make, data = LEARNERS[kind]
    make(tmp_path / "model")
    settings = {"model": tmp_path / "model", "data": data, "window": 1}
    told = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time=None: told.append(logs))
    whole = run(root, tmp_path / "whole", **settings)
    parts = run(root, tmp_path / "parts", **settings, batch_size=2, gradient_accumulation=2)
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-5)
    assert abs(losses(whole)[-1] - losses(whole)[0]) > 1e-3
    assert parts.step_flops == whole.step_flops and parts.curve[-1].flops == whole.curve[-1].flops
    for name in ("loss", "grad_norm"):  # Adam does not mind how large gradients are
        seen = [logs[name] for logs in told if name in logs]
        assert len(seen) == 8 and seen[4:] == pytest.approx(seen[:4], rel=2e-4)


def test_layers_that_are_computed_again_cost_operations_and_change_nothing(root, tmp_path, plain):
    again = run(root, tmp_path / "out", gradient_checkpointing=True)
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)
    B, T, D, F = 4, 32, 16, 32
    forward = B * (2 * T * (4 * D * D + D * F) + 2 * 2 * T * T * D)  # but for the last product
    assert again.step_flops - plain.step_flops == forward


def test_weight_decay_takes_its_share_of_matrices_alone(root, tmp_path):
    """One step at the same gradients: weights differ by rate x decay x weight."""
    few = {"steps": 1, "warmup": 0, "eval_every": 1}
    one, other = (weights(run(root, tmp_path / f"{x}", weight_decay=x, **few)) for x in (0.0, 0.5))
    before = load_file(root / "model/model.safetensors")
    for name, x in before.items():
        expected = 1e-2 * 0.5 * x if x.dim() > 1 else torch.zeros_like(x)
        torch.testing.assert_close(one[name] - other[name], expected, rtol=1e-3, atol=1e-6)


def test_what_was_copied_moves_at_its_share_of_the_rate(root, tmp_path):
    few = {"steps": 1, "warmup": 0, "eval_every": 1, "weight_decay": 0.0}
    before = load_file(root / "model/model.safetensors")
    whole, slow = (weights(run(root, tmp_path / f"{x}", copied_rate=x, **few)) for x in (1.0, 0.3))
    rated = weights(run(root, tmp_path / "rated", rates={"*.attention.*": 0.5}, copied_rate=0.3, **few))
    for name, x in before.items():
        share = 0.3 if copied(name) else 1.0
        torch.testing.assert_close(slow[name] - x, share * (whole[name] - x), rtol=1e-3, atol=1e-6)
        share = 0.5 if ".attention." in name else share
        torch.testing.assert_close(rated[name] - x, share * (whole[name] - x), rtol=1e-3, atol=1e-6)


def test_of_patterns_of_names_the_first_counts(root, tmp_path):
    few = {"steps": 1, "warmup": 0, "eval_every": 1, "weight_decay": 0.0}
    before, rates = load_file(root / "model/model.safetensors"), {"*bias": 0.5, "*mlp*": 0.1, "*weight": 0.5}
    whole, rated = (weights(run(root, tmp_path / f"{len(x)}", rates=x, **few)) for x in ({}, rates))
    for name, x in before.items():
        share = 0.1 if "mlp" in name and name.endswith("weight") else 0.5
        torch.testing.assert_close(rated[name] - x, share * (whole[name] - x), rtol=1e-3, atol=1e-6)


def test_a_teacher_changes_what_is_learned_and_is_counted(root, tmp_path, plain):
    taught = run(root, tmp_path / "out", teacher=root / "teacher", teacher_weight=1.0, temperature=2.0)
    assert losses(taught)[0] == losses(plain)[0]  # the data's
    assert losses(taught)[-1] != losses(plain)[-1]
    B, T, d, D, F, V = 4, 32, 16, 32, 32, 256
    teacher = 2 * B * T * (4 * D * D + 2 * D * F) + 2 * 2 * B * T * T * D
    heads = 2 * B * (T - 1) * V * (2 * D + d)  # the teacher's twice, the student's once more
    last = 3 * 2 * B * V * d  # the plain loss has logits of each window's last token too
    assert taught.step_flops - plain.step_flops == teacher + heads - last
    assert taught.settings["teacher_weight"] == 1.0 and len(taught.settings["teacher"]) == 64


def test_packed_rows_train_apart_and_are_measured_apart(root, tmp_path):
    how = {"data": "rows.jsonl", "text_field": "body"}
    packed, mixed = run(root, tmp_path / "packed", **how, pack=True), run(root, tmp_path / "mixed", **how)
    assert losses(packed)[0] != losses(mixed)[0] and losses(packed)[-1] < losses(packed)[0]
    assert packed.settings["pack"] and packed.settings["data"] != mixed.settings["data"]


def test_losses_and_rates_are_told_to_tensorboard_whose_files_stay_with_the_model(root, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report = run(root, tmp_path / "out", window=1, report_to=["tensorboard"])
    (events,) = (tmp_path / "out/runs").rglob("events.*")
    read = reader.EventAccumulator(str(events))
    read.Reload()
    assert [(x.step, x.value) for x in read.Scalars("eval/loss")] == [
        (point.step, pytest.approx(point.loss, rel=1e-6)) for point in report.curve
    ]
    assert [x.step for x in read.Scalars("train/loss")] == [1, 2, 3, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_large_corpus_trains_from_its_file_which_goes_with_the_run(root, tmp_path, monkeypatch, plain):
    monkeypatch.setattr("growth.training.corpus.HELD", 100)
    seen = []
    monkeypatch.setattr(
        "growth.training.progress.RunProgress.step",
        lambda *_: seen.append(sorted(x.name for x in (tmp_path / "out.tokens/data").iterdir())),
    )
    report = run(root, tmp_path / "out")
    assert seen[0] == ["ids.bin", "key.json", "lock", "starts.bin"]
    assert losses(report) == losses(plain)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "growth", "train", *map(str, arguments)], capture_output=True, text=True
    )
    return done.returncode, done.stderr.splitlines()


def test_a_loss_that_is_no_number_ends_the_command_with_one_line_and_keeps_the_last_good_checkpoint(
    root, tmp_path
):
    out = tmp_path / "out"
    settings = ["--steps", 40, "--batch-size", 2, "--gradient-accumulation", 2, "--sequence-length", 16]
    settings += ["--save-every", 1, "--eval-every", 40, "--warmup", 39, "--learning-rate", 1e38]
    code, said = command(root / "model", "--data", root / "text.txt", "--out", out, *settings)
    good = newest(Path(f"{out}.unfinished"))
    assert code == 2 and said[-1].startswith("growth: step ")
    assert f"the last good checkpoint is {good}; choose a lower learning rate, or look at that" in said[-1]
    assert len([line for line in said if "step 0 of 40" not in line]) == 1
    assert all(x.isfinite().all() for x in load_file(good / "model.safetensors").values())


def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(root, tmp_path):
    other = gpt2(root / "gpt2", vocab_size=300)
    short = neox(root / "short", **SMALL | {"max_position_embeddings": 8})
    masked, maskless = bert(root / "bert", **SMALL), bert(root / "maskless", vocab_size=256, masked=False)
    words = shutil.copytree(root / "teacher", root / "words")
    told = json.loads((words / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    a, b = list(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (words / "tokenizer.json").write_text(json.dumps(told))
    windows = Windows(torch.arange(256).repeat(4), 16)
    for said, settings in {
        "gradient accumulation: expected at least 1, got 0; ": {"gradient_accumulation": 0},
        "data: expected at least one batch, 400 windows .*, got 122 windows": {"gradient_accumulation": 100},
        "weight decay: expected at least 0, and finite, got -1": {"weight_decay": -1},
        "weight decay: expected at least 0, and finite, got nan": {"weight_decay": math.nan},
        "patience-counts: expected total or row, got all": {"patience_counts": "all"},
        "copied-rate: expected a share .*, got 0; pass --freeze transferred": {"copied_rate": 0},
        "copied-rate: expected a share .*, got 1.5": {"copied_rate": 1.5},
        "copied-rate .*/teacher: expected a checkpoint with copied": {"copied_rate": 0.3, "model": "teacher"},
        r"rates \*.no: expected a name of the model's parameters, got none": {"rates": {"*.no": 0.5}},
        r"rates \*: expected a share of the rate": {"rates": {"*": -0.5}},
        "teacher weight: expected none without a teacher, got 0.7; pass --teacher": {"teacher_weight": 0.7},
        "temperature: expected none without a teacher, got 2": {"temperature": 2},
        "teacher weight: expected a share .*, got 2": {"teacher": root / "teacher", "teacher_weight": 2},
        "temperature: expected above 0, .*, got 0": {"teacher": root / "teacher", "temperature": 0},
        "gpt2: expected the student's vocabulary of 256 tokens, got 300; name": {"teacher": other},
        "maskless: expected a language model as the student is, a gpt_neox, got bert": {"teacher": maskless},
        "words: expected the student's tokenizer, got 4 other tokens": {"teacher": words},
        "short: expected at least 32 positions, a window's tokens, got 8; pass a": {"teacher": short},
        "teacher .*absent: expected|absent: expected": {"teacher": root / "absent"},
        "bf16, fp16: expected one of them, or neither, got both": {"bf16": True, "fp16": True},
        "report-to: expected one of .*tensorboard.*, got tensorbord; ": {"report_to": ["tensorbord"]},
        "report-to .*: expected its package, got .*; install it, or": {"report_to": ["comet_ml"]},
        "pack: expected a causal language model, got a bert; ": {"pack": True, "model": masked},
        "pack: expected data whose documents are known, got 64 windows; ": {"pack": True, "data": windows},
        "rows.jsonl, line 1: expected a field 'text', got body; ": {"data": "rows.jsonl"},
        "window: expected at least 1, got 0": {"window": 0},
        "warm new: expected a whole number, got 'x'": {"warm_new": "x"},
        "learning rate: expected a number, got '1e-3'": {"learning_rate": "1e-3"},
        "bf16: expected True or False, got 'yes'": {"bf16": "yes"},
        "rates: expected a mapping, got 0.5": {"rates": 0.5},
        "report-to: expected a list of names, got 5": {"report_to": 5},
        "threshold: expected a finite improvement, got nan": {"threshold": math.nan},
    }.items():
        with pytest.raises(Refusal, match=said) as refusal:
            run(root, tmp_path / "out", **settings)
        assert "\n" not in str(refusal.value) and "; " in str(refusal.value)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.accelerator.is_available(), reason="float16 trains on a GPU")
def test_float16_without_a_gpu_is_refused_with_the_reason(root, tmp_path):
    said = "fp16: expected a GPU, for torch scales no loss elsewhere .*, got a CPU alone; pass --bf16"
    with pytest.raises(Refusal, match=said):
        run(root, tmp_path / "out", fp16=True)


def test_the_command_has_every_option_of_the_verb():
    import inspect

    from growth.cli import train as command

    own = {"freeze", "rates", "callbacks"}  # patterns, shares and objects are Python's
    flags = set(inspect.signature(command.train).parameters)
    assert set(inspect.signature(train).parameters) - own - {"out"} <= flags
