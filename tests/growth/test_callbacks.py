"""What `growth train` adds to a Trainer, in a plain one: rates, stops, counts."""

import json

import pytest
import torch
from checkpoints import neox
from transformers import Trainer, TrainerCallback, TrainingArguments

import growth
from growth.errors import Refusal
from growth.loading import load_model
from growth.methods import METHODS
from growth.training import callbacks as surface
from growth.training.callbacks import NotFinite, StopOnNaN, UnfreezeOnPlateau, copied, with_rates
from growth.training.finite import fingerprint
from growth.training.freeze import Plateau

WINDOWS = [{"input_ids": x, "labels": x} for x in torch.randint(256, (16, 8), generator=torch.Generator())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    return neox(tmp_path_factory.mktemp("neox") / "model", **sizes)


def trainer(model, out, *callbacks, optimizer=None, **fields):
    args = TrainingArguments(
        output_dir=str(out),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
        | {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        | fields,
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=WINDOWS,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


def test_the_surface_is_what_its_docstring_shows():
    assert all(name in surface.__doc__ for name in surface.__all__ if name != "NotFinite")


@pytest.mark.parametrize("given", [surface.LayerDropping(0.1), [surface.LayerDropping], ["LayerDropping"]])
def test_what_is_no_list_of_callbacks_is_refused(given, folder, tmp_path):
    with pytest.raises(Refusal, match="callbacks: expected a list of a Trainer's, got .*; such as"):
        growth.train(folder, "text", tmp_path / "out", steps=1, callbacks=given)


def test_every_method_is_a_name_of_the_package():
    assert {getattr(growth, name, None) for name in growth.__all__} >= {*METHODS.values()}


# ---- rates


def test_a_parameter_moves_by_its_share_of_the_rate_and_keeps_its_decay(folder, tmp_path):
    """The first step of Adam is the rate, whatever the gradient, and decay the rate's share of the weight."""
    model, decay, rate = load_model(folder), 0.1, 1e-3
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    groups = [
        {"params": [x for x in model.parameters() if x.dim() > 1], "weight_decay": decay},
        {"params": [x for x in model.parameters() if x.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, eps=1e-30)
    shares = {"*.mlp.dense_h_to_4h.*": 0.25, "*.mlp.*": 0.5, "*_norm.*": 2.0}
    assert with_rates(optimizer, model, shares) is optimizer
    trainer(model, tmp_path, optimizer=optimizer, max_steps=1).train()
    for name, after in model.named_parameters():
        share = 0.25 if "h_to_4h" in name else 0.5 if ".mlp." in name else 2.0 if "_norm." in name else 1.0
        step = (after - before[name] * (1 - share * rate * (decay if after.dim() > 1 else 0.0))).abs()
        moved = step[step > 0.5 * share * rate]  # a gradient of 0 moves nothing
        assert len(moved) >= (0.05 if "embed_in" in name else 0.9) * step.numel(), name
        torch.testing.assert_close(moved, torch.full_like(moved, share * rate), rtol=2e-2, atol=0)


def test_every_group_follows_a_schedule_and_the_whole_rate_is_first(folder, tmp_path):
    model = load_model(folder)
    optimizer = with_rates(torch.optim.AdamW(model.parameters(), lr=1e-2), model, {"*.mlp.*": 0.3})
    seen = []

    class See(TrainerCallback):
        def on_optimizer_step(self, args, state, control, *, optimizer, **kwargs):
            seen.append([group["lr"] for group in optimizer.param_groups])

    fields = {"lr_scheduler_type": "linear", "max_steps": 4}
    trainer(model, tmp_path, See(), optimizer=optimizer, **fields).train()
    assert seen == [pytest.approx([1e-2 * (4 - i) / 4, 3e-3 * (4 - i) / 4]) for i in range(4)]


def test_a_tied_parameter_has_one_rate_by_any_of_its_names(tmp_path):
    model = load_model(neox(tmp_path / "tied", tie_word_embeddings=True))
    for pattern in ("lm_head.weight", "*embed_in*"):
        optimizer = with_rates(torch.optim.AdamW(model.parameters(), lr=1.0), model, {pattern: 0.1})
        (slow,) = [group["params"] for group in optimizer.param_groups if group["lr"] == 0.1]
        assert len(slow) == 1 and slow[0] is model.get_input_embeddings().weight


def test_rates_that_are_none_or_of_nothing_are_refused(folder, tmp_path):
    model = load_model(folder)
    for rates, said in (
        (
            {"*.nothing": 0.5},
            r"rates \*.nothing: expected a name of the model's parameters, got none of them; ",
        ),
        ({"*": 0.0}, r"rates \*: expected a share of the rate, above 0 and finite, got 0.0; freeze "),
        ({"*": float("nan")}, "above 0 and finite, got nan; "),
    ):
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(Refusal, match=said):
            with_rates(optimizer, model, rates)
        assert len(optimizer.param_groups) == 1
    with pytest.raises(
        Refusal, match="copied-rate .*: expected a checkpoint with copied tensors .*, got none"
    ):
        copied(folder)
    rows = [
        {"name": name, "sources": [], "freeze": False, "origin": origin}
        for name, origin in {"a": "copied", "b": "initialised", "c": "expanded", "d": "aligned"}.items()
    ]
    record = {"verb": "transfer", "method": "xatl", "lossless": False, "fingerprint": "", "lineage": []}
    other = neox(tmp_path / "other")
    (other / "growth.json").write_text(json.dumps(record | {"tensors": rows}))
    assert copied(other) == ["a"]


# ---- stopping


class Spoil(TrainerCallback):
    """Makes a weight NaN after so many steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step == self.step:
            model.get_input_embeddings().weight.data[:] = float("nan")


@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_that_is_no_number_stops_with_its_step_and_batch_and_nothing_learns_from_it(
    folder, tmp_path, parts
):
    model, seen = load_model(folder), []
    run = trainer(model, tmp_path, Spoil(2), StopOnNaN(), gradient_accumulation_steps=parts)
    collate = run.data_collator

    def see(items):
        seen.append(collate(items))
        return seen[-1]

    run.data_collator = see
    with pytest.raises(
        NotFinite, match=r"^step 3: expected a finite loss, got nan on the batch \w{8}; "
    ) as stop:
        run.train()
    batches = [fingerprint(batch) for batch in seen]
    assert (stop.value.step, stop.value.batch) == (3, batches[2 * parts])
    assert len({*batches}) == len(batches)
    assert run.state.global_step == 2 and not model._forward_hooks
    assert model.lm_head.weight.isfinite().all() and model.lm_head.weight.grad is None


def test_a_checkpoint_is_not_written_of_weights_that_are_not_finite(folder, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    run = trainer(load_model(folder), tmp_path, Spoil(4), StopOnNaN(), **fields)
    said = "step 4: expected a finite loss, got weights that are not, in gpt_neox.embed_in.weight; "
    with pytest.raises(NotFinite, match=said):
        run.train()
    assert [x.name for x in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_run_that_stays_finite_ends_and_nothing_is_left_on_the_model(folder, tmp_path):
    model = load_model(folder)
    run = trainer(model, tmp_path, StopOnNaN())
    run.train()
    assert run.state.global_step == 4 and not model._forward_hooks


def test_where_the_output_has_no_loss_its_logits_are_looked_at(folder, tmp_path):
    run = trainer(load_model(folder), tmp_path, Spoil(1), StopOnNaN())
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.mean()
    with pytest.raises(
        NotFinite, match="step 2: expected a finite loss, got logits that are not on the batch"
    ):
        run.train()


# ---- counting


def test_patience_in_a_row_starts_anew_with_a_good_window():
    losses = [2.0, 1.8, 1.795, 1.5, 1.499, 1.498]  # good, poor, good, poor, poor
    total, row = (Plateau(0.01, 2, counts) for counts in ("total", "row"))
    assert [total.reached(loss) for loss in losses] == [False, False, False, False, True, True]
    assert [row.reached(loss) for loss in losses] == [False, False, False, False, False, True]
    with pytest.raises(Refusal, match="patience-counts: expected total or row, got both; "):
        UnfreezeOnPlateau([], counts="both")


@pytest.mark.parametrize("counts, step", [("total", 5), ("row", 6)])
def test_weights_unfreeze_by_either_count_and_a_resumed_run_goes_on_with_it(folder, tmp_path, counts, step):
    losses = dict(enumerate([2.0, 1.8, 1.795, 1.5, 1.499, 1.498, 1.0, 1.0], 1))

    class Scripted(UnfreezeOnPlateau):
        def on_log(self, args, state, control, *, logs, **kwargs):
            if "loss" in logs:
                super().on_log(args, state, control, logs={"loss": losses[state.global_step]}, **kwargs)

    def freezing():
        return Scripted(["lm_head.weight"], threshold=0.01, patience=2, counts=counts)

    fields = {"save_strategy": "steps", "save_steps": 4}
    first = freezing()
    trainer(load_model(folder), tmp_path, first, max_steps=4, **fields).train()
    assert first.unfrozen_at is None
    second = freezing()
    run = trainer(load_model(folder), tmp_path, second, max_steps=8, **fields)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.unfrozen_at == step
