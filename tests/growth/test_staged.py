"""A model that grows while it trains: what it sees and starts from, when it grows, and how it resumes."""

import json
import math

import pytest
import torch
from plain_trainer import arguments, llama
from transformers import Trainer, TrainerCallback

from growth import Sizes
from growth.errors import Refusal
from growth.loading import load_model
from growth.training.callbacks import GrowAt, LayerDropping, train_in_stages
from growth.training.staged import StageEnd, slope

DATA = [{"input_ids": x, "labels": x} for x in torch.randint(256, (40, 8), generator=torch.Generator())]
WIDER = Sizes(hidden=128)


class Stop(Exception):
    pass


class Run:
    """Makes Trainers of one run, and keeps what they see and log. stop: raise after that step."""

    def __init__(self, out, stop=None, extra=(), **fields):
        self.out, self.stop, self.extra = out, stop, extra
        self.fields = {"max_steps": 12, "lr_scheduler_type": "linear", "learning_rate": 1e-3} | fields
        self.seen, self.sizes, self.logs = [], [], []

    def __call__(self, folder):
        run = self
        model = load_model(folder)
        model.register_forward_pre_hook(
            lambda _, arguments, named: run.seen.append(named["input_ids"].tolist()), with_kwargs=True
        )
        run.sizes.append(model.config.hidden_size)

        class See(TrainerCallback):
            def on_log(self, args, state, control, *, logs, **kwargs):
                if "loss" in logs:
                    run.logs.append((state.global_step, logs["loss"], logs["learning_rate"]))

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == run.stop:
                    raise Stop

        return Trainer(
            model, arguments(self.out, **self.fields), train_dataset=DATA, callbacks=[*run.extra, See()]
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ungrown(folder, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("ungrown"))
    run(folder).train()
    return run


def test_after_growth_it_sees_what_it_would_have_seen_at_the_same_rates_and_starts_from_the_same_loss(
    folder, ungrown, tmp_path
):
    """40 windows, 2 a step, 12 steps: one epoch ends within none of the stages; lemon, wider, then deeper."""
    run = Run(tmp_path, save_strategy="no")
    stages = [GrowAt(WIDER, step=4), GrowAt(Sizes(layers=4), step=8)]
    trainer = train_in_stages(run, folder, stages)
    assert run.sizes == [64, 128, 128] and trainer.model.config.num_hidden_layers == 4
    assert run.seen == ungrown.seen
    assert [(step, rate) for step, _, rate in run.logs] == [(step, rate) for step, _, rate in ungrown.logs]
    assert trainer.state.global_step == 12
    losses, plain = ([loss for _, loss, _ in x.logs] for x in (run, ungrown))
    assert losses[:4] == plain[:4]
    assert losses[4] == pytest.approx(plain[4], abs=1e-5)  # of the first step after growth, before its update
    assert losses[5] != pytest.approx(plain[5], abs=1e-5)
    before, after = (load_model(tmp_path / name).eval() for name in ("checkpoint-8", "grown-2"))
    x = torch.stack([window["input_ids"] for window in DATA])
    with torch.no_grad():
        torch.testing.assert_close(before(input_ids=x, labels=x).loss, after(input_ids=x, labels=x).loss)
    moments = torch.load(tmp_path / "grown-1" / "optimizer.pt")["state"]
    assert {int(state["step"]) for state in moments.values()} == {4}


def test_windows_go_on_through_the_end_of_an_epoch(folder, tmp_path):
    plain, run = (Run(tmp_path / name, max_steps=26) for name in ("plain", "grown"))
    plain(folder).train()
    train_in_stages(run, folder, [GrowAt(WIDER, step=18)])
    assert run.seen == plain.seen


def test_a_stage_ends_once_the_loss_falls_too_slowly(folder, tmp_path):
    """Scripted losses C^-a: a = 0.3 until step 6, then 0.01."""
    run, ends = Run(tmp_path), []

    class Scripted(StageEnd):
        def on_log(self, args, state, control, *, logs, **kwargs):
            if "loss" in logs:
                t = state.global_step
                fall = t**-0.3 if t <= 6 else 6**-0.3 * (t / 6) ** -0.01
                super().on_log(args, state, control, logs={"loss": 5 * fall}, **kwargs)
                ends.append((t, self.reached))

    stage = GrowAt(WIDER, slope=-0.05, window=3)
    trainer = run(folder)
    trainer.add_callback(Scripted(stage, 0))
    trainer.train()
    assert ends == [(t, t == 8) for t in range(1, 9)]  # of the losses at 6, 7, 8
    assert trainer.state.global_step == 8 and (tmp_path / "checkpoint-8").is_dir()


def test_a_run_that_grows_by_its_slope_goes_on_in_the_larger_model(folder, tmp_path):
    """Any fall is too slow for a slope of -9: it grows at the third loss, and is not asked again."""
    run = Run(tmp_path)
    trainer = train_in_stages(run, folder, [GrowAt(WIDER, slope=-9.0, window=3)])
    assert run.sizes == [64, 128] and trainer.state.global_step == 12
    assert (tmp_path / "checkpoint-3").is_dir() and (tmp_path / "grown-1").is_dir()


def test_a_loss_that_falls_fast_enough_to_the_end_never_grows(folder, tmp_path):
    run = Run(tmp_path, max_steps=4)
    trainer = train_in_stages(run, folder, [GrowAt(WIDER, slope=-1e-9, window=4)])
    assert run.sizes == [64] and trainer.state.global_step == 4


def test_the_slope_is_that_of_a_power_law():
    points = [(math.log(c), math.log(3 * c**-0.052)) for c in (1e9, 2e9, 3e9, 5e9)]
    assert slope(points) == pytest.approx(-0.052)


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_resumed_run_equals_an_unbroken_one(folder, tmp_path, stop):
    """Broken off before, at and after the end of a stage; with layers dropped, which go by the step."""
    fields = {"save_strategy": "steps", "save_steps": 2}
    stages = [GrowAt(WIDER, step=4)]

    def run(out, stop=None):
        return Run(out, stop, extra=[LayerDropping(0.5)], **fields)

    whole = train_in_stages(run(tmp_path / "whole"), folder, stages)
    with pytest.raises(Stop):
        train_in_stages(run(tmp_path / "part", stop), folder, stages)
    part = train_in_stages(run(tmp_path / "part"), folder, stages, resume=True)
    done = train_in_stages(run(tmp_path / "part"), folder, stages, resume=True)
    assert part.state.global_step == done.state.global_step == 12
    for x, y, z in zip(whole.model.parameters(), part.model.parameters(), done.model.parameters()):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_a_run_stopped_while_it_grew_grows_when_it_is_resumed(folder, tmp_path, monkeypatch):
    from growth.training import staged

    def full(*arguments, **named):
        raise Stop

    stages = [GrowAt(WIDER, step=4)]
    whole = train_in_stages(Run(tmp_path / "whole"), folder, stages)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(staged, "grow", full)
        train_in_stages(Run(tmp_path / "part"), folder, stages)
    run = Run(tmp_path / "part")
    part = train_in_stages(run, folder, stages, resume=True)
    assert run.sizes == [64, 128] and [step for step, *_ in run.logs] == [*range(5, 13)]
    for x, y in zip(whole.model.parameters(), part.model.parameters()):
        assert torch.equal(x, y)


def test_what_does_not_fit_is_refused_before_anything_is_trained(folder, tmp_path):
    for given, said in (
        ({}, "a step or a slope at which it ends, got neither; "),
        ({"step": 2, "slope": -0.1}, "a step or a slope at which it ends, got both; "),
        ({"step": 0}, "a step of at least 1, got 0; "),
        ({"slope": 0.1}, "a slope below 0, and finite, got 0.1; "),
        ({"slope": float("nan")}, "a slope below 0, and finite, got nan; "),
        ({"slope": -0.1, "window": 1}, "a window of at least 2 losses, got 1; "),
    ):
        with pytest.raises(Refusal, match=f"stage: expected {said}"):
            GrowAt(WIDER, **given)
    for stages, said in (
        ([], "stages: expected at least one, got none; "),
        (
            [GrowAt(WIDER, step=4), GrowAt(Sizes(layers=4), step=4)],
            "stage: expected a step after 4, .*, got 4; ",
        ),
        ([GrowAt(WIDER, step=12)], "stage: expected a step before the Trainer's last, 12, got 12; "),
        ([GrowAt(WIDER, step=4), GrowAt(Sizes(hidden=64), step=8)], "hidden-size: expected .* 128, got 64; "),
        ([GrowAt(WIDER, "no such", step=4)], "method: expected .*, got no such; "),
    ):
        run = Run(tmp_path)
        with pytest.raises(Refusal, match=said):
            train_in_stages(run, folder, stages)
        assert not run.seen and not list(tmp_path.iterdir())
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    with pytest.raises(Refusal, match="expected no interrupted run, got checkpoint-2; remove it, or resume"):
        train_in_stages(Run(tmp_path), folder, [GrowAt(WIDER, step=4)])
