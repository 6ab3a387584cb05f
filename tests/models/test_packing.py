"""Sequences that share a row give what each gives alone."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

PATTERNS = ["A", "R", "M", "S", "RAMS", "AR", "WR"]
EXACT = {"rtol": 0, "atol": 1e-11}  # float64, logits of 1 to 10
LENGTHS = [5, 1, 8, 3]
BOUNDS = torch.tensor([0, 5, 6, 14, 17], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]
TOLD = {
    "positions": {"position_ids": POSITIONS},
    "positions that start elsewhere": {"position_ids": POSITIONS + 2},
    "boundaries": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 8, "max_length_k": 8},
    "boundaries of 64 bits, with an empty sequence": {"cu_seq_lens_q": torch.tensor([0, 5, 5, 6, 14, 17])},
    "numbers": {"seq_idx": NUMBERS},
    "everything": {"position_ids": POSITIONS, "cu_seq_lens_q": BOUNDS, "seq_idx": NUMBERS},
}


def alone(model, ids: Tensor) -> Tensor:
    """The logits of ids [1, 17], a sequence at a time."""
    return torch.cat([model(ids[:, a:b]).logits for a, b in pairwise(BOUNDS.tolist())], 1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD.keys())
def test_packed_sequences_give_what_each_gives_alone(tiny, ids, pattern, told):
    model = tiny(pattern)
    with torch.no_grad():
        got, want = model(ids[:1], **told), alone(model, ids[:1])
        # Angles are float32 of a position: between two that start elsewhere they are 1e-6 off.
        tolerance = {"rtol": 0, "atol": 1e-4} if told.get("position_ids", POSITIONS)[0, 0] else EXACT
        torch.testing.assert_close(got.logits, want, **tolerance)
        assert (model(ids[:1]).logits - want).abs().max() > 0.01
    assert got.cache is None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_packed_sequences_are_those_of_each_alone(tiny, ids, pattern):
    model = tiny(pattern).train()
    labels = ids[:1].clone()
    labels[:, BOUNDS[:-1].long()] = -100
    gradients = []
    for logits in (model(ids[:1], position_ids=POSITIONS).logits, alone(model, ids[:1])):
        loss = model.loss_function(logits, labels, vocab_size=64)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for packed, apart in zip(*gradients):
        torch.testing.assert_close(packed, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("told", ["position_ids", "seq_idx"])
def test_several_packed_rows_give_what_each_gives(tiny, ids, pattern, told):
    model = tiny(pattern)
    rows = {"position_ids": torch.cat([POSITIONS, torch.arange(17)[None] % 9]), "seq_idx": None}
    rows["seq_idx"] = (rows["position_ids"] == 0).cumsum(1)
    with torch.no_grad():
        got = model(ids, **{told: rows[told]}).logits
        want = [model(ids[n : n + 1], position_ids=rows["position_ids"][n : n + 1]).logits for n in range(2)]
        torch.testing.assert_close(got, torch.cat(want), **EXACT)
        torch.testing.assert_close(got[1:, 9:], model(ids[1:, 9:]).logits, **EXACT)
        shared = model(ids, position_ids=POSITIONS).logits  # one row of positions for all
        torch.testing.assert_close(shared[:1], got[:1], **EXACT)
        torch.testing.assert_close(shared[1:], alone(model, ids[1:]), **EXACT)


@pytest.mark.parametrize("pattern", ["AR", "R", "M", "S", "RAMS", "WR"])
@pytest.mark.parametrize("told", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_padding_between_and_after_packed_sequences_changes_nothing(tiny, ids, pattern, told):
    model = tiny(pattern)
    mask = torch.ones(1, 17, dtype=torch.long)
    mask[0, [2, 5, 10, 14, 16]] = 0  # the lone token too: a sequence of padding alone
    positions = POSITIONS.clone()
    positions[0, [3, 4, 11, 12, 13, 15]] -= 1  # as the kept tokens count
    told = {told: {"position_ids": positions, "seq_idx": NUMBERS, "cu_seq_lens_q": BOUNDS}[told]}
    with torch.no_grad():
        got = model(ids[:1], attention_mask=mask, **told).logits
        for start, end in pairwise(BOUNDS.tolist()):
            kept = mask[0, start:end].bool()
            if kept.any():
                want = model(ids[:1, start:end][:, kept]).logits
                torch.testing.assert_close(got[:, start:end][:, kept], want, **EXACT)
        ones = model(ids[:1], attention_mask=torch.ones(1, 17), position_ids=POSITIONS).logits
        torch.testing.assert_close(ones, alone(model, ids[:1]), **EXACT)


@pytest.mark.parametrize("pattern", ["A", "RAMA"])
def test_attention_weights_stay_within_their_sequence(tiny, ids, pattern):
    model = tiny(pattern)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids[:1], position_ids=POSITIONS, output_attentions=True)
        torch.testing.assert_close(out.logits, alone(model, ids[:1]), **EXACT)
    apart = NUMBERS[0, :, None] != NUMBERS[0]
    for weights in out.attentions:
        assert not weights[..., apart].any() and not weights.triu(1).any()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_what_transformers_collator_flattens_trains_as_its_rows(tiny, ids, options):
    model = tiny("RAMS").train()
    rows = [{"input_ids": ids[0, a:b].tolist()} for a, b in pairwise(BOUNDS.tolist())]
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)(rows)
    out = model(**batch)
    torch.testing.assert_close(out.logits, alone(model, ids[:1]), **EXACT)
    out.loss.backward()
    assert all(x.grad.any() for x in model.parameters())


def test_the_trainer_trains_on_flattened_rows(tiny, ids, tmp_path):
    model = tiny("RAMS", torch.float32, initializer_range=0.02)
    data = [{"input_ids": row[:n]} for row in ids.tolist() * 12 for n in (17, 9)]
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
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]


def test_checkpointing_changes_no_gradient_of_packed_rows(tiny, ids):
    gradients = []
    for checkpointing in (False, True):
        model = tiny("RAMS").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, position_ids=POSITIONS).loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_a_compiled_graph_is_told_by_boundaries(tiny, ids):
    torch._dynamo.reset()
    model = tiny("RAMS")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(ids[:1], cu_seq_lens_q=BOUNDS, position_ids=POSITIONS).logits
        torch.testing.assert_close(got, alone(model, ids[:1]), **EXACT)
        got = compiled(ids[:1], cu_seq_lens_q=BOUNDS).logits
        torch.testing.assert_close(got, alone(model, ids[:1]), **EXACT)


def test_a_compiled_graph_refuses_what_it_cannot_see(tiny, ids):
    torch._dynamo.reset()
    model, whole = tiny("R"), torch.arange(17)[None]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids[:1], position_ids=whole).logits, model(ids[:1]).logits, **EXACT)
    with pytest.raises(RuntimeError, match="is told packed sequences by cu_seq_lens_q"):
        compiled(ids[:1], position_ids=POSITIONS)
    for told, message in {
        "numbers": ({"seq_idx": NUMBERS}, "seq_idx must be given with cu_seq_lens_q in a compiled graph"),
        "a mask": (
            {"cu_seq_lens_q": BOUNDS, "attention_mask": torch.ones(1, 17)},
            "attention_mask must be None with cu_seq_lens_q in a compiled graph",
        ),
    }.values():
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match=message):
            compiled(ids[:1], **told)


def test_what_does_not_tell_sequences_apart_is_refused(tiny, ids):
    model = tiny("AR")
    cache = {"cache": DynamicCache(config=model.config)}
    for told, message in {
        "a cache": ({"position_ids": POSITIONS} | cache, "position_ids must be rising by 1 .* with a cache"),
        "boundaries": ({"cu_seq_lens_q": BOUNDS} | cache, "cu_seq_lens_q must be None with a cache"),
        "numbers": ({"seq_idx": NUMBERS} | cache, "seq_idx must be None with a cache"),
        "a leap": (
            {"position_ids": POSITIONS + 3 * NUMBERS},
            "restarting .* got a row that leaps ahead",
        ),
        "an end": ({"cu_seq_lens_q": BOUNDS[:-1]}, "cu_seq_lens_q must be 0 first, T=17 last"),
        "floats": ({"cu_seq_lens_q": BOUNDS.float()}, "cu_seq_lens_q must be int32 or int64"),
        "other keys": (
            {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS[[0, 4]]},
            "cu_seq_lens_k must be cu_seq_lens_q",
        ),
        "keys alone": ({"cu_seq_lens_k": BOUNDS}, "cu_seq_lens_q must be given with cu_seq_lens_k"),
        "other numbers": (
            {"cu_seq_lens_q": BOUNDS, "seq_idx": NUMBERS // 2},
            "seq_idx must be changing",
        ),
        "a shape": ({"seq_idx": NUMBERS[0]}, r"seq_idx must be \[B, T\] = \[1, 17\]"),
    }.values():
        with pytest.raises(ValueError, match=message):
            model(ids[:1], **told)
    with pytest.raises(ValueError, match="cu_seq_lens_q must be given only with B=1"):
        model(ids, cu_seq_lens_q=BOUNDS)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_sequence_a_row_is_not_packed(tiny, ids, pattern):
    model = tiny(pattern)
    with torch.no_grad():
        want = model(ids[:1])
        for told in (
            {"position_ids": torch.arange(17)[None]},
            {"cu_seq_lens_q": BOUNDS[[0, 4]]},
            {"seq_idx": torch.full((1, 17), 3)},
        ):
            got = model(ids[:1], **told)
            torch.testing.assert_close(got.logits, want.logits, **EXACT)
            assert got.cache.get_seq_length() == 17
