"""The options of `growth train`: each does what it says, or is refused in one line."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import ALL, bert, gpt2, neox, pico, saved
from faults import contents
from safetensors.torch import load_file
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from growth.errors import Refusal
from growth.training.data import Windows
from growth.training.finite import NotFinite
from growth.training.images import Images
from growth.training.run import newest
from growth.training.schedule import cosine
from growth.training.trainer import train
from lcikernels.compat.transformers import is_patched

TEXT = "".join(chr(97 + i * i % 23) + ("\n" if i % 31 == 30 else "") for i in range(4000))
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
GIVEN = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 2, "save_every": 0}


mamba = pico(MambaForCausalLM, MambaConfig, hidden_size=32, num_hidden_layers=1, state_size=4)


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


class IsPatched(TrainerCallback):
    def __init__(self):
        self.seen = set()

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.add(is_patched())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "name, layers", [("granitemoehybrid", 2), ("mamba", 1), ("gpt_neox", 0)], ids=lambda x: str(x)
)
def test_mamba_layers_of_transformers_train_on_kernels_as_long_as_the_run_lasts(
    root, tmp_path, capfd, name, layers, bf16
):
    makers = {"granitemoehybrid": ALL["granitemoehybrid"], "mamba": mamba, "gpt_neox": neox}
    src = makers[name](tmp_path / "src", vocab_size=256)
    how = {"model": src, "sequence_length": 16, "steps": 2, "batch_size": 2, "bf16": bf16}
    ends = {}
    for kernels in (True, False):
        capfd.readouterr()
        patched = IsPatched()
        report = run(root, tmp_path / f"{kernels}", **how, kernels=kernels, callbacks=[patched])
        said = f"{layers} Mamba layers of " in capfd.readouterr().err
        assert said == (kernels and layers > 0) and patched.seen == {said} and not is_patched()
        ends[kernels] = losses(report)
    assert ends[True] == pytest.approx(ends[False], rel=1e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("name", ["gpt_neox tied", "llama", "bert", "mamba"])
def test_a_dry_run_tells_what_the_run_does_and_writes_nothing(root, tmp_path, name):
    src = (ALL | {"mamba": mamba})[name](tmp_path / "src", vocab_size=300)
    if name == "bert":
        bert(src)
    how = {"model": src, "sequence_length": 16, "save_every": 2, "gradient_accumulation": 2}
    before = contents(tmp_path)
    plan = run(root, None, **how, dry_run=True)
    assert contents(tmp_path) == before
    report = run(root, tmp_path / "out", **how)
    assert (plan.parameters, plan.settings) == (report.parameters, report.settings)
    assert plan.tokens == 4 * 4 * 2 * 16 and plan.epochs == 32 / plan.examples and plan.checkpoints == 2
    assert (plan.takes is None) == (name == "mamba")
    assert any("none on paper" in line for line in plan.lines()) == (name == "mamba")
    if plan.takes:
        assert plan.takes.flops == pytest.approx(report.step_flops, rel=0.01)
    assert json.loads(json.dumps(plan.json()))["source"] == str(src)


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
    assert code == 2 and said[-1].startswith("growth: step 2: expected a finite loss, got nan on the batch ")
    assert said[-1].endswith(
        "; no good checkpoint was saved before; choose a lower learning rate, or look at that batch"
    )
    assert len([line for line in said if "step 0 of 40" not in line]) == 1
    assert [x.name for x in tmp_path.iterdir()] == []  # that of step 1 gave this loss


class Diverge(TrainerCallback):
    """Step 4 spoils the weights where the rate is high, or has a gradient that is no number."""

    def __init__(self, what):
        self.what = what

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        if state.global_step == 3 and args.learning_rate > 0.1 and self.what == "gradient":
            model.get_input_embeddings().weight.grad[:] = math.nan

    def on_optimizer_step(self, args, state, control, *, model, **kwargs):
        if state.global_step == 3 and args.learning_rate > 0.1 and self.what == "weights":
            for parameter in model.parameters():
                parameter.data *= 1e30


@pytest.mark.parametrize(
    ("what", "every", "step", "good"),
    [("weights", 8, 5, 3), ("weights", 4, 4, 3), ("gradient", 8, 4, 2)],
    ids=["the next loss", "the validation loss", "the gradient"],
)
def test_after_a_loss_that_is_no_number_the_last_good_checkpoint_goes_on_at_a_lower_rate(
    root, tmp_path, capfd, what, every, step, good
):
    how = {"steps": 8, "save_every": 1, "eval_every": every, "warmup": 2, "keep_optimizer": True, "window": 1}
    how |= {"callbacks": [Diverge(what)], "rates": {"*.mlp.*": 0.5}}
    kept = tmp_path / f"out.unfinished/checkpoint-{good}"
    said = f"^step {step}: expected a finite loss, got .*; the last good checkpoint is {kept}.*; --resume"
    with pytest.raises(NotFinite, match=said):
        run(root, tmp_path / "out", **how, learning_rate=0.2)
    assert newest(kept.parent) == kept
    for odd in ({"learning_rate": 0.3}, {"learning_rate": 0.02, "weight_decay": 0.2}):
        with pytest.raises(Refusal, match="resume: expected .*learning_rate 0.2.*, got .*; use the settings"):
            run(root, tmp_path / "out", **how | odd, resume=True)
    capfd.readouterr()
    report = run(root, tmp_path / "out", **how, learning_rate=0.02, resume=True)
    assert f"goes on after step {good} at a learning rate of 0.02, not 0.2" in capfd.readouterr().err
    assert report.settings["lowered"] == [{"learning_rate": 0.2, "last_step": good}]
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    rates = {x["step"]: x["learning_rate"] for x in state["log_history"] if "learning_rate" in x}
    shape = cosine(8, warmup=2)
    peaks = {n: 0.2 if n <= good else 0.02 for n in range(1, 9)}
    assert rates == {n: pytest.approx(peak * shape(n - 1)) for n, peak in peaks.items()}
    groups = torch.load(tmp_path / "out/optimizer.pt")["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.02, 0.01}


def test_what_is_not_finite_is_the_only_end_after_which_a_rate_may_be_lowered(root, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("growth.training.session.save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path / "out", save_every=2)
    before = contents(tmp_path)
    plan = run(root, tmp_path / "out", save_every=2, resume=True, dry_run=True)
    assert plan.goes_on == "goes on from checkpoint-4"
    with pytest.raises(Refusal, match="resume: expected an interrupted run in .*, got none; leave --resume"):
        run(root, None, save_every=2, resume=True, dry_run=True)
    with pytest.raises(Refusal, match="expected no interrupted run, got one; pass --resume"):
        run(root, tmp_path / "out", save_every=2, dry_run=True)
    for dry_run in (False, True):
        with pytest.raises(Refusal, match="resume: expected seed 0, got seed 1; use the settings of"):
            run(root, tmp_path / "out", save_every=2, seed=1, resume=True, dry_run=dry_run)
    assert contents(tmp_path) == before
    record = tmp_path / "out.unfinished/settings.json"
    two = json.loads(record.read_text()) | {"processes": 2}  # of whose steps one process takes each half
    record.write_text(json.dumps(two))
    assert run(root, tmp_path / "out", save_every=2, resume=True, dry_run=True).each_step == 8
    with pytest.raises(
        Refusal, match="resume: expected learning_rate 0.01, got learning_rate 0.001; use the"
    ):
        run(root, tmp_path / "out", save_every=2, learning_rate=1e-3, resume=True)


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
        for dry_run in (False, True) if "rates" in settings else (False,):  # the plan makes its own model
            with pytest.raises(Refusal, match=said) as refusal:
                run(root, tmp_path / "out", **settings, dry_run=dry_run)
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
