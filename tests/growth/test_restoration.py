"""Layers that keep their attention: those whose restoration lowers the KL to the source most."""

import json

import pytest
import torch
from checkpoints import VOCAB
from decoders import DECODERS
from transformers import AutoModelForCausalLM

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import quiet
from growth.training.data import Windows
from growth.transferring.align import Alignment
from growth.transferring.restoration import HELD_OUT, best

HOW = Alignment(5, batches=2, batch_size=4, learning_rate=5e-3)


def text(count=24, length=20):
    generator = torch.Generator().manual_seed(0)
    return Windows(torch.randint(3, VOCAB, (count * length,), generator=generator), length)


def logits(folder, ids):
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2", "gpt2", "lci RAM"])
def test_scores_are_those_of_whole_models_and_the_best_layers_are_kept(tmp_path, name):
    """Against students made one by one, each with the attention of one layer, and the source."""
    with quiet():
        src = DECODERS[name](tmp_path / "src")
        report = growth.transfer(
            src, tmp_path / "out", mixers="mamba2", keep_attention="auto:1", align=HOW, data=text()
        )
    rest, held_out = text().hold_out(HELD_OUT, 0)
    p = logits(src, held_out.windows)
    wanted = {}
    letters = Checkpoint(src).config.pattern if name.startswith("lci") else "AAA"
    for layer in (None, *(i for i, letter in enumerate(letters) if letter == "A")):
        with quiet():
            kept, folder = [] if layer is None else [layer], tmp_path / f"{layer}"
            growth.transfer(src, folder, mixers="mamba2", keep_attention=kept, align=HOW, data=rest)
        wanted[layer] = (p.exp() * (p - logits(folder, held_out.windows))).sum(-1).mean().item()
    rows = report.details["scores"]
    assert {row["layer"]: row["kl"] for row in rows} == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    (kept,) = [row["layer"] for row in rows if row["kept"]]
    assert wanted[kept] == min(x for layer, x in wanted.items() if layer is not None)
    same = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", str(kept))]
    assert same[0] == same[1]
    record = json.loads((tmp_path / "out" / "growth.json").read_text())
    assert record["scores"] == rows and record["stages"]["scores"]["flops"] > 0
    assert record["flops"] == report.flops == sum(stage["flops"] for stage in record["stages"].values())


def test_a_dry_run_says_that_data_will_choose(tmp_path):
    with quiet():
        DECODERS["gpt_neox"](tmp_path / "src")
    told = growth.transfer(tmp_path / "src", keep_attention="auto:2", data=text(), dry_run=True)
    assert told.notes[-1] == "2 of the layers will keep attention: data choose them when it runs"
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_the_lowest_scores_are_the_best_and_their_layers_stay_in_order():
    assert best({None: 1.0, 0: 0.5, 1: 0.2, 2: 0.9, 3: 0.2}, 2) == [1, 3]
    assert best({None: 1.0, 0: 0.5, 1: 0.5}, 1) == [0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep_attention": "auto:1"}, "data: expected text that keep-attention auto learns from, got none"),
        ({"keep_attention": "auto:4", "data": text()}, "keep-attention: expected 1 to 3 layers"),
        ({"keep_attention": "auto:0", "data": text()}, "keep-attention: expected 1 to 3 layers"),
        (
            {"keep_attention": "auto", "data": text()},
            "keep-attention: expected layer numbers such as 1,11, or",
        ),
        (
            {"keep_attention": "auto:1", "data": text(), "pattern": "RRR"},
            "pattern: expected either a pattern or",
        ),
        ({"keep_attention": "auto:1", "data": text(12)}, "data: expected 16 windows of 20 tokens"),
    ],
)
def test_layers_that_cannot_be_chosen_are_refused_before_any_work(tmp_path, options, message):
    with quiet():
        DECODERS["gpt_neox"](tmp_path / "src")
    with pytest.raises(Refusal, match=message):
        growth.transfer(tmp_path / "src", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
