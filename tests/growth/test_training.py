"""Schedules, unfreezing, counting, and whole runs of a tiny GPT-NeoX and a tiny BERT."""

import errno
import functools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import bert
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    TokenizersBackend,
    Trainer,
    TrainingArguments,
)

import growth
from growth.demo.corpus import byte_tokenizer
from growth.errors import Refusal
from growth.loading import load_model
from growth.training import result, session
from growth.training.corpus import tokens
from growth.training.curve import evaluate
from growth.training.data import Windows, collator
from growth.training.flops import count_flops
from growth.training.freeze import Plateau, UnfreezeOnPlateau
from growth.training.run import STATE, damage
from growth.training.schedule import cosine, lemon
from growth.training.trainer import train

TEXT = "".join(chr(97 + i * i % 23) + ("\n" if i % 31 == 30 else "") for i in range(6000))


DEFAULTS = {"steps": 8, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 4}


def tiny(seed: int = 0, attention: str = "sdpa") -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=256,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation=attention,
        )
    )
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with its tokenizer, a text beside it, and a record of a transfer that copied the MLPs."""
    root = tmp_path_factory.mktemp("train")
    model = tiny()
    model.save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    write_record(root / "model", "mlp")
    tiny(seed=1).save_pretrained(root / "teacher")
    byte_tokenizer().save_pretrained(root / "teacher")
    (root / "text.txt").write_text(TEXT)
    rows = (TEXT[i : i + 7 + i % 90] for i in range(0, len(TEXT), 97))
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """The same of a BERT, whose tokenizer has a mask."""
    root = tmp_path_factory.mktemp("masked")
    bert(root / "model", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    write_record(root / "model", "intermediate")
    (root / "text.txt").write_text(TEXT)
    return root


def write_record(folder, held_still):
    """What growth would have written, of a model whose tensors of such names are to be held still."""
    rows = [
        {
            "name": name,
            "sources": [],
            "freeze": held_still in name,
            "origin": "copied" if held_still in name else "initialised",
        }
        for name in weights(folder)
    ]
    record = {"verb": "transfer", "method": "xatl", "lossless": True, "fingerprint": "", "lineage": []}
    (folder / "growth.json").write_text(json.dumps(record | {"tensors": rows}))


def weights(path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def run(folder, out, **settings):
    data = folder / settings.pop("data", "text.txt")
    if "teacher" in settings:
        settings |= {"teacher": folder / settings["teacher"]}
    return train(folder / "model", data, folder / out, **DEFAULTS | settings)


@pytest.fixture(scope="module")
def aligned(folder, tmp_path_factory):
    """The same, transferred to retention and Mamba-2, which are fitted to its attention."""
    root = tmp_path_factory.mktemp("aligned")
    how = growth.Alignment(2, batches=2, batch_size=4)
    growth.transfer(folder / "model", root / "model", pattern="RS", align=how, data=folder / "text.txt")
    shutil.copy(folder / "text.txt", root)
    return root


# ---- schedules


def test_cosine_rises_to_one_and_falls_to_the_floor():
    rate = cosine(100, warmup=10, floor=0.1)
    assert [rate(0), rate(4), rate(9), rate(10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert rate(55) == pytest.approx(0.1 + 0.9 / 2)
    assert rate(100) == pytest.approx(0.1) and rate(5000) == pytest.approx(0.1)


def test_lemon_is_a_cosine_of_the_same_peak_over_a_share_of_the_steps():
    fast, slow = lemon(100, warmup=10, share=0.6), cosine(60, warmup=10)
    assert [fast(s) for s in range(100)] == [slow(s) for s in range(100)]
    assert max(fast(s) for s in range(100)) == 1.0


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(Refusal, match="warmup: expected at least 0, and less than the 10 steps, got 10"):
        cosine(10, warmup=10)


# ---- unfreezing


def test_plateau_counts_poor_windows_in_all_not_in_a_row():
    # improvements: 10 %, 0.5 % (poor), 5 %, -1 % (poor)
    losses = [2.0, 1.8, 1.791, 1.70145, 1.7184645]
    assert [Plateau(0.01, 2).reached(losses[0])] == [False]
    plateau = Plateau(0.01, 2)
    assert [plateau.reached(loss) for loss in losses] == [False, False, False, False, True]
    plateau = Plateau(0.01, 1)
    assert [plateau.reached(loss) for loss in losses] == [False, False, True, True, True]
    plateau = Plateau(0.004, 1)
    assert [plateau.reached(loss) for loss in losses] == [False, False, False, False, True]


class Spy(UnfreezeOnPlateau):
    """Follows a frozen and a free weight and the rates in use, and scripts the loss of each window."""

    def __init__(self, frozen, watched, losses, warmup):
        super().__init__(frozen, threshold=0.01, patience=1, warmup=warmup)
        self.watched, self.losses = watched, iter(losses)
        self.moved, self.rates = [], []

    def on_step_begin(self, args, state, control, *, model, **kwargs):
        self.before = [model.get_parameter(name).detach().clone() for name in self.watched]

    def on_pre_optimizer_step(self, args, state, control, *, optimizer, **kwargs):
        super().on_pre_optimizer_step(args, state, control, optimizer=optimizer, **kwargs)
        chosen = {id(p) for p in self._parameters}
        groups = optimizer.param_groups
        own = {g["lr"] for g in groups if all(id(p) in chosen for p in g["params"])}
        main = {g["lr"] for g in groups if any(id(p) not in chosen for p in g["params"])}
        self.rates.append((main.pop(), own.pop() if own else None))

    def on_step_end(self, args, state, control, *, model, optimizer, **kwargs):
        assert len(optimizer.param_groups) == 2  # the Trainer's own two are back
        after = [model.get_parameter(name) for name in self.watched]
        self.moved.append(tuple(not torch.equal(a, b) for a, b in zip(self.before, after)))

    def on_log(self, args, state, control, *, logs, **kwargs):
        if "loss" in logs and self.unfrozen_at is None:
            super().on_log(args, state, control, logs={"loss": next(self.losses)}, **kwargs)


def test_in_a_trainer_of_ones_own_frozen_weights_stay_then_warm_up_on_their_own(tmp_path):
    model = tiny()
    frozen = [name for name, _ in model.named_parameters() if "mlp" in name or "norm" in name]
    spy = Spy(
        frozen, [frozen[0], "gpt_neox.layers.0.attention.dense.weight"], [2.0, 1.8, 1.795, 1.0], warmup=3
    )
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=2,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    windows = Windows(tokens([TEXT], byte_tokenizer()), 16)
    Trainer(model=model, args=args, train_dataset=windows, callbacks=[spy]).train()
    assert spy.unfrozen_at == 6  # the third window of two steps is the poor one
    assert spy.moved == [(False, True)] * 6 + [(True, True)] * 6
    assert [own for _, own in spy.rates[6:9]] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert {main for main, _ in spy.rates} == {1e-2}
    assert all(own is None for _, own in spy.rates[:6])
    assert all(p.requires_grad for p in model.parameters())


def test_freezing_everything_or_a_name_that_does_not_exist_is_refused(tmp_path):
    model = tiny()
    state = type("State", (), {"global_step": 0})
    with pytest.raises(Refusal, match="at least one parameter left to train, got all"):
        UnfreezeOnPlateau([n for n, _ in model.named_parameters()]).on_train_begin(
            None, state, None, model=model
        )
    with pytest.raises(Refusal, match="names of the model's parameters, got no.such"):
        UnfreezeOnPlateau(["no.such"]).on_train_begin(None, state, None, model=model)


# ---- counting


@pytest.mark.parametrize("attention, products", [("eager", 2 + 4), ("sdpa", 2 + 5)])
def test_flops_of_a_step_equal_the_formula(attention, products):
    """Forward 2, backward 4 operations a weight and token; fused attention recomputes one product."""
    model, B, T, D, L, V = tiny(attention=attention), 3, 32, 16, 2, 256
    x = torch.randint(V, (B, T))
    weights = 12 * D * D * L + V * D
    assert (
        count_flops(model, {"input_ids": x, "labels": x})
        == 6 * weights * B * T + L * B * products * 2 * T * T * D
    )


def test_a_frozen_matrix_costs_no_gradient_of_its_own():
    model, B, T, D = tiny(), 3, 32, 16
    x = torch.randint(256, (B, T))
    batch = {"input_ids": x, "labels": x}
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    assert count_flops(model, batch) - count_flops(model, batch, [name]) == 2 * 4 * D * D * B * T
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_evaluation_equals_the_mean_of_the_windows_losses():
    model, x = tiny(), torch.randint(256, (5, 32))
    losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in x]
    assert evaluate(model, x) == pytest.approx(sum(losses) / 5, rel=1e-6)


def test_evaluation_of_a_masked_model_is_its_own_loss_over_all_that_is_masked(tmp_path, monkeypatch):
    model = load_model(bert(tmp_path / "bert")).eval()
    batch = collator(AutoModelForMaskedLM, tmp_path / "bert")(
        [{"input_ids": w} for w in torch.randint(256, (5, 32))]
    )
    monkeypatch.setattr("growth.training.curve.EVAL_TOKENS", 64)  # the parts have different numbers of labels
    assert evaluate(model, *batch.values()) == pytest.approx(model(**batch).loss.item(), rel=1e-6)


# ---- whole runs


def test_a_run_writes_a_checkpoint_that_generates_text_and_a_curve_that_falls(folder):
    report = run(folder, "whole", steps=24)
    assert [p.step for p in report.curve] == list(range(0, 25, 4))
    assert report.curve[-1].loss < report.curve[0].loss - 0.3
    assert [p.flops for p in report.curve] == [p.step * report.step_flops for p in report.curve]
    assert all(a.seconds < b.seconds for a, b in zip(report.curve, report.curve[1:]))
    assert json.loads((folder / "whole" / "training.json").read_text()) == report.json() | {"before": []}
    names = {f.name for f in (folder / "whole").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "training.json"}
    assert not names & {"training_args.bin", "optimizer.pt"} and not (folder / "whole.unfinished").exists()
    model = AutoModelForCausalLM.from_pretrained(folder / "whole")
    assert model.config.use_cache is True  # as its source's
    tokenizer = AutoTokenizer.from_pretrained(folder / "whole")
    prompt = tokenizer("abc", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(out[0]).startswith("abc")


def test_a_masked_model_trains_and_is_measured_on_the_same_masks_each_time(masked):
    report = run(masked, "whole", steps=24)
    assert report.curve[-1].loss < report.curve[0].loss - 0.3
    assert [p.flops for p in report.curve] == [p.step * report.step_flops for p in report.curve]
    windows = Windows(tokens([TEXT], byte_tokenizer()), 32)
    held_out = [{"input_ids": window} for window in windows.hold_out(10)[1].windows]
    model = load_model(masked / "whole")
    again = [
        evaluate(model, *collator(AutoModelForMaskedLM, masked / "whole")(held_out, seed=0).values())
        for _ in range(2)
    ]
    assert again[0] == again[1] == pytest.approx(report.curve[-1].loss, rel=1e-6)
    assert run(masked, "other", steps=1, seed=1).curve[0].loss == report.curve[0].loss


def test_another_seed_gives_another_order(folder, tmp_path):
    one, other = (weights(run(folder, tmp_path / f"{i}", steps=1, seed=i).out) for i in range(2))
    assert any(not torch.equal(one[n], other[n]) for n in one)


class PowerCut(Exception):
    pass


def cut_at(monkeypatch, step):
    def interrupt(self, now):
        if now == step:
            raise PowerCut

    monkeypatch.setattr("growth.training.progress.RunProgress.step", interrupt)


UNFREEZING = {"freeze": "transferred", "unfreeze": "plateau", "window": 2, "threshold": 9.0}  # after 4 steps
SAVING = {"save_every": 3, "warmup": 3}
EVERYTHING = (
    SAVING
    | UNFREEZING
    | {
        "data": "rows.jsonl",
        "gradient_accumulation": 2,
        "batch_size": 2,
        "copied_rate": 0.3,
        "rates": {"*.attention.*": 0.9},
        "teacher": "teacher",
        "temperature": 2.0,
        "pack": True,
        "gradient_checkpointing": True,
        "bf16": True,
    }
)
KINDS = {
    "all at once": ("folder", EVERYTHING),
    "plain": ("folder", SAVING),
    "unfreezing": ("folder", SAVING | UNFREEZING),
    "aligned": ("aligned", SAVING | UNFREEZING | {"copied_rate": 0.3, "sequence_length": 32}),
    "masked, epochs of 4 steps": ("masked", SAVING | {"batch_size": 40}),
}


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """kind -> the report of an uninterrupted run, made once."""
    root = tmp_path_factory.mktemp("whole")

    @functools.cache
    def made(kind):
        folder, settings = KINDS[kind]
        return run(request.getfixturevalue(folder), root / kind, **settings)

    return made


@pytest.fixture(scope="module")
def interrupted(folder, tmp_path_factory):
    """What a plain run leaves that was cut after 7 of its 8 steps: checkpoints 3 and 6."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, 7)
        run(folder, out, **SAVING)
    return Path(f"{out}.unfinished")


def assert_alike(report, expected):
    assert report.unfrozen_at == expected.unfrozen_at
    assert [(p.step, p.flops, p.loss) for p in report.curve] == [
        (p.step, p.flops, p.loss) for p in expected.curve
    ]
    got, truth = weights(report.out), weights(expected.out)
    assert got.keys() == truth.keys() and all(torch.equal(truth[name], got[name]) for name in truth)


@pytest.mark.parametrize(
    "kind, cut",
    [
        ("unfreezing", 5),
        ("unfreezing", 7),
        ("aligned", 5),
        ("masked, epochs of 4 steps", 7),
        ("all at once", 4),
        ("all at once", 7),
    ],
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    request, tmp_path, monkeypatch, capfd, whole, kind, cut
):
    folder, settings = request.getfixturevalue(KINDS[kind][0]), KINDS[kind][1]
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, cut)
        run(folder, tmp_path / "cut", **settings)
    saved = f"checkpoint-{cut // 3 * 3}"
    assert f"cut.unfinished: pass --resume to go on from {saved}\n" in capfd.readouterr().err
    assert not (tmp_path / "cut").exists()
    with pytest.raises(
        Refusal, match=f"cut.unfinished: expected no interrupted run.* pass --resume .*{saved}"
    ):
        run(folder, tmp_path / "cut", **settings)
    assert_alike(run(folder, tmp_path / "cut", **settings, resume=True), whole(kind))
    assert [p.name for p in tmp_path.iterdir()] == ["cut"]
    assert whole(kind).unfrozen_at == (4 if "unfreeze" in settings else None)


@pytest.mark.parametrize("lost", ["the place", "all but the checkpoints", "a side file", "an epoch's last"])
def test_nothing_that_was_trained_is_lost_where_finishing_fails(folder, tmp_path, monkeypatch, whole, lost):
    out, save = tmp_path / "out", session.save

    def failing(engine, report, source):
        if lost == "the place":
            (tmp_path / "out").mkdir()
            (tmp_path / "out/job.log").write_text("another program's")
        if lost == "a side file":
            monkeypatch.setattr(result, "TRAINING", "nowhere/training.json")
        if lost in ("all but the checkpoints", "an epoch's last"):
            (tmp_path / "out.unfinished/model/model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(engine, report, source)

    settings = SAVING if lost != "an epoch's last" else SAVING | {"batch_size": 45}  # 8 steps are 2 epochs
    with monkeypatch.context() as patch, pytest.raises(Refusal) as refusal:
        patch.setattr(session, "save", failing)
        run(folder, out, **settings)
    monkeypatch.undo()
    expected = whole("plain")
    if lost == "the place":
        assert f"the result is in {out}-2; " in str(refusal.value)
        assert (out / "job.log").exists() and not Path(f"{out}.unfinished").exists()
        assert_alike(replace(expected, out=Path(f"{out}-2")), expected)
    elif lost == "a side file":
        assert f"the trained model is in {out}.unfinished/model" in str(refusal.value)
        assert_alike(replace(expected, out=Path(f"{out}.unfinished/model")), expected)
    else:
        said = "No space left on device; pass --resume to go on from checkpoint-8"
        assert said in str(refusal.value)
        monkeypatch.setattr(Trainer, "training_step", None)  # no step is left to be done
        resumed = run(folder, out, **settings, resume=True)
        assert [p.step for p in resumed.curve] == [0, 4, 8]
        if settings == SAVING:
            assert_alike(resumed, expected)
        assert not Path(f"{out}.unfinished").exists()


def test_a_source_that_vanishes_while_training_takes_nothing_along(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "model", tmp_path / "model")
    monkeypatch.setattr(
        "growth.training.progress.RunProgress.step", lambda *_: shutil.rmtree(tmp_path / "model")
    )
    train(tmp_path / "model", folder / "text.txt", tmp_path / "out", steps=1, save_every=0)
    assert {"tokenizer.json", "growth.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == [97, 98]


def test_a_loss_that_has_risen_is_said_so(folder, tmp_path):
    risen, fallen = (run(folder, tmp_path / f"{rate}", steps=2, learning_rate=rate) for rate in (3.0, 1e-3))
    assert str(risen).endswith("; it rose: a learning rate below 3, or more steps, may lower it")
    assert "it rose" not in str(fallen)


def test_what_cannot_be_written_is_found_before_the_first_step(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "training_step", None)
    size = sum(x.numel() for x in weights(folder / "model").values())
    need = 4 * (2 * 3 + 1) * size  # two checkpoints with two moments a parameter, and the model
    for free, said in ((need - 1, "out.unfinished: expected room for 0.000"), (0, "got 0 GB; make room")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(Refusal, match=said):
            run(folder, tmp_path / "new/out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenizersBackend, "save_pretrained", full)
    with pytest.raises(Refusal, match="got .*No space left on device; make room, and start again"):
        run(folder, tmp_path / "new/out")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_before_the_first_checkpoint_leaves_nothing(folder, tmp_path, monkeypatch):
    cut_at(monkeypatch, 2)
    with pytest.raises(PowerCut):
        run(folder, tmp_path / "new/cut", save_every=3)
    assert list(tmp_path.iterdir()) == []


def sharded(checkpoint):
    """Weights over two files, with their index."""
    file, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = sorted(weights(checkpoint))
    for i, shard in enumerate(shards):
        save_file({name: weights(checkpoint)[name] for name in names[i::2]}, checkpoint / shard)
    index.write_text(json.dumps({"weight_map": {name: shards[i % 2] for i, name in enumerate(names)}}))
    file.unlink()


def fully_sharded(checkpoint):
    """Weights and moments as FSDP writes them."""
    for name, file in {"pytorch_model_fsdp_0": "model.safetensors", "optimizer_0": "optimizer.pt"}.items():
        dcp.save({"x": torch.randn(100)}, checkpoint_id=checkpoint / name, no_dist=True)
        (checkpoint / file).unlink()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_checkpoint_is_whole_where_each_of_its_files_is(interrupted, tmp_path):
    def case(*changes):
        shutil.rmtree(tmp_path / "checkpoint-6", ignore_errors=True)
        shutil.copytree(interrupted / "checkpoint-6", tmp_path / "checkpoint-6")
        for change in changes:
            change(tmp_path / "checkpoint-6")
        return damage(tmp_path / "checkpoint-6")

    def cut(name):
        return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)

    def written(name, content):
        return lambda folder: (folder / name).write_bytes(content)

    def zeros(folder):
        """As a power cut leaves a file whose blocks were never written."""
        with (folder / "optimizer.pt").open("r+b") as file:
            file.seek(4096)
            file.write(bytes(4096))

    def lost(name):
        return lambda folder: (folder / name).unlink()

    assert case() == case(sharded) == case(fully_sharded) == ""
    assert case(zeros) == "optimizer.pt does not match its checksums"
    for name in ("optimizer.pt", "model.safetensors", "scheduler.pt", "rng_state.pth", STATE):
        assert case(cut(name)).startswith(f"{name} is damaged"), name
        assert case(written(name, b"")).startswith(f"{name} is damaged"), name
        assert case(lost(name)) == f"{name} is missing"
    assert case(written(STATE, b"[]")).startswith(f"{STATE} is damaged")
    second = "model-00002-of-00002.safetensors"
    assert case(sharded, lost(second)) == f"model.safetensors.index.json names {second}, which is missing"
    assert case(sharded, cut(second)).startswith(f"{second} is damaged")
    piece = "optimizer_0/__0_0.distcp"
    assert case(fully_sharded, cut(piece)).startswith("optimizer_0/.metadata names ")
    assert case(fully_sharded, lost(piece)).startswith("optimizer_0/.metadata names ")
    assert case(fully_sharded, cut("optimizer_0/.metadata")).startswith("optimizer_0/.metadata is damaged")
    state = json.loads((interrupted / "checkpoint-6" / STATE).read_text())
    state["stateful_callbacks"]["Processes"]["attributes"]["number"] = 2
    assert case(written(STATE, json.dumps(state).encode())) == "rng_state_0.pth is missing"


def test_a_run_goes_on_from_its_newest_whole_checkpoint_or_says_that_there_is_none(
    folder, interrupted, tmp_path, whole, capfd
):
    run_folder = tmp_path / "out.unfinished"
    shutil.copytree(interrupted, run_folder)
    os.truncate(run_folder / "checkpoint-6/optimizer.pt", 100)
    shutil.copytree(run_folder, tmp_path / "none.unfinished")
    resumed = run(folder, tmp_path / "out", **SAVING, resume=True)
    assert_alike(resumed, whole("plain"))
    assert "checkpoint-6: passed over, optimizer.pt is damaged" in capfd.readouterr().err
    os.truncate(tmp_path / "none.unfinished/checkpoint-3/model.safetensors", 100)
    said = "resume: expected a whole checkpoint in .*none.unfinished, got none; remove .* and start again"
    with pytest.raises(Refusal, match=said):
        run(folder, tmp_path / "none", **SAVING, resume=True)
    assert (tmp_path / "none.unfinished/checkpoint-6").exists()


def test_a_run_goes_on_under_the_settings_data_and_model_it_began_with(folder, interrupted, tmp_path, capfd):
    shutil.copytree(interrupted, tmp_path / "out.unfinished")
    shutil.copytree(folder / "model", tmp_path / "model")
    changed = weights(folder / "model")
    changed["embed_out.weight"][3, 5] += 1e-3
    save_file(changed, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    record, text, out = tmp_path / "out.unfinished/settings.json", folder / "text.txt", tmp_path / "out"
    before = json.loads(record.read_text())
    for said, model, data, settings in (
        ("expected seed 0, got seed 1; ", folder / "model", text, {"seed": 1}),
        ("expected save_every 3, got save_every 2; ", folder / "model", text, {"save_every": 2}),
        ("expected data 1.. windows, .*, got data 1.. windows", folder / "model", tmp_path / "other.txt", {}),
        ("expected data .*, validation 10 windows, .* got", folder / "model", text, {"validation": text}),
        (
            r"expected weights \w{64}, got weights \w{64}; use the settings of .*json",
            tmp_path / "model",
            text,
            {},
        ),
    ):
        with pytest.raises(Refusal, match=f"resume: {said}") as refusal:
            train(model, data, out, **DEFAULTS | SAVING | settings, resume=True)
        assert "\n" not in str(refusal.value)
    for content, said in (
        (b"{", "expected JSON, got "),
        (b"[]", "expected an object, got list"),
        (json.dumps(before | {"batch_size": 5}).encode(), "expected 5 examples a step, .*, got 4 examples"),
        (None, "got No such file or directory; put the file back, or remove"),
    ):
        record.write_bytes(content) if content else record.unlink()
        with pytest.raises(Refusal, match=f"resume: .*{said}") as refusal:
            run(folder, out, **SAVING, resume=True)
        assert "\n" not in str(refusal.value)
    capfd.readouterr()
    record.write_text(json.dumps(before | {"torch": "2.0", "seed": 7}))
    with pytest.raises(Refusal, match="expected seed 7, got seed 0"):
        run(folder, out, **SAVING, resume=True)
    for file in record.parent.glob(f"*/{STATE}"):
        file.unlink()
    record.write_text(json.dumps(before | {"torch": "2.0"}))
    with pytest.raises(Refusal, match="expected a whole checkpoint"):
        run(folder, out, **SAVING, resume=True)
    assert (
        f"out.unfinished: began with torch 2.0, goes on with {torch.__version__}\n" in capfd.readouterr().err
    )


def test_a_trained_model_is_configured_as_its_source_was_but_for_float32(tmp_path):
    model = tiny().to(torch.bfloat16)
    model.config.update({"use_cache": False, "attention_dropout": 0.1, "hidden_dropout": 0.2})
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    run(tmp_path, "out", steps=1)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "out"))
    assert before["use_cache"] is False and before["attention_dropout"] == 0.1
    assert after == before | {"dtype": "float32"}
    assert {x.dtype for x in weights(tmp_path / "out").values()} == {torch.float32}


def test_a_trained_checkpoint_keeps_its_history_and_promises_nothing(whole):
    record = json.loads((whole("plain").out / "growth.json").read_text())
    assert record["tensors"] and not record["lossless"]


def test_frozen_weights_stay_to_the_end_and_cost_less(folder, tmp_path):
    report = run(folder, tmp_path / "frozen", freeze="transferred")
    before, after = weights(folder / "model"), weights(tmp_path / "frozen")
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        n for n in before if "mlp" in n
    }
    assert report.unfrozen_at is None
    assert report.curve[-1].flops < 8 * report.step_flops


def test_bad_calls_are_refused_with_nothing_written(folder, tmp_path):
    (tmp_path / "exists").mkdir()
    (tmp_path / "short.txt").write_text("only a few words")
    (tmp_path / "bare").mkdir()
    model, text, out = folder / "model", folder / "text.txt", tmp_path / "out"
    strange = Windows(torch.full((640,), 300), 16)
    untold = folder / "untold"
    tiny().save_pretrained(untold)
    maskless, narrow = bert(folder / "maskless", masked=False), bert(folder / "narrow", vocab_size=256)
    for said, arguments in {
        "exists: expected an output folder that does not exist": (model, text, tmp_path / "exists", {}),
        "bare: expected a checkpoint folder with config.json": (tmp_path / "bare", text, out, {}),
        "checkpoint: expected the name of a folder, got ''": ("", text, out, {}),
        "output folder: expected the name of a folder, got ''": (model, text, "", {}),
        "data: expected the name of a file or a folder, got ''": (model, "", out, {}),
        "validation: expected the name of a file or a folder, got ''": (model, text, out, {"validation": ""}),
        "data: expected at least 32 tokens": (model, tmp_path / "short.txt", out, {}),
        "absent: expected a file or a folder": (model, tmp_path / "absent", out, {}),
        "data: expected at least one batch": (model, text, out, {"batch_size": 4000}),
        "steps: expected at least 1, got 0": (model, text, out, {"steps": 0}),
        "sequence length: expected at least 2": (model, text, out, {"sequence_length": 1}),
        "sequence length: expected at most 32": (model, text, out, {"sequence_length": 33}),
        "validation: expected tokens below the model's 256, got 300": (
            model,
            text,
            out,
            {"sequence_length": 16, "validation": strange},
        ),
        "data: expected tokens below the model's 256, got 300": (model, strange, out, {}),
        "narrow: expected a tokenizer of the model's 256 tokens, got 257": (narrow, text, out, {}),
        "maskless: expected a tokenizer with a mask token, got none": (maskless, text, out, {}),
        "untold: expected a tokenizer beside the model": (untold, text, out, {}),
        "schedule: expected cosine or lemon or constant, got step": (model, text, out, {"schedule": "step"}),
        "freeze, unfreeze: expected": (model, text, out, {"unfreeze": "plateau"}),
        "warmup: expected at least 0": (model, text, out, {"warmup": 8}),
        "decay: expected a share": (model, text, out, {"schedule": "lemon", "decay": 1.5}),
        "resume: expected an interrupted run": (model, text, out, {"resume": True}),
    }.items():
        *paths, settings = arguments
        with pytest.raises(Refusal, match=f"{said}.*; .*") as refusal:
            train(*paths, **{"steps": 8, "batch_size": 4} | settings)
        assert "\n" not in str(refusal.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "exists", "short.txt"]


def test_a_line_is_printed_for_every_evaluation_and_nothing_else(folder, tmp_path, capfd):
    run(folder, tmp_path / "spoken")
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"{tmp_path / 'spoken'}: step {n} of 8" for n in (0, 4, 8)
    ]


def test_what_is_not_finite_is_neither_trained_nor_kept(folder, tmp_path):
    settings = {"steps": 3, "batch_size": 2, "sequence_length": 16}
    wild = {"learning_rate": 1e30, "save_every": 0}
    with pytest.raises(Refusal, match="step 1: expected a finite loss, got a validation loss of nan"):
        train(folder / "model", folder / "text.txt", tmp_path / "a", **settings | wild | {"steps": 1})
    src = shutil.copytree(folder / "model", tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.bias"][0] = float("nan")
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match="model: expected a finite loss before the first step, got nan"):
        train(src, folder / "text.txt", tmp_path / "b", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_run_whose_folder_cannot_be_made_leaves_nothing(folder, tmp_path):
    with pytest.raises(Refusal, match="File name too long"):
        train(folder / "model", folder / "text.txt", tmp_path / "new" / ("a" * 250), steps=1, batch_size=1)
    assert list(tmp_path.iterdir()) == []
