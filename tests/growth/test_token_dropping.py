"""Tokens that middle layers leave out: what is computed, which ones they are, and who is refused."""

import math
from functools import partial

import pytest
import torch
from checkpoints import ALL, bert, gpt2, inputs
from plain_trainer import WINDOWS, arguments, llama, trainer, without_dropout
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import growth
from growth.errors import Refusal
from growth.loading import load_model, quiet
from growth.training.callbacks import TokenDropping
from growth.training.flops import count_flops, step_flops

T = 24
OTHER_KIND = {
    "bert headless",
    "bert classifier",
    "bert token classifier",
    "bert answers",
    "roberta headless",
    "roberta classifier",
    "t5",
    "t5 gated",
    "t5 1.1",
    "t5 encoder",
}
RECURRENT = {"granitemoehybrid", "granitemoehybrid rope, biases, tied"}
RECURRENT |= {name for name in ALL if name.startswith("lci ") and {*name.split()[-1]} - {*"AW"}}
ATTENTION = sorted({*ALL} - OTHER_KIND - RECURRENT)


class State:
    global_step, max_steps, epoch = 0, 10, 0


def begun(callback, model):
    callback.on_train_begin(arguments(), State, None, model=model)
    callback.on_step_begin(arguments(), State, None)
    return callback


def barred(callback, eager, layer, arguments, named):
    """A middle layer's arguments with a mask that bars the tokens set aside, for every one that reads."""
    bound = callback._gathering.signatures[layer].bind(layer, *arguments, **named)
    name = "mask" if "mask" in callback._gathering.signatures[layer].parameters else "attention_mask"
    given, kept = bound.arguments.get(name), callback.kept_at_last
    there = torch.zeros(2, T, dtype=torch.bool).scatter(1, kept, True)
    mask = torch.ones(T, T, dtype=torch.bool)
    mask = mask.tril() if callback._shifted else mask
    if given is not None:
        mask = mask & (given if given.dtype == torch.bool else given == 0)
    mask = mask & there[:, None, None, :] | torch.eye(T, dtype=torch.bool)
    if eager:
        mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    bound.arguments[name] = mask
    (_, _), (_, x), *told = bound.arguments.items()
    told = dict(told)
    return (x,), told.pop("kwargs", {}) | told


@pytest.mark.parametrize("name", ATTENTION)
def test_middle_layers_compute_what_they_would_where_the_tokens_set_aside_are_not_seen(name, tmp_path):
    """In float64, against layers that see all positions, under a mask, and keep the others as they were."""
    with quiet():
        model = without_dropout(load_model(ALL[name](tmp_path / "model")).double())
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch multiplies no grouped matrices in float64
    given, eager = inputs(model.config), model.config._attn_implementation == "eager"
    callback = begun(TokenDropping(0.25, first=1), model)
    with torch.no_grad():
        got = model(**given).logits
        kept = callback.kept_at_last = callback._gathering.kept
        layers = callback._gathering.layers
        callback.on_train_end(None, None, None)
        whole = model(**given).logits
        there = torch.zeros(2, T, 1, dtype=torch.bool).scatter(1, kept[..., None], True)
        for layer in layers:
            layer.register_forward_pre_hook(partial(barred, callback, eager), with_kwargs=True)
            layer.register_forward_hook(lambda _, arguments, out: torch.where(there, out, arguments[0]))
        expected = model(**given).logits
    assert kept.shape == (2, T - 6)
    error = 1e-5 if eager else 1e-9  # eager attention's softmax is in float32
    torch.testing.assert_close(got, expected, rtol=error, atol=error)
    assert (got - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(OTHER_KIND | RECURRENT))
def test_models_for_which_it_has_no_meaning_are_refused_in_a_line(name, tmp_path):
    with quiet():
        model = load_model(ALL[name](tmp_path / "model"))
    said = (
        "layers of attention, which take positions, got a .* with recurrent ones"
        if name in RECURRENT
        else ("a causal or a masked language model, got ")
    )
    with pytest.raises(Refusal, match=f"drop-tokens: expected {said}.*; leave it out") as refusal:
        TokenDropping().on_train_begin(arguments(), State, None, model=model)
    assert "\n" not in str(refusal.value)
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("llama") / "model")


def test_words_of_small_loss_are_set_aside_and_words_never_predicted_are_not(folder):
    callback = begun(TokenDropping(0.5), model := without_dropout(load_model(folder)))
    callback.importance[:8] = torch.tensor([4.0, 1.0, 3.0, 2.0, math.inf, 0.5, 0.1, 5.0])
    words = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 6, 6, 6, 6]])
    model(input_ids=words)
    assert callback._gathering.kept.tolist() == [[0, 2, 4, 7], [0, 1, 2, 3]]
    model(input_ids=words, attention_mask=torch.tensor([[1] * 4 + [0] * 4, [1] * 8]))
    assert callback._gathering.kept.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    chosen = set()
    for _ in range(20):  # equals are chosen among
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
        chosen.add(tuple(callback._gathering.kept[0].tolist()))
    assert len(chosen) > 3
    model.eval()(input_ids=words)
    assert callback._gathering.kept is None
    callback.on_train_end(None, None, None)


def test_the_importance_of_a_word_is_the_running_mean_of_its_loss(folder):
    callback = begun(TokenDropping(beta=0.5), load_model(folder))
    args = arguments()
    logits = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    losses = -logits.log_softmax(-1)
    callback.learn(logits, torch.tensor([[1, 2, 1], [-100, 2, 3]]))
    callback.on_pre_optimizer_step(args, State, None)
    first = {1: (losses[0, 0, 1] + losses[0, 2, 1]) / 2, 2: (losses[0, 1, 2] + losses[1, 1, 2]) / 2}
    first[3] = losses[1, 2, 3]
    for word, loss in first.items():
        torch.testing.assert_close(callback.importance[word], loss)
    assert callback.importance.isinf().sum() == 253
    callback.on_step_begin(args, State, None)
    callback.learn(logits[:1], torch.tensor([[2, -100, -100]]))
    callback.on_pre_optimizer_step(args, State, None)
    torch.testing.assert_close(callback.importance[2], 0.5 * first[2] + 0.5 * losses[0, 0, 2])
    torch.testing.assert_close(callback.importance[1], first[1])
    callback.on_train_end(None, None, None)


def test_a_causal_model_s_words_are_those_that_follow(folder, tmp_path):
    callback = TokenDropping()
    trainer(load_model(folder), tmp_path, callback, max_steps=1, per_device_train_batch_size=32).train()
    predicted = {word for window in WINDOWS for word in window["labels"][1:].tolist()}
    assert {*callback.importance.isfinite().nonzero().flatten().tolist()} == predicted


@pytest.mark.parametrize("parts", [1, 2])
def test_a_resumed_run_equals_an_unbroken_one(folder, tmp_path, parts):
    fields = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": parts}
    one, two = load_model(folder), load_model(folder)
    whole, part, plain = TokenDropping(0.25), TokenDropping(0.25), load_model(folder)
    trainer(one, tmp_path, whole, **fields).train()
    trainer(two, tmp_path, part, **fields).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer(plain, tmp_path, **fields | {"save_strategy": "no"}).train()
    assert torch.equal(part.importance, whole.importance)
    same = [torch.equal(x, y) for x, y in zip(one.parameters(), two.parameters())]
    other = [torch.equal(x, y) for x, y in zip(one.parameters(), plain.parameters())]
    assert all(same) and not all(other)
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in one.modules())


@pytest.mark.parametrize("make", [gpt2, bert])
def test_growth_train_drops_tokens_of_causal_and_masked_models_and_counts_the_rest(make, tmp_path, text):
    layers = {"n_layer": 4} if make is gpt2 else {"num_hidden_layers": 4}
    model = make(tmp_path / "model", **layers)
    given = {"steps": 4, "batch_size": 2, "sequence_length": 16, "eval_every": 2, "save_every": 2}
    callback = TokenDropping(0.25)
    report = growth.train(model, text, tmp_path / "out", **given, callbacks=[callback])
    network = load_model(model).eval()
    batch = {key: torch.zeros(2, 16, dtype=torch.long) for key in ("input_ids", "labels")}
    path = "transformer.h" if make is gpt2 else "bert.encoder.layer"
    flops = step_flops(network, batch, modules=[f"{path}.{i}" for i in (1, 2)])
    assert report.step_flops == flops.total
    assert report.curve[-1].flops == 4 * flops.on_tokens([f"{path}.{i}" for i in (1, 2)], 0.75).total
    assert report.curve[-1].flops < 4 * flops.total
    seen = callback.importance.isfinite()
    assert 1 < seen.sum() < 60  # the text's letters
    if make is bert:
        assert not seen[256]  # [MASK], which stays important


def test_what_middle_layers_save_is_what_a_count_of_the_step_says(folder):
    """Exactly: of GPT-2's kind, where nothing of a layer is computed but linear maps and attention."""
    model = without_dropout(load_model(folder)).eval()
    batch = {
        "input_ids": torch.zeros(2, 16, dtype=torch.long),
        "labels": torch.zeros(2, 16, dtype=torch.long),
    }
    names = [f"model.layers.{i}" for i in range(4)]
    counted = step_flops(model, batch, modules=names)
    callback = begun(TokenDropping(0.25), model)
    model.training = True
    got = count_flops(model, batch)
    assert callback.spent(counted).total == got < counted.total
    callback.on_train_end(None, None, None)


def test_a_model_of_images_is_refused():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 3}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    with pytest.raises(Refusal, match="expected a causal or a masked language model, got ViT"):
        TokenDropping().on_train_begin(arguments(), State, None, model=model)


def test_of_each_row_a_token_is_seen_whatever_the_share(folder):
    model = without_dropout(load_model(folder))
    callback = begun(TokenDropping(0.99), model)
    words = WINDOWS[0]["input_ids"][None]
    assert model(input_ids=words).logits.isfinite().all() and callback._gathering.kept.shape == (1, 1)
    callback.on_train_end(None, None, None)


def test_what_does_not_fit_is_refused(folder, tmp_path, text):
    for given, said in (
        ({"share": 1.0}, "a share of the tokens of at least 0 and below 1, got 1.0; "),
        ({"share": -0.1}, "a share of the tokens of at least 0 and below 1, got -0.1; "),
        ({"beta": 1.0}, "a beta of at least 0 and below 1, got 1.0; "),
    ):
        with pytest.raises(Refusal, match=f"drop-tokens: expected {said}"):
            TokenDropping(**given)
    model = without_dropout(load_model(folder))
    for given in ({"first": 3, "last": 2}, {"last": 4}, {"first": -1}):
        with pytest.raises(Refusal, match="expected layers first <= last, from 0 to 3, got "):
            TokenDropping(**given).on_train_begin(arguments(), State, None, model=model)
    shallow = load_model(llama(tmp_path / "shallow", num_hidden_layers=2))
    with pytest.raises(Refusal, match="expected layers first <= last, from 0 to 1, got 1 to 0; "):
        TokenDropping().on_train_begin(arguments(), State, None, model=shallow)
    callback = begun(TokenDropping(), model)
    words = WINDOWS[0]["input_ids"][None]
    with pytest.raises(Refusal, match="expected windows of one text each, got packed ones; leave out --pack"):
        model(input_ids=words, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    with pytest.raises(Refusal, match="drop-tokens: expected input_ids, got embeddings alone; "):
        model(inputs_embeds=torch.zeros(1, 8, 64))
    callback.on_train_end(None, None, None)


def test_packed_windows_and_a_teacher_are_refused_and_nothing_is_written(folder, tmp_path, text, capfd):
    given = {"steps": 2, "batch_size": 2, "sequence_length": 8, "save_every": 0}
    for fields, said in (
        ({"pack": True}, "got packed ones; "),
        ({"teacher": folder}, "got none; train without"),
    ):
        with pytest.raises(Refusal, match=f"drop-tokens: expected .*, {said}"):
            growth.train(folder, text, tmp_path / "out", **given | fields, callbacks=[TokenDropping()])
        assert not list(tmp_path.iterdir()) and "step" not in capfd.readouterr().err


def test_where_the_trainer_takes_the_labels_its_loss_must_tell_them(folder, tmp_path):
    run = trainer(load_model(folder), tmp_path, callback := TokenDropping(), max_steps=2)

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def telling(outputs, labels, num_items_in_batch=None):
        callback.learn(outputs.logits[:, :-1], labels[:, 1:])
        return loss(outputs, labels)

    run.compute_loss_func = loss
    with pytest.raises(
        Refusal, match="got a Trainer that takes the labels away; call learn in compute_loss_func"
    ):
        run.train()
    run.compute_loss_func = telling
    run.train()
    assert callback.importance.isfinite().sum() > 8


def test_a_layer_that_is_told_something_else_is_refused_by_its_name(folder):
    model = without_dropout(load_model(folder))
    callback = begun(TokenDropping(), model)
    layer = callback._gathering.layers[0]
    layer.register_forward_pre_hook(
        lambda layer, arguments, named: (arguments, named | {"distances": torch.zeros(8)}),
        with_kwargs=True,
        prepend=True,
    )
    with pytest.raises(
        Refusal, match="drop-tokens: expected layers that are told .*, got LlamaDecoderLayer with "
    ):
        model(input_ids=WINDOWS[0]["input_ids"][None])
    callback.on_train_end(None, None, None)
