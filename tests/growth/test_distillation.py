"""A student's loss with a teacher's in it: the same numbers as computed whole, in bounded memory."""

import pytest
import torch
import torch.nn.functional as F
from checkpoints import ALL, bert, gpt2, inputs, neox, saved
from memory import Memory
from transformers import OPTConfig, OPTForCausalLM, Trainer, TrainingArguments

from growth.errors import Refusal
from growth.loading import load_model
from growth.training import distil
from growth.training.callbacks import distilled

LANGUAGE = [name for name in ALL if not any(x in name for x in ("headless", "class", "answers", "t5"))]


def opt(folder, dtype=torch.float32):
    """A random OPT, whose head asks its body's decoder."""
    sizes = {"hidden_size": 48, "word_embed_proj_dim": 48, "num_attention_heads": 4, "ffn_dim": 80}
    config = OPTConfig(num_hidden_layers=2, vocab_size=256, max_position_embeddings=32, **sizes)
    return saved(OPTForCausalLM, config, folder, dtype)


def pair(folder, maker, dtype=torch.float64, **sizes):
    """A student and a teacher, which is another model of the same kind."""
    maker(folder, **sizes)
    student, teacher = load_model(folder, dtype), load_model(folder, dtype).requires_grad_(False)
    student.config.use_cache = False
    torch.manual_seed(3)
    for parameter in teacher.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return student, teacher


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def plain(student, teacher, batch, labels, weight, temperature, count=None):
    """The equation of the module, all logits at once."""
    own, other = student(**batch).logits, teacher(**batch).logits
    if "Masked" not in type(student).__name__:
        own, other, labels = own[:, :-1], other[:, :-1], labels[:, 1:]
    known = labels != -100
    entropy = F.cross_entropy(own[known], labels[known], reduction="sum")
    p, q = ((x[known] / temperature).softmax(-1) for x in (other, own))
    far = (p * (p.log() - q.log())).sum() * temperature**2
    return ((1 - weight) * entropy + weight * far) / (known.sum() if count is None else count)


@pytest.mark.parametrize("name", [*LANGUAGE, "opt"])
def test_loss_and_gradients_are_those_of_the_equation_whatever_a_family_does_to_its_logits(
    tmp_path, monkeypatch, name
):
    student, teacher = pair(tmp_path, (ALL | {"opt": opt})[name])
    batch = inputs(student.config)
    labels = batch["input_ids"].clone()
    labels[0, 3:9] = -100
    monkeypatch.setattr(distil, "LOGITS", 5 * 61)  # 38 tokens in parts of 5
    expected = plain(student, teacher, batch, labels, 0.3, 2.0, count=50)
    with distilled(student, teacher, weight=0.3, temperature=2.0):
        loss = student(**batch, labels=labels, num_items_in_batch=50).loss
        found = gradients(loss, student)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for got, truth in zip(found, gradients(expected, student), strict=True):
        assert (got is None) == (truth is None)
        if got is not None:
            torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-14)


def test_a_mean_is_over_the_predicted_tokens_where_nobody_counts_them(tmp_path):
    student, teacher = pair(tmp_path, ALL["llama"])
    batch = inputs(student.config)
    with distilled(student, teacher, weight=1.0):
        loss = student(**batch, labels=batch["input_ids"]).loss
    expected = plain(student, teacher, batch, batch["input_ids"], 1.0, 1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("maker", [neox, bert])
def test_no_tensor_of_all_logits_is_ever_made(tmp_path, monkeypatch, maker):
    B, T, V = 8, 32, 1500
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": V}
    student, teacher = pair(tmp_path, maker, torch.float32, **sizes)
    ids = torch.randint(V, (B, T))
    monkeypatch.setattr(distil, "LOGITS", 16 * V)
    whole = B * (T - 1) * V * 4
    with Memory() as memory:
        student(input_ids=ids, labels=ids).loss.backward()
    assert max(memory.made) >= whole  # it would be seen
    before = sum(x.nbytes for model in (student, teacher) for x in model.parameters())
    with distilled(student, teacher), Memory() as memory:
        student(input_ids=ids, labels=ids).loss.backward()
    assert max(memory.made) <= max(16 * V * 4, student.lm_head.weight.nbytes if maker is neox else V * 16 * 4)
    assert memory.most < before + whole


def test_what_is_evaluated_is_the_data_s_loss_and_the_student_is_as_before_after(tmp_path):
    student, teacher = pair(tmp_path, ALL["qwen3"])
    batch = inputs(student.config)
    labels = batch["input_ids"]
    before = student(**batch, labels=labels)
    with distilled(student, teacher):
        with torch.no_grad():
            inside = student(**batch, labels=labels)
        assert torch.equal(inside.loss, before.loss) and torch.equal(inside.logits, before.logits)
        assert torch.equal(student(**batch).logits, before.logits)
        assert not torch.equal(student(**batch, labels=labels).loss, before.loss)
    assert "forward" not in vars(student)
    assert torch.equal(student(**batch, labels=labels).loss, before.loss)


def test_a_teacher_that_teaches_itself_adds_nothing_and_gets_no_gradient(tmp_path):
    student, _ = pair(tmp_path, ALL["gemma2"])
    teacher = load_model(tmp_path, torch.float64)
    batch = inputs(student.config)
    with distilled(student, teacher, weight=1.0, temperature=3.0):
        loss = student(**batch, labels=batch["input_ids"]).loss
        loss.backward()
    assert abs(loss.item()) < 1e-12
    assert all(x.grad is None for x in teacher.parameters())
    assert all(x.grad is None or x.grad.abs().max() < 1e-12 for x in student.parameters())


def trained(model, folder, windows, **fields):
    """The losses of a plain Trainer's four steps."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **fields,
    )
    trainer = Trainer(model=model, args=args, train_dataset=windows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_in_a_trainer_of_ones_own_parts_of_a_step_weigh_as_in_one_batch_and_layers_may_be_computed_again(
    tmp_path,
):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(61, (16, 12), generator=generator)
    labels = ids.clone()
    labels[::3, 2:9] = -100  # windows that count for less
    windows = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels)]
    losses = []
    for fields in (
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {
            "per_device_train_batch_size": 4,
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
        },
    ):
        student, teacher = pair(tmp_path / "model", ALL["lci RAM"], torch.float32)
        with distilled(student, teacher, weight=0.7):
            losses.append(trained(student, tmp_path / "out", windows, **fields))
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_teacher_of_no_numbers_is_told_so(tmp_path):
    student, teacher = pair(tmp_path, neox)
    teacher.gpt_neox.final_layer_norm.bias.fill_(float("nan"))
    with pytest.raises(
        Refusal, match="teacher: .* GPTNeoXForCausalLM, which gives numbers that are not finite"
    ):
        with distilled(student, teacher):
            pass


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    student, teacher = pair(tmp_path / "llama", ALL["llama"], torch.float32)
    other = load_model(gpt2(tmp_path / "gpt2"))
    masked = load_model(ALL["bert"](tmp_path / "bert"))
    odd = load_model(ALL["llama"](tmp_path / "odd"))

    class Shifted(type(odd)):
        """A body's last hidden states are not all that its logits are made of."""

        def forward(self, input_ids=None, inputs_embeds=None, labels=None):
            out = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, labels=labels)
            return out if input_ids is None else type(out)(loss=out.loss, logits=out.logits + 1.0)

    odd.__class__ = Shifted
    for said, arguments, settings in (
        ("teacher: expected the student's vocabulary of 61 tokens, got 256; ", (student, other), {}),
        ("teacher: expected a causal language model, as the student is, got BertFor", (student, masked), {}),
        ("teacher weight: expected a share .*, got 0", (student, teacher), {"weight": 0}),
        ("teacher weight: expected a share .*, got 1.5", (student, teacher), {"weight": 1.5}),
        ("temperature: expected above 0, and finite, got inf", (student, teacher), {"temperature": 1e999}),
        ("student: expected a language model whose .*, got Shifted, whose logits", (odd, teacher), {}),
        ("teacher: expected a language model whose .*, got Shifted, whose logits", (student, odd), {}),
    ):
        with pytest.raises(Refusal, match=said) as refusal:
            with distilled(*arguments, **settings):
                pass
        assert "\n" not in str(refusal.value) and "; " in str(refusal.value)
