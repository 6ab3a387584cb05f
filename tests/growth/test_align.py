"""Mixers fitted to attention: closer in every layer, nothing else touched, a layer at a time."""

import json
import weakref

import pytest
import torch
from checkpoints import VOCAB
from decoders import DECODERS
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import growth
from growth.__main__ import main
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import quiet
from growth.plan import Source
from growth.training.data import Windows
from growth.training.flops import CPU_ATTENTION
from growth.transferring.align import Aligning, Alignment
from growth.transferring.fitted import ALIGN
from growth.transferring.layers import Layers
from growth.transferring.planned import Weights
from growth.transferring.sources import lci_config, pattern_of

HOW = {"batches": 4, "batch_size": 4, "ridge": 4, "learning_rate": 5e-3}


def windows(count=24, length=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Windows(torch.randint(3, VOCAB, (count * length,), generator=generator), length)


def tensors(folder):
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names}


def teacher(folder):
    source = Source(Checkpoint(folder))
    config = lci_config(source.config, pattern_of(source.config), "float32")
    return Layers(Weights(source, config, "all", 0), torch.device("cpu"))


@pytest.mark.parametrize("name", DECODERS)
def test_layers_one_at_a_time_compute_what_the_source_does(decoder, name):
    """Embeddings of every scale, positions of every type, windows, norms wherever they stand, both ends."""
    layers, ids = teacher(decoder(name)), windows().windows[:3]
    (x,) = layers.embed([ids])
    for layer in range(3):
        x = layers.run(layer, layers.block(layer), x)
    with layers.headed():
        logits = layers.logits(x)
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(decoder(name), dtype=torch.float32)
        wanted = model(input_ids=ids).logits
    assert (logits - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())


@pytest.mark.parametrize(
    "name, mixers",
    [
        ("gpt_neox", "retention"),
        ("gpt2", "retention"),
        ("qwen3", "retention"),
        ("gemma2", "retention"),
        ("olmo2", "retention"),
        ("lci RRR", "mamba"),
        ("llama", "mamba"),
        ("phi3", "mamba2"),
    ],
)
def test_aligning_comes_closer_in_every_layer_and_touches_the_mixers_alone(decoder, tmp_path, name, mixers):
    src, text = decoder(name), windows()
    before = tensors(src)
    with quiet():
        report = growth.transfer(src, tmp_path / "a", mixers=mixers, align=Alignment(40, **HOW), data=text)
        growth.transfer(src, tmp_path / "b", mixers=mixers, copy="all")
    for layer in report.details["alignment"]:
        errors = layer["error"]
        assert errors["aligned"] < 0.8 * errors["started"] and errors["aligned"] < 1, layer
        assert mixers == "retention" or errors["solved"] < errors["started"]
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    others = {key for key in a if ".mixer." not in key}
    assert others and all(torch.equal(a[key], b[key]) for key in others)
    rows = {row.name: row for row in report.plan.rows}
    assert {rows[key].origin for key in others} == {"copied"}
    inside = [key for key in a if ".mixer." in key]
    assert {rows[key].origin for key in inside} == {"aligned"}
    assert not any(rows[key].freeze or torch.equal(a[key], b[key]) for key in inside if "A_log" not in key)
    assert all(torch.equal(x, before[key]) for key, x in tensors(src).items())


def test_a_seed_gives_one_result_and_another_seed_another(decoder, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        how = {"align": Alignment(5, **HOW), "data": windows(), "seed": seed}
        growth.transfer(decoder("llama"), tmp_path / name, **how)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_layer_s_mixer_does_not_depend_on_the_others(decoder, tmp_path):
    """So all layers at once would give the same."""
    for name, pattern in (("a", "RRR"), ("b", "ARA")):
        growth.transfer(
            decoder("gpt_neox"), tmp_path / name, pattern=pattern, align=Alignment(5, **HOW), data=windows()
        )
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    mixer = [key for key in a if key.startswith("model.layers.1.mixer.")]
    assert mixer and all(torch.equal(a[key], b[key]) for key in mixer)


def test_one_layer_of_the_source_lives_at_a_time(decoder, tmp_path, monkeypatch):
    alive, block = [], Layers.block

    def watched(self, layer):
        assert not any(ref() is not None for ref in alive), f"layer {layer} begins beside another"
        made = block(self, layer)
        alive.append(weakref.ref(made.mlp.up_proj.weight))
        return made

    monkeypatch.setattr(Layers, "block", watched)
    growth.transfer(decoder("gpt_neox"), tmp_path / "out", align=Alignment(1, **HOW), data=windows())
    assert len(alive) == 3


def test_every_operation_is_counted(decoder, tmp_path):
    """The source once over each distinct window, as a forward of its layers has it; every step alike."""
    src, text = decoder("gpt_neox"), windows(8)
    how = {"batches": 2, "batch_size": 4, "ridge": 0}
    one, two = (growth.transfer(src, tmp_path / str(n), align=Alignment(n, **how), data=text) for n in (1, 2))
    with quiet():
        growth.transfer(src, tmp_path / "same", mixers="attention")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "same").model
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        model(input_ids=text.windows, use_cache=False)
    stages = one.details["stages"]
    assert stages["source"]["flops"] == counter.get_total_flops()
    assert one.flops == sum(stage["flops"] for stage in stages.values())
    T, D = 20, 64  # a step of one window: five matrices, no gradient of x; a forward of 4 windows measures
    step = two.flops - one.flops
    matrices = 3 * 2 * (4 * (D * D) * 2 + D * D * 3) * T  # three layers
    assert matrices < step < 1.5 * matrices
    record = json.loads((tmp_path / "2" / "growth.json").read_text())
    assert record["flops"] == two.flops
    assert all(0 < stage["memory"] <= record["peak_memory"] for stage in record["stages"].values())
    assert [row["layer"] for row in record["alignment"]] == [0, 1, 2]
    assert all(row["seconds"] > 0 for row in record["alignment"])


def test_without_steps_the_last_projection_alone_is_solved_for(decoder, tmp_path):
    report = growth.transfer(decoder("gpt_neox"), tmp_path / "out", align=0, data=windows())
    origins = {row.name.split("layers.1.")[-1]: row.origin for row in report.plan.rows}
    assert origins["mixer.o_proj.weight"] == origins["mixer.o_proj.bias"] == "fitted"
    assert origins["mixer.q_proj.weight"] == origins["mixer.v_proj.bias"] == "copied"
    assert origins["mixer.g_proj.weight"] == "initialised"
    errors = [layer["error"] for layer in report.details["alignment"]]
    assert all(
        error.keys() == {"started", "solved"} and error["solved"] < error["started"] for error in errors
    )


def test_learned_decays_and_other_heads_are_fitted_too(decoder, tmp_path):
    how = {"decays": "learned", "retention_heads": 2, "align": Alignment(5, **HOW), "data": windows()}
    growth.transfer(decoder("llama"), tmp_path / "out", **how)
    decays = tensors(tmp_path / "out")["model.layers.1.mixer.A_log"]
    assert decays.shape == (2,) and decays.dtype == torch.float32
    growth.transfer(decoder("llama"), tmp_path / "same", decays="learned", retention_heads=2)
    assert not torch.equal(decays, tensors(tmp_path / "same")["model.layers.1.mixer.A_log"])


def test_an_odd_number_in_the_source_is_refused_with_its_layer_and_windows(tmp_path):
    with quiet():
        src = DECODERS["gpt_neox"](tmp_path / "src")
        model = AutoModelForCausalLM.from_pretrained(src)
        model.gpt_neox.layers[1].attention.dense.bias.data[0] = torch.nan
        model.save_pretrained(src)
    with pytest.raises(Refusal, match=r"align: layer 1, the source: expected finite .* windows [0-9a-f]{8};"):
        growth.transfer(src, tmp_path / "out", align=Alignment(2, **HOW), data=windows())
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_rate_that_is_too_high_is_refused_with_the_step(decoder, tmp_path):
    how = Alignment(9, **HOW | {"learning_rate": 1e30})
    with pytest.raises(
        Refusal, match=r"align: layer 0, step \d: expected finite .* [0-9a-f]{8}; choose a lower"
    ):
        growth.transfer(decoder("gpt_neox"), tmp_path / "out", align=how, data=windows())
    assert not list(tmp_path.iterdir())


def test_a_last_step_that_leads_astray_is_refused_too(decoder, tmp_path):
    how = Alignment(1, **HOW | {"learning_rate": 1e30})
    with pytest.raises(Refusal, match=r"align: layer 0, its new mixer: expected finite .*; choose a lower"):
        growth.transfer(decoder("gpt_neox"), tmp_path / "out", align=how, data=windows())
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_gradients_that_the_caller_has_switched_off_are_taken_all_the_same(decoder, tmp_path):
    report = growth.transfer(decoder("gpt_neox"), tmp_path / "out", align=Alignment(2, **HOW), data=windows())
    assert report.plan.origins()["aligned"] == 30


def test_features_are_solved_for_on_several_times_as_many_tokens(decoder, tmp_path):
    """128 features of Mamba: on as many tokens alone they give worse than nothing on others."""
    how = {"batches": 12, "batch_size": 4, "ridge": 1}
    data = windows(48, 32)
    report = growth.transfer(
        decoder("llama"), tmp_path / "out", mixers="mamba", align=Alignment(**how), data=data
    )
    assert all(layer["error"]["solved"] < 1.5 for layer in report.details["alignment"])


def test_what_is_stopped_leaves_nothing(decoder, tmp_path, monkeypatch):
    fit = Aligning.fit

    def stopped(self, layer, *others):
        if layer == 1:
            raise KeyboardInterrupt
        return fit(self, layer, *others)

    monkeypatch.setattr(Aligning, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        growth.transfer(decoder("llama"), tmp_path / "out", align=Alignment(1, **HOW), data=windows())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"align": 3}, "data: expected text that align learns from, got none"),
        ({"align": -1, "data": windows()}, "align: expected at least 0, got -1"),
        ({"data": windows(), "mixers": "attention"}, "data: expected none, for no layer's mixer changes"),
        (
            {"align": 2, "data": windows(), "mixers": "attention"},
            "align: expected none, for no layer's mixer",
        ),
        ({"data": Windows(torch.arange(640) % 70, 20)}, "data: expected tokens below the model's 61, got 69"),
        ({"data": windows(3)}, "data: expected at least one batch, 8 windows of 20 tokens, got 3 windows"),
        ({"data": windows(8, 50)}, "data: expected at most 40 tokens, the model's positions, got 50"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_any_work(decoder, tmp_path, options, message):
    with pytest.raises(Refusal, match=message):
        growth.transfer(decoder("gpt_neox"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_tells_what_would_be_fitted_and_fits_nothing(decoder, tmp_path):
    how = {"align": Alignment(3, **HOW), "data": windows(), "dry_run": True}
    report = growth.transfer(decoder("gpt_neox"), tmp_path / "out", **how)
    assert report.plan.origins()["aligned"] == 30 and report.flops == 0
    assert not list(tmp_path.iterdir())


def test_data_alone_align(decoder):
    src = decoder("gpt_neox")
    asked = {"by itself": {}, "solved": {"align": 0}, "as said": {"align": ALIGN}}
    plans = {
        name: growth.transfer(src, data=windows(), dry_run=True, **how).plan for name, how in asked.items()
    }
    assert plans["by itself"].rows == plans["as said"].rows
    assert plans["by itself"].origins()["aligned"] == 30 and "aligned" not in plans["solved"].origins()
    assert "aligned" not in growth.transfer(src, dry_run=True).plan.origins()


def test_the_command_line_aligns_and_says_so(tmp_path, monkeypatch, capsys):
    with quiet():
        src = DECODERS["gpt_neox"](tmp_path / "src", vocab_size=256)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["growth", "transfer", str(src), str(tmp_path / "out"), *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, capsys.readouterr()

    code, said = run("--align", "2")
    assert code == 2 and said.err.count("\n") == 1 and "data: expected text" in said.err
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"body": text.read_text()}))
    code, said = run("--align", "2", "--data", str(rows))
    assert code == 2 and "got body; pass the one that holds the text, --text-field" in said.err
    assert not (tmp_path / "out").exists()
    code, said = run("--align", "2", "--data", str(rows), "--text-field", "body", "--decays", "alibi")
    assert not code and "layer 2 (R, attention): error started" in said.out
    assert "align: layer 2 of 3, " in said.err and "error" not in said.err, "the report has these"


def test_steps_that_lead_away_from_what_was_solved_are_told(decoder, tmp_path):
    for rate, told in ((10.0, "layers 0, 1, 2 are"), (1e-4, "")):
        how = Alignment(2, **HOW | {"learning_rate": rate})
        out = tmp_path / str(rate)
        report = growth.transfer(decoder("llama"), out, mixers="mamba2", align=how, data=windows())
        said = "\n".join(line for line in report.lines if "farther off than before the steps" in line)
        assert said.startswith(told) and bool(said) is bool(told)


def test_what_is_fitted_is_the_same_in_every_format(decoder, tmp_path):
    how = {"align": Alignment(3, **HOW), "data": windows()}
    for format, other in (
        ("granitemoehybrid", {"mixers": "mamba2", "keep_attention": "auto:1"}),
        ("fla", {"mixers": "retention"}),
    ):
        for name in (format, "lci"):
            growth.transfer(decoder("llama"), tmp_path / f"{format} {name}", format=name, **other, **how)
    folder = tmp_path / "granitemoehybrid"
    assert growth.check(f"{folder} lci", f"{folder} granitemoehybrid").float32 < 1e-5
    own, fla = (load_file(tmp_path / f"fla {name}" / "model.safetensors") for name in ("lci", "fla"))
    for part in "qkvgo":
        x = own[f"model.layers.1.mixer.{part}_proj.weight"]
        assert torch.equal(x, fla[f"model.layers.1.attn.{part}_proj.weight"])


def test_a_format_that_cannot_hold_what_comes_out_is_refused_before_any_work(decoder, tmp_path):
    with pytest.raises(Refusal, match="pattern: expected .* for the format fla"):
        growth.transfer(
            decoder("llama"), tmp_path / "out", keep_attention="auto:1", format="fla", data=windows()
        )
    assert not list(tmp_path.iterdir())
