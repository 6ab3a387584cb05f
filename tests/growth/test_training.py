"""Windows of text, schedules, unfreezing, counting, and whole runs of a tiny GPT-NeoX and a tiny BERT."""

import json
from types import SimpleNamespace

import pytest
import torch
from checkpoints import bert
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Trainer,
    TrainingArguments,
)

from growth.adapters.bert import BERT
from growth.adapters.gpt2 import GPT2
from growth.demo.corpus import byte_tokenizer
from growth.errors import Refusal
from growth.loading import load_model
from growth.training import data, trainer
from growth.training.curve import evaluate
from growth.training.data import Windows, collator, load_text, tokens
from growth.training.flops import count_flops
from growth.training.freeze import Plateau, UnfreezeOnPlateau
from growth.training.schedule import cosine, lemon
from growth.training.trainer import _numbered, train

TEXT = "".join(chr(97 + i * i % 23) + ("\n" if i % 31 == 30 else "") for i in range(6000))


DEFAULTS = {"steps": 8, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 4}


def tiny(seed: int = 0, attention: str = "sdpa") -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with its tokenizer, a text beside it, and a record of a transfer that copied the MLPs."""
    root = tmp_path_factory.mktemp("train")
    model = tiny()
    model.save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    write_record(root / "model", "mlp")
    (root / "text.txt").write_text(TEXT)
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
    rows = [{"name": n, "sources": [], "freeze": held_still in n} for n in weights(folder)]
    record = {"verb": "transfer", "method": "xatl", "lossless": True, "fingerprint": "", "lineage": []}
    (folder / "growth.json").write_text(json.dumps(record | {"tensors": rows}))


def weights(path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def run(folder, out, **settings):
    return train(folder / "model", folder / "text.txt", folder / out, **DEFAULTS | settings)


# ---- data


def test_byte_tokenizer_gives_every_byte_its_own_number_and_decodes_exactly(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f():\n\treturn 'é 漢字 🙂'  # \r\n\x7f\x00 <|endoftext|>"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert len(tokenizer) == 256 and sorted(tokenizer.get_vocab().values()) == list(range(256))


def test_tokens_are_the_bytes_of_all_texts_in_order():
    texts = ["first\n", "", "zweite Zeile ä"]
    assert tokens(texts, byte_tokenizer()).tolist() == list("".join(texts).encode())


def test_every_text_ends_with_the_end_of_text_token_where_there_is_one():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "!"
    assert tokens(["ab", "c"], tokenizer).tolist() == list(b"ab!c!")


def test_windows_follow_each_other_and_drop_the_rest():
    windows = Windows(torch.arange(11), 4)
    assert len(windows) == 2
    assert windows[1]["input_ids"].tolist() == windows[1]["labels"].tolist() == [4, 5, 6, 7]


def test_held_out_windows_are_not_trained_on_and_the_same_for_the_same_seed():
    windows = Windows(torch.arange(40), 4)
    rest, held_out = windows.hold_out(3, seed=5)
    assert sorted(rest.windows[:, 0].tolist() + held_out[:, 0].tolist()) == list(range(0, 40, 4))
    assert torch.equal(windows.hold_out(3, seed=5)[1], held_out)
    assert not torch.equal(windows.hold_out(3, seed=6)[1], held_out)


def test_windows_of_a_masked_model_are_masked_as_bert_s_were(tmp_path):
    windows = Windows(torch.randint(256, (200 * 32,)), 32)
    batch = collator(BERT, bert(tmp_path / "bert"))([windows[i] for i in range(200)])
    x, y = batch.pop("input_ids"), batch.pop("labels")
    assert not batch
    truth, label = windows.windows, y != -100
    assert torch.equal(y[label], truth[label]) and torch.equal(x[~label], truth[~label])
    mask, same = x[label] == 256, x[label] == truth[label]
    shares = torch.stack([label.float().mean(), mask.float().mean(), same.float().mean()])
    # Of 6400 tokens, and of the 960 that are labels: three standard deviations are 0.013, 0.039 and 0.029.
    assert (shares - torch.tensor([0.15, 0.8, 0.1])).abs().lt(torch.tensor([0.014, 0.04, 0.03])).all(), shares


def test_masks_are_drawn_anew_for_every_batch_and_process_and_again_from_a_checkpoint(tmp_path):
    mask = collator(BERT, bert(tmp_path / "bert"))
    items = [{"input_ids": torch.arange(32)}] * 4

    def masks(seed, process, last):
        batch = _numbered(mask, SimpleNamespace(seed=seed, process_index=process), last)
        return [tuple(batch(items)["labels"].flatten().tolist()) for _ in range(3)]

    first = masks(0, 0, None)
    assert len({*first, *masks(1, 0, None), *masks(0, 1, None)}) == 9
    assert masks(0, 0, "run/checkpoint-1")[:2] == first[1:]


def test_windows_of_a_causal_model_stay_as_they_are_and_a_tokenizer_without_a_mask_is_refused(tmp_path):
    assert collator(GPT2, tmp_path) is None
    with pytest.raises(Refusal, match="expected a tokenizer with a mask token, got none; "):
        collator(BERT, bert(tmp_path / "bert", masked=False))


def test_a_folder_is_read_in_the_order_of_names_without_hidden_and_empty_files(tmp_path):
    for name, text in {"b.txt": "B", "a/z.py": "A", ".git/config": "no", "empty.py": " \n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_text(tmp_path) == ["A", "B"]


def test_text_that_cannot_be_used_is_refused_by_name(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "none").mkdir()
    for name, got in {
        "empty.txt": "an empty file",
        "latin.txt": "byte 0xe9 at 3",
        "none": "a folder without any",
        "absent.txt": "nothing there",
    }.items():
        with pytest.raises(Refusal, match=f"{name}: expected .*, got {got}.*; ") as refusal:
            load_text(tmp_path / name)
        assert "\n" not in str(refusal.value)


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
    batch = collator(BERT, tmp_path / "bert")([{"input_ids": w} for w in torch.randint(256, (5, 32))])
    monkeypatch.setattr("growth.training.curve.EVAL_TOKENS", 64)  # the parts have different numbers of labels
    assert evaluate(model, *batch.values()) == pytest.approx(model(**batch).loss.item(), rel=1e-6)


# ---- whole runs


def test_a_run_writes_a_checkpoint_that_generates_text_and_a_curve_that_falls(folder):
    report = run(folder, "whole", steps=24)
    assert [p.step for p in report.curve] == list(range(0, 25, 4))
    assert report.curve[-1].loss < report.curve[0].loss - 0.3
    assert [p.flops for p in report.curve] == [p.step * report.step_flops for p in report.curve]
    assert all(a.seconds < b.seconds for a, b in zip(report.curve, report.curve[1:]))
    assert json.loads((folder / "whole" / "training.json").read_text()) == report.json()
    names = {f.name for f in (folder / "whole").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "training.json"}
    assert not names & {"training_args.bin", "optimizer.pt"} and not (folder / "whole.unfinished").exists()
    model = AutoModelForCausalLM.from_pretrained(folder / "whole")
    tokenizer = AutoTokenizer.from_pretrained(folder / "whole")
    prompt = tokenizer("abc", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(out[0]).startswith("abc")


def test_a_masked_model_trains_and_is_measured_on_the_same_masks_each_time(masked):
    report = run(masked, "whole", steps=24)
    assert report.curve[-1].loss < report.curve[0].loss - 0.3
    assert [p.flops for p in report.curve] == [p.step * report.step_flops for p in report.curve]
    windows = Windows(tokens([TEXT], byte_tokenizer()), 32)
    held_out = [{"input_ids": window} for window in windows.hold_out(10)[1]]
    model = load_model(masked / "whole")
    again = [evaluate(model, *collator(BERT, masked / "whole")(held_out, seed=0).values()) for _ in range(2)]
    assert again[0] == again[1] == pytest.approx(report.curve[-1].loss, rel=1e-6)
    assert run(masked, "other", steps=1, seed=1).curve[0].loss == report.curve[0].loss


def test_the_same_seed_gives_the_same_weights_and_another_seed_another_order(folder):
    run(folder, "one", steps=3)
    run(folder, "two", steps=3)
    run(folder, "three", steps=3, seed=1)
    one, two, three = (weights(folder / name) for name in ("one", "two", "three"))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], three[n]) for n in one)


class PowerCut(Exception):
    pass


def cut_at(monkeypatch, step):
    def interrupt(self, now):
        if now == step:
            raise PowerCut

    monkeypatch.setattr("growth.training.progress.RunProgress.step", interrupt)


UNFREEZING = {"freeze": "transferred", "unfreeze": "plateau", "window": 2, "threshold": 9.0}  # after 4 steps


SHORT_EPOCHS = {"batch_size": 40}  # of 4 steps


@pytest.mark.parametrize(
    "kind, cut, more",
    [
        ("folder", 8, {}),
        ("folder", 8, UNFREEZING),
        ("folder", 5, UNFREEZING),
        ("masked", 8, {}),
        ("masked", 8, SHORT_EPOCHS),
        ("masked", 5, SHORT_EPOCHS | UNFREEZING),
    ],
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(request, tmp_path, monkeypatch, kind, cut, more):
    folder = request.getfixturevalue(kind)
    settings = {"steps": 12, "save_every": 3, "warmup": 3, **more}
    whole = run(folder, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_at(patch, cut)
        run(folder, tmp_path / "cut", **settings)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(Refusal, match="cut.unfinished: expected no interrupted run"):
        run(folder, tmp_path / "cut", **settings)
    with pytest.raises(Refusal, match="resume: expected seed 0, got seed 1"):
        run(folder, tmp_path / "cut", **settings, seed=1, resume=True)
    (folder / "other.txt").write_text(TEXT[::-1])
    with pytest.raises(Refusal, match="resume: expected data 1.. windows, .*, got data 1.. windows"):
        train(folder / "model", folder / "other.txt", tmp_path / "cut", **DEFAULTS | settings, resume=True)
    resumed = run(folder, tmp_path / "cut", **settings, resume=True)
    assert resumed.unfrozen_at == whole.unfrozen_at == (4 if "unfreeze" in more else None)
    assert [(p.step, p.flops, p.loss) for p in resumed.curve] == [
        (p.step, p.flops, p.loss) for p in whole.curve
    ]
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_run_that_could_not_save_its_result_resumes_without_a_step_too_many(folder, tmp_path, monkeypatch):
    settings = {"steps": 12, "save_every": 3}
    run(folder, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(trainer, "_save", lambda *arguments: (_ for _ in ()).throw(PowerCut))
        run(folder, tmp_path / "cut", **settings)
    run(folder, tmp_path / "cut", **settings, resume=True)
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_long_text_is_cut_at_line_ends_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(data, "BATCH_CHARS", 10)
    texts = ["one\ntwo\nthree four five six\n\n" * 3, "x", "y" * 35]
    pieces = [piece for batch in data._batches(texts) for piece in batch]
    assert all(len(piece) <= 10 for piece, _ in pieces)
    assert "".join(piece + "|" * last for piece, last in pieces) == "|".join(texts) + "|"
    assert [piece for piece, _ in pieces][:2] == ["one\ntwo\n", "three four"]


def test_a_trained_checkpoint_keeps_its_history_and_promises_nothing(folder, tmp_path):
    run(folder, tmp_path / "trained")
    record = json.loads((tmp_path / "trained" / "growth.json").read_text())
    assert record["tensors"] and not record["lossless"]


def test_an_interruption_before_the_first_checkpoint_leaves_nothing(folder, tmp_path, monkeypatch):
    cut_at(monkeypatch, 2)
    with pytest.raises(PowerCut):
        run(folder, tmp_path / "cut", save_every=3)
    assert list(tmp_path.iterdir()) == []


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
        "data: expected at least 32 tokens": (model, tmp_path / "short.txt", out, {}),
        "absent: expected a file or a folder": (model, tmp_path / "absent", out, {}),
        "data: expected at least one batch": (model, text, out, {"batch_size": 4000}),
        "steps: expected at least 1, got 0": (model, text, out, {"steps": 0}),
        "sequence length: expected at least 2": (model, text, out, {"sequence_length": 1}),
        "data: expected tokens below the model's 256, got 300": (model, strange, out, {}),
        "narrow: expected a tokenizer of the model's 256 tokens, got 257": (narrow, text, out, {}),
        "maskless: expected a tokenizer with a mask token, got none": (maskless, text, out, {}),
        "untold: expected a tokenizer beside the model": (untold, text, out, {}),
        "schedule: expected cosine or lemon, got step": (model, text, out, {"schedule": "step"}),
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
