"""Layers that steps skip: what is computed, what is counted, and that a resumed run skips the same."""

import json
import math

import pytest
import torch
from checkpoints import ALL, gpt2, inputs, neox
from plain_trainer import WINDOWS, arguments, llama, trainer, without_dropout
from torch import nn
from transformers import TrainerCallback

import growth
from growth.errors import Refusal
from growth.loading import load_model, quiet
from growth.training.callbacks import LayerDropping, PruneAndRegrow, SubmodelStage, TokenDropping
from growth.training.flops import count_flops, step_flops
from growth.training.layers import layers_of

STACKS = (
    "gpt_neox",
    "gpt2",
    "qwen2",
    "gemma2",
    "granitemoehybrid",
    "mixtral",
    "bert",
    "roberta",
    "t5",
    "lci RAM",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 16}
    return neox(tmp_path_factory.mktemp("neox") / "model", **sizes)


class Chosen(LayerDropping):
    """Skips the layers of these numbers, in every stack."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = layers

    def on_step_begin(self, args, state, control, **kwargs):
        self.skipped = frozenset(names[i] for names in self.stacks.values() for i in self.layers)


class Seen(LayerDropping):
    def __init__(self, *args):
        super().__init__(*args)
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        self.steps.append((state.global_step, self.skipped))


class Same(nn.Module):
    """The identity, which hands on what T5's layers hand on."""

    def forward(self, x, *args, **kwargs):
        return (x, args[1], args[4]) if len(args) == 5 else x


def logits(model, given):
    with torch.no_grad():
        out = model(**given)
    return out.logits if "logits" in out else out[0]


def begun(callback, model):
    callback.on_train_begin(None, None, None, model=model)
    callback.on_step_begin(None, None, None)
    return callback


@pytest.mark.parametrize("name", STACKS)
def test_a_model_that_skips_layers_is_the_model_without_them(name, tmp_path):
    """In train mode, without dropout: each stack skips its middle layer, against a model that has none."""
    with quiet():
        model = without_dropout(load_model(ALL[name](tmp_path / "model")))
    given, stacks = inputs(model.config), layers_of(model, "test")
    callback = begun(Chosen(1), model)
    got, whole = logits(model, given), logits(model.eval(), given)
    model.train()
    callback.on_step_end(None, None, None)
    callback.on_train_end(None, None, None)
    assert not any("forward" in layer.__dict__ for layers in stacks.values() for layer in layers.values())
    for layers in stacks.values():
        path = list(layers)[1]
        parent, _, number = path.rpartition(".")
        model.get_submodule(parent)[int(number)] = Same()
    torch.testing.assert_close(got, logits(model, given), rtol=0, atol=0)
    assert (got - whole).abs().max() > 1e-3  # evaluation ran them


def test_the_share_kept_falls_with_depth_and_what_is_run_is_divided_by_it(folder):
    callback, model = LayerDropping(0.4, seed=1), load_model(folder)
    args = arguments()
    callback.on_train_begin(args, None, None, model=model)
    names, dropped = callback.stacks[""], torch.zeros(4)

    class State:
        max_steps = 4000

    for State.global_step in range(1000, 3000):
        callback.on_step_begin(args, State, None)
        dropped += torch.tensor([float(name in callback.skipped) for name in names])
    theta = 1 - 0.4 + 0.4 * math.exp(-100 * 1000 / 4000)
    kept = torch.tensor([1 - i / 4 * (1 - theta) for i in range(4)])
    assert dropped[0] == 0
    torch.testing.assert_close(dropped / 2000, 1 - kept, rtol=0, atol=4 * 0.5 / 2000**0.5)
    torch.testing.assert_close(
        torch.tensor([callback.scales[name] for name in names]), 1 / kept, rtol=1e-6, atol=0
    )
    State.global_step = 0
    callback.on_step_begin(args, State, None)
    assert not callback.skipped  # theta(0) = 1
    callback.on_train_end(args, None, None)


def test_what_a_layer_adds_is_scaled(folder):
    model = load_model(folder).train()
    given = {"input_ids": WINDOWS[0]["input_ids"][None]}
    seen = {}
    layer = model.gpt_neox.layers[2]
    callback = begun(Chosen(), model)
    callback.scales = {"gpt_neox.layers.2": 1.25}
    layer.register_forward_hook(lambda _, x, out: seen.update(x=x[0], out=out))
    logits(model, given)
    callback.on_train_end(None, None, None)
    x = seen["x"]
    torch.testing.assert_close(
        seen["out"] - x,
        1.25 * (layer(x, position_embeddings=model.gpt_neox.rotary_emb(x, torch.arange(8)[None])) - x),
    )


def test_weights_of_a_skipped_layer_stay_as_they_are(folder, tmp_path):
    model = load_model(folder)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    trainer(model, tmp_path, Chosen(2), max_steps=2).train()
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name]) == ("layers.2." in name), name


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 4}
    whole, part = Seen(0.6), Seen(0.6)
    folder = llama(tmp_path / "model")
    one = load_model(folder)
    trainer(one, tmp_path, whole, **fields).train()
    two = load_model(folder)
    trainer(two, tmp_path, part, **fields).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert part.steps == whole.steps[4:] and any(skipped for _, skipped in part.steps)
    for x, y in zip(one.parameters(), two.parameters()):
        assert torch.equal(x, y)


def test_growth_train_takes_callbacks_and_counts_what_was_computed(tmp_path, text):
    model = gpt2(tmp_path / "model", n_embd=16, n_inner=16, n_layer=4)
    given = {"steps": 6, "batch_size": 2, "sequence_length": 8, "eval_every": 3, "save_every": 0}
    seen = Seen(0.6)
    report = growth.train(model, text, tmp_path / "out", **given, callbacks=[seen])
    network = load_model(model)
    batch = {key: torch.zeros(2, 8, dtype=torch.long) for key in ("input_ids", "labels")}
    layer = [f"transformer.h.{i}" for i in range(4)]
    flops = step_flops(network, batch, modules=layer)
    assert flops.total == count_flops(network, batch) == report.step_flops
    spent = [
        flops.total - sum(sum(flops.modules[name].values()) for name in skipped) for _, skipped in seen.steps
    ]
    assert report.curve[-1].flops == sum(spent) < 6 * flops.total
    assert report.settings["callbacks"] == [{"name": "Seen", "args": {"rate": 0.6, "seed": None}}]


def test_what_skipped_layers_save_is_what_a_count_of_the_step_without_them_says(folder):
    model = load_model(folder).train()
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.long), "labels": torch.zeros(2, 8, dtype=torch.long)}
    callback = begun(Chosen(1, 3), model)
    without = count_flops(model, batch)
    callback.on_train_end(None, None, None)
    names = [f"gpt_neox.layers.{i}" for i in range(4)]
    assert step_flops(model, batch, modules=names).without([names[1], names[3]]).total == without


def test_what_does_not_fit_is_refused(folder, tmp_path):
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(Refusal, match="drop-layers: expected a rate of at least 0 and below 1, got "):
            LayerDropping(rate)
    model = nn.Linear(2, 2)
    with pytest.raises(
        Refusal, match="LayerDropping: expected a model of one of: .*, got Linear; leave it out"
    ):
        LayerDropping().on_train_begin(None, None, None, model=model)


# ---- sub-models of the bottom layers


class Sampled(SubmodelStage):
    def __init__(self, *args, **fields):
        super().__init__(*args, **fields)
        self.steps_seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        self.steps_seen.append((len(self.skipped), len(self.held)))


def test_the_first_stage_updates_the_top_of_a_bottom_model_and_the_head(folder, tmp_path):
    model = load_model(folder)
    callback = Sampled(2, steps=4)
    moved = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.before = {name: x.detach().clone() for name, x in model.named_parameters()}

        def on_step_end(self, args, state, control, **kwargs):
            moved.append({n for n, x in model.named_parameters() if not torch.equal(x, self.before[n])})

    run = trainer(model, tmp_path, callback, Look(), max_steps=8, weight_decay=0.0)
    run.train()
    parts = [{int(n.split(".")[2]) for n in names if ".layers." in n} for names in moved]
    assert set(callback.steps_seen[:4]) == {(2, 0), (0, 2)}  # seed 42 draws both
    assert callback.steps_seen[4:] == [(0, 0)] * 4
    for (skipped, held), names, layers in zip(callback.steps_seen, moved, parts):
        assert layers == ({0, 1} if skipped else {2, 3} if held else {0, 1, 2, 3})
        assert "lm_head.weight" in names
        assert ("gpt_neox.embed_in.weight" in names) == (not held)


def test_a_bottom_model_is_the_model_of_these_layers(tmp_path):
    """GPT-2 of four layers, two of them skipped, against a GPT-2 that has two."""
    model = load_model(gpt2(tmp_path / "model", n_layer=4)).eval()
    given = inputs(model.config)
    callback = Chosen(2, 3)
    callback.on_train_begin(None, None, None, model=model)
    callback.on_step_begin(None, None, None)
    for layer in model.transformer.h:
        layer.training = True
    got = logits(model, given)
    callback.on_train_end(None, None, None)
    model.transformer.h = model.transformer.h[:2]
    torch.testing.assert_close(got, logits(model.eval(), given), rtol=0, atol=0)


def test_the_first_stage_may_be_told_in_epochs_and_resumed(tmp_path):
    folder = llama(tmp_path / "model")
    fields = {"save_strategy": "steps", "save_steps": 4, "max_steps": 20}
    whole, part = Sampled(1, epochs=0.75), Sampled(1, epochs=0.75)  # of 16 steps
    one, two = load_model(folder), load_model(folder)
    trainer(one, tmp_path, whole, **fields).train()
    trainer(two, tmp_path, part, **fields).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert part.steps_seen == whole.steps_seen[8:]
    assert len({*whole.steps_seen[:12]}) > 1 and whole.steps_seen[12:] == [(0, 0)] * 8
    for x, y in zip(one.parameters(), two.parameters()):
        assert torch.equal(x, y)


def test_what_is_held_costs_its_forward_alone(folder):
    model = load_model(folder).train()
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.long), "labels": torch.zeros(2, 8, dtype=torch.long)}
    names = [f"gpt_neox.layers.{i}" for i in range(4)]
    counted = step_flops(model, batch, modules=names)
    callback = Chosen(3)
    begun(callback, model)
    callback.held = frozenset(names[:2])
    got = count_flops(model, batch)
    expected = callback.spent(counted).total
    callback.on_train_end(None, None, None)
    # The gradient that layer 2 would hand below: of one projection's and one MLP's input, and attention's.
    D, F, tokens = 16, 16, 16
    assert 0 <= expected - got <= 2 * tokens * D * (3 * D + F)


def test_a_stage_that_is_none_is_refused(folder):
    for given, said in (
        ({"steps": 1, "epochs": 1.0}, "its length in steps or in epochs, got both; "),
        ({}, "its length in steps or in epochs, got neither; "),
        ({"steps": 0}, "a length of at least a step, got 0; "),
        ({"layers": 0, "steps": 1}, "at least 1 layer more each, got 0; "),
    ):
        with pytest.raises(Refusal, match=f"submodel stage: expected {said}"):
            SubmodelStage(**given)
    model = load_model(folder)
    with pytest.raises(Refusal, match="submodel stage: expected fewer than the model's 4 layers, got 4; "):
        SubmodelStage(4, steps=1).on_train_begin(None, None, None, model=model)
    assert not any("forward" in layer.__dict__ for layer in model.gpt_neox.layers)


# ---- in growth train


class Broken(TrainerCallback):
    """Breaks a run off after step `at`, the first time."""

    at = 4

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == Broken.at:
            Broken.at = None
            raise KeyboardInterrupt


def test_growth_train_resumes_with_its_callbacks_and_refuses_others(tmp_path, text):
    Broken.at = 4
    model = llama(tmp_path / "model")
    given = {"steps": 6, "batch_size": 2, "sequence_length": 8, "eval_every": 3, "save_every": 3}

    def run(out, rate=0.5, resume=False):
        ours = [LayerDropping(rate), TokenDropping(0.25), PruneAndRegrow(2, until=4), Broken()]
        return growth.train(model, text, tmp_path / out, **given, callbacks=ours, resume=resume)

    with pytest.raises(KeyboardInterrupt):
        run("part")
    whole = run("whole")
    with pytest.raises(
        Refusal, match=r"resume: expected callbacks \[.*'rate': 0.5.*, got callbacks \[.*'rate': 0.2"
    ):
        run("part", rate=0.2, resume=True)
    part = run("part", resume=True)
    assert [(p.step, p.flops, p.loss) for p in part.curve] == [(p.step, p.flops, p.loss) for p in whole.curve]
    for x, y in zip(load_model(tmp_path / "part").parameters(), load_model(tmp_path / "whole").parameters()):
        assert torch.equal(x, y)


def test_layers_that_are_computed_again_in_the_backward_are_dropped_alike(tmp_path, text):
    model = llama(tmp_path / "model")
    given = {"steps": 3, "batch_size": 2, "sequence_length": 8, "eval_every": 1, "save_every": 0}

    def losses(out, again):
        ours = [LayerDropping(0.5), SubmodelStage(2, steps=2), TokenDropping(0.25)]
        made = growth.train(
            model, text, tmp_path / out, **given, callbacks=ours, gradient_checkpointing=again
        )
        return [point.loss for point in made.curve]

    assert losses("again", True) == pytest.approx(losses("kept", False), abs=1e-5)


def test_the_command_line_drops_layers_and_tokens(tmp_path, text, monkeypatch, capsys):
    from growth.__main__ import main

    model = llama(tmp_path / "model")
    words = f"growth train {model} --data {text} --out {tmp_path / 'out'} --steps 2 --batch-size 2 "
    words += "--sequence-length 8 --save-every 0 --drop-layers 0.2 --drop-tokens 0.25"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    told = json.loads((tmp_path / "out" / "training.json").read_text())["settings"]["callbacks"]
    assert [(x["name"], *x["args"].values())[:2] for x in told] == [
        ("LayerDropping", 0.2),
        ("TokenDropping", 0.25),
    ]
    monkeypatch.setattr("sys.argv", words.replace("/out ", "/other ").replace("0.2 ", "1.5 ").split())
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and not (tmp_path / "other").exists()
    assert (
        "growth: drop-layers: expected a rate of at least 0 and below 1, got 1.5; " in capsys.readouterr().err
    )
