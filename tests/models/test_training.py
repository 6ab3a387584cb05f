import math

import pytest
import torch
from devices import GPU
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from lcikernels.models import LCIForCausalLM


@pytest.mark.parametrize("pattern", ["A", "R", "M", "S", "RAMS"])
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_every_parameter_gets_a_gradient(tiny, ids, pattern, parallel):
    model = tiny(pattern, use_parallel_residual=parallel).train()
    model(ids, labels=ids).loss.backward()
    without = {name for name, x in model.named_parameters() if x.grad is None or not x.grad.any()}
    assert not without


@pytest.mark.parametrize("pattern", ["A", "R", "M", "S", "RAMS"])
def test_checkpointing_changes_no_gradient(tiny, ids, pattern):
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = tiny(pattern).train()
        model.model.layers[0].mixer.register_forward_pre_hook(lambda *_: runs.append(checkpointing))  # noqa: B023
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters()})
    assert runs == [False, True, True]  # the second True is the recomputation
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_a_compiled_model_trains_as_the_plain_one_and_exports(tiny, ids):
    """As one graph, by this machine's own kernels."""
    torch._dynamo.reset()
    model, ids = tiny("RAMS", torch.float32).to(GPU), ids.to(GPU)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    whole, leaves = model(**inputs), list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(compiled.logits, whole.logits)
    for one, other in zip(
        torch.autograd.grad(compiled.loss, leaves), torch.autograd.grad(whole.loss, leaves)
    ):
        torch.testing.assert_close(one, other)
    exported = torch.export.export(model, (), inputs).module()(**inputs)
    torch.testing.assert_close(exported.logits, whole.logits)


def test_the_loss_is_the_shifted_mean_cross_entropy_or_a_rows_share_of_it(tiny, ids):
    model = tiny("RAMS")
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    want = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, want.to(out.loss.dtype), rtol=1e-5, atol=0)
    assert torch.equal(model(ids, logits_to_keep=3).logits, out.logits[:, -3:])
    count = (labels[:, 1:] != -100).sum()
    parts = [model(x[None], labels=y[None], num_items_in_batch=count).loss for x, y in zip(ids, labels)]
    torch.testing.assert_close(sum(parts), out.loss)


def test_training_under_autocast_is_close_to_float32(tiny, ids):
    model = tiny("RAMS", torch.float32).train()
    want = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(loss - want) < 0.02 * want
    assert all(x.grad.isfinite().all() for x in model.parameters())


@pytest.mark.parametrize("pattern", ["RAMS"])
def test_the_trainer_lowers_the_loss_in_3_steps(tmp_path, tiny, ids, pattern):
    model = tiny(pattern, torch.float32, initializer_range=0.02)
    data = [{"input_ids": row, "labels": row} for row in ids.repeat(12, 1)]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]


def test_a_fresh_model_predicts_about_uniformly_and_mamba_starts_as_published(tiny_config):
    torch.manual_seed(0)
    model = LCIForCausalLM(tiny_config("RAMS", initializer_range=0.02))
    ids = torch.randint(64, (4, 32))
    assert abs(model(ids, labels=ids).loss.item() - math.log(64)) < 0.05
    mamba = model.model.layers[2].mixer
    assert torch.equal(mamba.A_log, torch.arange(1.0, 17.0).log().expand(64, 16))
    assert torch.equal(mamba.D, torch.ones(64))
    dt = torch.nn.functional.softplus(mamba.dt_proj.bias)
    assert 0.99e-3 < dt.min() < 3e-3 and 0.03 < dt.max() < 0.101
    assert mamba.dt_proj.weight.abs().max() <= 2**-0.5  # rank 2
    assert 0.3 < mamba.conv1d.weight.abs().max() <= 0.5  # width 4
