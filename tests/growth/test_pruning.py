"""Neurons that are taken out and grown anew: which, what of the function and of the optimizer stays."""

import math

import pytest
import torch
from checkpoints import ALL, gpt2, inputs
from plain_trainer import arguments, llama, trainer, without_dropout
from torch import nn
from transformers import Trainer, TrainerCallback

import growth
from growth.errors import Refusal
from growth.loading import load_model, quiet
from growth.training.callbacks import PruneAndRegrow, taken_out
from growth.training.neurons import neurons_of

FAMILIES = (
    "gpt_neox",
    "gpt2",
    "llama with biases, tied",
    "phi3",
    "gemma3_text",
    "bert",
    "t5 gated",
    "lci RAM",
)
FAMILIES += ("granitemoehybrid",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("llama") / "model", intermediate_size=20)


class Log(TrainerCallback):
    """What is out, and copies of the weights and moments, at the begin and the end of every step."""

    def __init__(self, callback, model):
        self.callback, self.model, self.steps, self.ends = callback, model, [], []

    def seen(self, optimizer):
        moments = {
            name: {key: y.clone() for key, y in optimizer.state.get(x, {}).items()}
            for name, x in self.model.named_parameters()
        }
        weights = {name: x.detach().clone() for name, x in self.model.named_parameters()}
        return {name: [*units] for name, units in self.callback.out.items()}, weights, moments

    def on_step_begin(self, args, state, control, *, optimizer, **kwargs):
        self.steps.append(self.seen(optimizer))

    def on_step_end(self, args, state, control, *, optimizer, **kwargs):
        self.ends.append(self.seen(optimizer))


def logits(model):
    with torch.no_grad():
        return model(**inputs(model.config)).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_neuron_taken_out_adds_nothing_and_one_grown_changes_nothing(name, tmp_path):
    """A model whose neurons are taken out is that in which what reads them is zero, and growing keeps it."""
    with quiet():
        model = without_dropout(load_model(ALL[name](tmp_path / "model"))).double()
    found = neurons_of(model, "test")
    callback = PruneAndRegrow(2, share=0.25, until=4, regrow="random")
    optimizer = torch.optim.AdamW(model.parameters())

    class State:
        global_step, max_steps, stateful_callbacks = 0, 8, {}

    callback.on_train_begin(arguments(), State, None, model=model)
    whole = logits(model)
    State.global_step = 2
    sizes = {name: neurons.magnitudes() for name, neurons in found.items()}
    callback.on_step_begin(arguments(), State, None, optimizer=optimizer)
    pruned = logits(model)
    assert callback.out == taken_out(model)
    for name, units in callback.out.items():
        assert len(units) == round(0.25 * len(sizes[name]))
        assert set(units) == set(sizes[name].argsort()[: len(units)].tolist())
    assert (pruned - whole).abs().max() > 1e-4
    State.global_step = 4
    callback.on_step_begin(arguments(), State, None, optimizer=optimizer)
    assert not any(callback.out.values())
    torch.testing.assert_close(logits(model), pruned, rtol=1e-12, atol=1e-12)
    for neurons in found.values():
        written = sum(x for part in neurons.parts for x in part.squares(part.parameter.detach(), "writes"))
        assert (written > 0).all()


@pytest.mark.parametrize("regrow", ["gradient", "random"])
def test_neurons_are_swapped_by_the_published_numbers(folder, tmp_path, regrow):
    """20 neurons, 6 of them out: k follows the cosine, goes by size, and grows among those out before."""
    model = load_model(folder)
    callback = PruneAndRegrow(2, share=0.3, swap=0.6, until=10, regrow=regrow)
    log = Log(callback, model)
    trainer(model, tmp_path, callback, log, max_steps=12).train()
    assert [len(end[0]["ffn.1"]) for end in log.ends] == [0, 0] + [6] * 8 + [0, 0]
    for step in (4, 6, 8):
        before, after = (set(log.ends[i][0]["ffn.1"]) for i in (step - 1, step))
        k = round(0.3 * (1 + math.cos(math.pi * step / 10)) * 14)
        assert len(after - before) == len(before - after) == min(k, 6)
        weights = log.ends[step - 1][1]
        into = [weights[f"model.layers.1.mlp.{x}_proj.weight"].square().sum(1) for x in ("gate", "up")]
        sizes = (sum(into) * weights["model.layers.1.mlp.down_proj.weight"].square().sum(0)).sqrt()
        smallest = [i for i in sizes.argsort().tolist() if i not in before][: min(k, 6)]
        assert after - before == set(smallest)


def test_of_those_out_the_ones_with_the_largest_gradients_grow(folder, tmp_path):
    model = load_model(folder)
    callback = PruneAndRegrow(2, share=0.3, swap=0.2, until=10)
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 4:
                seen["norms"] = {
                    f"ffn.{i}": layer.mlp.down_proj.weight.grad.norm(dim=0)
                    for i, layer in enumerate(model.model.layers)
                }
                seen["waiting"] = dict(callback._waiting)

    log = Log(callback, model)
    trainer(model, tmp_path, Look(), callback, log, max_steps=12).train()
    for name, (candidates, k) in seen["waiting"].items():
        norms = seen["norms"][name]
        assert k > 0 and candidates == log.ends[3][0][name] and (norms[candidates] > 0).all()
        grown = set(candidates) - set(log.ends[4][0][name])
        assert grown == set(sorted(candidates, key=lambda unit: -norms[unit])[:k])


def test_what_is_out_stays_zero_with_its_moments(folder, tmp_path):
    model = load_model(folder)
    callback = PruneAndRegrow(2, share=0.3, until=8, end="pruned")
    log = Log(callback, model)
    trainer(model, tmp_path, callback, log, max_steps=12, weight_decay=0.1).train()
    for out, weights, moments in log.ends[2:]:
        for i in range(4):
            down, up = (f"model.layers.{i}.mlp.{x}_proj.weight" for x in ("down", "up"))
            units = out[f"ffn.{i}"]
            assert len(units) == 6
            for values in (
                weights,
                *({name: m[key] for name, m in moments.items()} for key in ("exp_avg", "exp_avg_sq")),
            ):
                assert not values[down][:, units].any() and not values[up][units].any()
    assert taken_out(model) == callback.out
    model.save_pretrained(tmp_path / "pruned")
    assert taken_out(load_model(tmp_path / "pruned")) == callback.out


def test_the_first_step_of_a_grown_neuron_is_no_longer_than_the_others(folder, tmp_path):
    """Its second moment is the mean of the others: from zero the first step would be 3.2 rates."""
    model = load_model(folder)
    callback = PruneAndRegrow(4, share=0.3, swap=0.6, until=16, regrow="random")
    log = Log(callback, model)
    trainer(model, tmp_path, callback, log, max_steps=24).train()
    for step in (8, 16):
        grown = sorted(set(log.ends[step - 1][0]["ffn.1"]) - set(log.ends[step][0]["ffn.1"]))
        name = "model.layers.1.mlp.down_proj.weight"
        started, moments = log.steps[step][1][name], log.steps[step][2][name]
        ended = log.ends[step][1][name]
        assert grown and not started[:, grown].any() and not moments["exp_avg"][:, grown].any()
        inside = [i for i in range(20) if i not in log.ends[step - 1][0]["ffn.1"]]
        if step == 16:
            torch.testing.assert_close(
                moments["exp_avg_sq"][:, grown],
                moments["exp_avg_sq"][:, inside].mean().expand(64, len(grown)),
            )
        moved = (ended - started).abs()
        assert (
            0 < moved[:, grown].max() < 1e-2
        )  # the rate; from zero it would be 0.1 / sqrt(0.001) = 3.2 of it


@pytest.mark.parametrize("regrow", ["gradient", "random"])
@pytest.mark.parametrize("save", [3, 5])
def test_a_resumed_run_equals_an_unbroken_one(folder, tmp_path, regrow, save):
    fields = {"save_strategy": "steps", "save_steps": save, "max_steps": 10, "gradient_accumulation_steps": 2}

    def made():
        return PruneAndRegrow(2, share=0.3, swap=0.6, until=8, regrow=regrow, end="pruned")

    one, two = load_model(folder), load_model(folder)
    whole, part = made(), made()
    trainer(one, tmp_path, whole, **fields).train()
    trainer(two, tmp_path, part, **fields).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{save}"))
    assert part.out == whole.out and any(whole.out.values())
    for x, y in zip(one.parameters(), two.parameters()):
        assert torch.equal(x, y)


def test_growth_train_takes_it_and_leaves_what_shrink_can_remove(tmp_path, text):
    model = gpt2(tmp_path / "model")
    callback = PruneAndRegrow(2, share=0.25, until=4, end="pruned")
    given = {"steps": 6, "batch_size": 2, "sequence_length": 8, "eval_every": 3, "save_every": 3}
    report = growth.train(model, text, tmp_path / "out", **given, callbacks=[callback])
    assert report.settings["callbacks"][0]["args"]["every"] == 2
    found = taken_out(load_model(tmp_path / "out"))
    assert found == callback.out and {len(units) for units in found.values()} == {40}
    assert report.curve[-1].flops == 6 * report.step_flops  # zeros are multiplied too


def test_what_does_not_fit_is_refused(folder, tmp_path):
    for given, said in (
        ({"every": 0}, "steps 1 <= every < until, got every 0, until None; "),
        ({"every": 3, "until": 3}, "steps 1 <= every < until, got every 3, until 3; "),
        ({"every": 1, "share": 1.0}, "a share of the neurons above 0 and below 1, got 1.0; "),
        ({"every": 1, "swap": 0.0}, "a swap of the neurons above 0 and below 1, got 0.0; "),
        ({"every": 1, "regrow": "most"}, "regrow gradient or random, got most; "),
        ({"every": 1, "end": "half"}, "end dense or pruned, got half; "),
    ):
        with pytest.raises(Refusal, match=f"prune and regrow: expected {said}"):
            PruneAndRegrow(**given)
    for given in ({"every": 1, "until": 9}, {"every": 6}):  # three quarters of 8
        with pytest.raises(Refusal, match="expected to begin and end within the 8 steps, got every"):
            trainer(load_model(folder), tmp_path, PruneAndRegrow(**given)).train()
    with pytest.raises(Refusal, match="prune and regrow: expected a model of one of: .*, got Linear; "):
        neurons_of(nn.Linear(2, 2), "prune and regrow")
    with quiet():
        experts = load_model(ALL["mixtral"](tmp_path / "mixtral"))
    with pytest.raises(
        Refusal, match="expected neurons whose weights are whole in memory, got mixtral's .*, which"
    ):
        neurons_of(experts, "prune and regrow")
    run = trainer(load_model(folder), tmp_path, PruneAndRegrow(2), optim="adafactor")
    with pytest.raises(Refusal, match="expected an optimizer like Adam or SGD, got one with exp_avg_sq_"):
        run.train()


def test_sgd_with_momentum_is_taken_too(folder, tmp_path):
    model = load_model(folder)
    callback = PruneAndRegrow(2, share=0.3, until=6, end="pruned")
    run = trainer(model, tmp_path, callback)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    run = Trainer(
        model, run.args, train_dataset=run.train_dataset, callbacks=[callback], optimizers=(optimizer, None)
    )
    run.train()
    assert taken_out(model) == callback.out and any(callback.out.values())
