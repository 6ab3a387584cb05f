"""Masks that open while a model trains: in `growth train`, in a plain Trainer, and resumed."""

import json
import shutil
import sys

import pytest
import torch
from checkpoints import bert, neox
from safetensors.torch import load_file
from torch import distributed
from train_ranks import started
from transformers import Trainer, TrainerCallback, TrainingArguments

import growth
from growth.__main__ import main
from growth.errors import Refusal
from growth.loading import load_model
from growth.training.callbacks import OpenMasks, SubmodelStage
from growth.training.masks import Masks, closed_of
from growth.training.trainer import train

TEXT = "".join(chr(97 + i * i % 23) + ("\n" if i % 31 == 30 else "") for i in range(6000))
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
RUN = {"steps": 8, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 2, "save_every": 3}


@pytest.fixture(scope="module", params=["gpt_neox", "bert"])
def folder(request, tmp_path_factory):
    """A source, what masked growth made of it, and a text."""
    root = tmp_path_factory.mktemp("masks")
    if request.param == "bert":  # without dropout, so that two processes compute what one does
        bert(root / "source", **TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    else:
        neox(root / "source", **TINY)
    growth.grow(root / "source", root / "grown", method="msg", hidden_size=24, num_layers=3)
    (root / "text.txt").write_text(TEXT)
    return root


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    return train(folder / "grown", folder / "text.txt", out, **RUN, masks=5)


def losses(report):
    return [point.loss for point in report.curve]


def test_training_begins_as_the_source_and_leaves_a_plain_model(folder, whole, tmp_path, capfd):
    source = train(folder / "source", folder / "text.txt", tmp_path / "source", **RUN)
    assert losses(whole)[0] == pytest.approx(losses(source)[0], rel=1e-6)
    assert losses(whole)[-1] < losses(whole)[0]
    assert "the masks of what was new opened in 5 steps" in str(whole)
    record = json.loads((whole.out / "growth.json").read_text())
    assert record["method"] == "msg" and "closed" not in record
    again = train(whole.out, folder / "text.txt", tmp_path / "again", **RUN)
    assert losses(again)[0] == pytest.approx(losses(whole)[-1], rel=1e-6)
    assert "masks" not in capfd.readouterr().err


def test_masks_open_in_a_quarter_of_the_steps_and_a_line_says_so(folder, tmp_path, capfd):
    report = train(folder / "grown", folder / "text.txt", tmp_path / "out", **RUN)
    assert report.settings["masks"] == 2
    assert "masks of what is new open in 2 steps\n" in capfd.readouterr().err


def test_masks_that_open_at_once_never_close(folder, whole, tmp_path):
    report = train(folder / "grown", folder / "text.txt", tmp_path / "out", **RUN, masks=0)
    assert abs(losses(report)[0] - losses(whole)[0]) > 1e-3


@pytest.mark.parametrize("cut", [4, 7], ids=["masks half open", "masks open"])
def test_a_resumed_run_ends_like_an_unbroken_one(folder, whole, tmp_path, monkeypatch, cut):
    class PowerCut(Exception):
        pass

    def interrupt(self, now):
        if now == cut:
            raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr("growth.training.progress.RunProgress.step", interrupt)
        train(folder / "grown", folder / "text.txt", tmp_path / "out", **RUN, masks=5)
    out = tmp_path / "out"
    report = train(folder / "grown", folder / "text.txt", out, **RUN, masks=5, resume=True)
    assert losses(report) == losses(whole)
    got, want = (load_file(at / "model.safetensors") for at in (out, whole.out))
    assert all(torch.equal(got[name], want[name]) for name in want)


class Watch(TrainerCallback):
    def __init__(self, masks, probe):
        self.masks, self.probe, self.opened, self.given = masks, probe, [], []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.opened.append(self.masks.opened)

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        self.given.append(self.probe(model))


def arguments(out, **fields):
    given = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 1e-2}
    given |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return TrainingArguments(str(out), **given | fields)


def test_masks_open_in_a_plain_trainer(folder, tmp_path):
    ids = torch.randint(255, (16, 8), generator=torch.Generator().manual_seed(0))
    windows = [{"input_ids": x, "labels": x} for x in ids]

    @torch.no_grad()
    def logits(model):
        training = model.training
        out = model.eval()(input_ids=ids[:2]).logits
        model.train(training)
        return out

    model, masks = load_model(folder / "grown"), OpenMasks(folder / "grown", steps=4)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    watch = Watch(masks, logits)
    Trainer(model, arguments(tmp_path), train_dataset=windows, callbacks=[masks, watch]).train()
    assert watch.opened == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    torch.testing.assert_close(watch.given[0], logits(load_model(folder / "source")), rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all((x != before[name]).any() for name, x in model.named_parameters() if x.dim() > 1)


def test_the_command_line_opens_masks_and_refuses_too_many_steps(folder, tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["growth", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    grow = "grow", folder / "source", tmp_path / "grown", "--method", "msg", "--ffn-size", 40
    assert run(*grow)[0] == 0
    assert "`growth train` closes masks over what is new" in (tmp_path / "grown/README.md").read_text()
    how = "--data", folder / "text.txt", "--out", tmp_path / "out", "--steps", 4, "--batch-size", 4
    code, _, said = run("train", tmp_path / "grown", *how, "--masks", 5)
    assert code == 2 and "masks: expected at most the 4 steps of training, got 5" in said
    assert not (tmp_path / "out").exists()
    code, told, _ = run("train", tmp_path / "grown", *how, "--masks", 3)
    assert code == 0 and "the masks of what was new opened in 3 steps" in told
    card = (tmp_path / "out/README.md").read_text()
    assert "the masks of what was new opened in 3 steps" in card and "closes masks" not in card


def test_masks_go_with_a_teacher_with_layers_that_are_computed_again_and_with_16_bits(
    folder, whole, tmp_path
):
    how = {"teacher": folder / "source", "gradient_checkpointing": True, "bf16": True, "masks": 5}
    report = train(folder / "grown", folder / "text.txt", tmp_path / "out", **RUN, **how)
    assert losses(report)[0] == pytest.approx(losses(whole)[0], rel=1e-2)
    assert losses(report)[-1] < losses(report)[0] - 0.5


def test_layers_that_a_step_leaves_out_are_masked_when_they_run_again(folder, tmp_path):
    """Also where a run resumes at such a step: that is none of a fused kernel."""

    class Skip(SubmodelStage):
        def on_step_begin(self, args, state, control, **kwargs):
            self.skipped = frozenset(self.stacks[""][1:] if state.global_step < 2 else ())

    model, masks = load_model(folder / "grown"), OpenMasks(folder / "grown", steps=4)
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 12
    engine = Trainer(model, arguments(tmp_path), train_dataset=rows, callbacks=[masks, Skip(1, steps=6)])
    engine.train()
    assert masks.opened == 1.0 and not any(module._forward_pre_hooks for module in model.modules())


def test_a_line_tells_where_training_stops_before_masks_are_open(folder, tmp_path, capfd):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    told = "masks are open by 0.60 after 3 of 5 steps: what is saved is the model without masks"
    how = {**RUN, "eval_every": 8, "masks": 5, "callbacks": [Stop()]}
    report = train(folder / "grown", folder / "text.txt", tmp_path / "out", **how)
    assert capfd.readouterr().err.count(told) == 1
    assert [point.step for point in report.curve] == [0, 3]


@pytest.mark.parametrize("verb", [growth.grow, growth.shrink, growth.transfer])
def test_what_masks_still_hold_closed_is_no_source(folder, tmp_path, verb):
    with pytest.raises(Refusal, match="trained since method msg made it, got one whose masks never opened"):
        verb(folder / "grown", tmp_path / "out")


@pytest.mark.parametrize(
    "closed",
    [[], {"wires": {}}, {"wires": {"residual": [[16, 24]]}, "layers": {}}, {"wires": {}, "layers": {"": 1}}],
)
def test_a_record_that_somebody_changed_is_refused(folder, tmp_path, closed):
    shutil.copytree(folder / "grown", tmp_path / "grown")
    record = json.loads((tmp_path / "grown/growth.json").read_text())
    (tmp_path / "grown/growth.json").write_text(json.dumps(record | {"closed": closed}))
    with pytest.raises(Refusal, match="growth.json: expected what growth wrote, got values of other types"):
        OpenMasks(tmp_path / "grown", steps=3)


def test_a_model_that_is_wrapped_is_refused(folder):
    model = load_model(folder / "grown")
    first = next(name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear))
    model.set_submodule(first, torch.nn.Sequential(model.get_submodule(first)))
    with pytest.raises(Refusal, match="masks: expected the weights of a .*, got one without .*wrapped"):
        Masks(model, closed_of(folder / "grown"))


def test_what_does_not_fit_is_refused(folder, tmp_path):
    data, out = folder / "text.txt", tmp_path / "out"
    with pytest.raises(Refusal, match="masks: expected at most the 8 steps of training, got 9"):
        train(folder / "grown", data, out, **RUN, masks=9)
    with pytest.raises(Refusal, match="masks: expected a number of steps, at least 0, got -1"):
        train(folder / "grown", data, out, **RUN, masks=-1)
    with pytest.raises(Refusal, match="masks: expected a checkpoint with masks to open .* got none"):
        train(folder / "source", data, out, **RUN, masks=3)
    with pytest.raises(Refusal, match="masks: expected a checkpoint with what is new"):
        OpenMasks(folder / "source", steps=3)
    row = {"input_ids": torch.zeros(2, dtype=int)}
    best = arguments(out, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    cases = {
        "the model of the last step, got load_best_model_at_end": ("grown", best),
        "what is new in this model's wire": ("source", arguments(out)),
        "at most the 2 steps of training, got 3": ("grown", arguments(out, max_steps=2)),
    }
    for said, (name, given) in cases.items():
        rows = {"train_dataset": [row], "eval_dataset": [row]}
        masks = OpenMasks(folder / "grown", steps=3)
        engine = Trainer(load_model(folder / name), given, **rows, callbacks=[masks])
        with pytest.raises(Refusal, match=f"masks: expected {said}"):
            engine.train()
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_open_masks_as_one_does_and_whole_weights_are_asked_for(folder, whole, tmp_path):
    given = {"model": folder / "grown", "data": folder / "text.txt"} | RUN | {"batch_size": 2, "masks": 5}
    ended = started(2, tmp_path / "ranks", given | {"out": tmp_path / "two"})
    assert ended.codes == [0, 0], ended.err
    points = json.loads((tmp_path / "two/training.json").read_text())["curve"]
    assert [point["loss"] for point in points] == pytest.approx(losses(whole), rel=1e-4)
    refused = started(2, tmp_path / "refused", given | {"out": tmp_path / "shared", "fsdp": True})
    assert refused.codes == [2, 2]
    assert "masks: expected whole weights on each process, got FSDP; train without it" in refused.err[0]
    assert not (tmp_path / "shared").exists()
