"""The command line: what a person types, and the one line they get when it cannot be."""

import json
import subprocess
import sys

import pytest
import torch
from checkpoints import ALL, FAMILIES, bert, gpt2, neox, saved
from command import run
from transformers import OPTConfig, OPTForCausalLM

import growth
from growth.errors import Refusal
from growth.methods import METHODS


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Checkpoints that cannot be read, by name."""
    tmp_path = tmp_path_factory.mktemp("broken")
    truncated = neox(tmp_path / "truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    header = neox(tmp_path / "header") / "model.safetensors"
    header.write_bytes(b"not a checkpoint")
    (neox(tmp_path / "weightless") / "model.safetensors").unlink()
    no_heads = neox(tmp_path / "no_heads") / "config.json"
    no_heads.write_text(no_heads.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 0'))
    odd = neox(tmp_path / "odd") / "config.json"
    odd.write_text(odd.read_text().replace('"hidden_size": 96', '"hidden_size": "wide"'))
    index = neox(tmp_path / "index") / "model.safetensors"
    index.rename(index.with_name("model-00001-of-00001.safetensors"))
    index.with_name("model.safetensors.index.json").write_text("{")
    (neox(tmp_path / "record") / "growth.json").write_text("[]")
    for tokenizer in neox(tmp_path / "wordless").glob("tokenizer*"):
        tokenizer.unlink()
    growth.transfer(tmp_path / "wordless", tmp_path / "retnet")
    growth.transfer(neox(tmp_path / "whole"), tmp_path / "attention", mixers="attention")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    gpt2(tmp_path / "gpt2")
    bert(tmp_path / "bert")
    ALL["llama"](tmp_path / "llama")
    ALL["llama"](tmp_path / "grouped", num_attention_heads=8, head_dim=8)
    saved(OPTForCausalLM, OPTConfig(**OPT), tmp_path / "opt", torch.float32)
    (tmp_path / "words.txt").write_text("one two three four five six seven " * 100)
    (tmp_path / "text.txt").write_text("  \n")
    return tmp_path


OPT = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
OPT |= {"word_embed_proj_dim": 16, "max_position_embeddings": 32}
TRAIN = ("--data", "{}/words.txt", "--out", "{}/out", "--steps", 2)
REFUSALS = {
    "a folder that is not there": (("grow", "{}/nothing", "{}/out", "--num-layers", 4), "nothing there"),
    "no weights": (("grow", "{}/weightless", "{}/out", "--num-layers", 4), "expected a safetensors file"),
    "truncated weights": (("grow", "{}/truncated", "{}/out", "--num-layers", 4), "end early or are damaged"),
    "damaged weights": (("transfer", "{}/header", "{}/out"), "end early or are damaged"),
    "narrower": (
        ("grow", "{src}", "{}/out", "--hidden-size", 72),
        "hidden-size: expected at least the source's 96, got 72",
    ),
    "shallower": (
        ("grow", "{src}", "{}/out", "--num-layers", 2),
        "num-layers: expected at least the source's 3, got 2",
    ),
    "half a head": (
        ("grow", "{src}", "{}/out", "--hidden-size", 100),
        "multiple of the head size 24, got 100; choose 120",
    ),
    "heads that do not fit": (
        ("grow", "{src}", "{}/out", "--hidden-size", 120, "--num-heads", 6),
        "num-heads: expected 5",
    ),
    "no growth": (("grow", "{src}", "{}/out"), "expected something larger than the source"),
    "unknown operator": (
        ("grow", "{src}", "{}/out", "--method", "magic", "--num-layers", 4),
        "method: expected one of stack",
    ),
    "an output that exists": (
        ("grow", "{src}", "{}", "--num-layers", 4),
        "expected an output folder that does not exist",
    ),
    "ligo without text": (
        ("grow", "{src}", "{}/out", "--method", "ligo", "--num-layers", 4),
        "pass a file or a folder of text",
    ),
    "ligo with empty text": (
        ("grow", "{src}", "{}/out", "--method", "ligo", "--num-layers", 4, "--data", "{}/text.txt"),
        "text.txt",
    ),
    "unknown start": (
        ("grow", "{src}", "{}/out", "--method", "ligo", "--num-layers", 4, "--start", "now"),
        "start: expected one of",
    ),
    "training on empty text": (
        ("train", "{src}", "--data", "{}/text.txt", "--out", "{}/out", "--steps", 2),
        "text.txt",
    ),
    "unknown mixer": (("transfer", "{src}", "{}/out", "--mixers", "rnn"), "mixers: expected one of"),
    "a pattern too short": (
        ("transfer", "{src}", "{}/out", "--pattern", "RR"),
        "pattern: expected 3 letters",
    ),
    "an unknown letter": (
        ("transfer", "{src}", "{}/out", "--pattern", "RRX"),
        "pattern: expected 3 letters out of A, W, R, M, S, got 'RRX'",
    ),
    "a layer that is not there": (
        ("transfer", "{src}", "{}/out", "--keep-attention", "1,3"),
        "expected layers from 0 to 2, got 3",
    ),
    "no attention heads": (
        ("transfer", "{}/no_heads", "{}/out"),
        "a configuration that transformers knows by itself, got a size of 0; ",
    ),
    "a width that is a word": (
        ("grow", "{}/odd", "{}/out", "--num-layers", 4),
        "config.json: expected a configuration",
    ),
    "nothing to hold still": (
        (
            "train",
            "{src}",
            "--data",
            "{}/words.txt",
            "--out",
            "{}/out",
            "--steps",
            2,
            "--freeze",
            "transferred",
        ),
        "expected a checkpoint whose growth.json asks for it, as growth transfer and llama-pro write it",
    ),
    "nothing left to train": (
        (
            "train",
            "{}/attention",
            "--data",
            "{}/words.txt",
            "--out",
            "{}/out",
            "--steps",
            2,
            "--batch-size",
            2,
        )
        + ("--freeze", "transferred"),
        "expected at least one parameter left to train",
    ),
    "a rate below zero": (
        ("train", "{src}", *TRAIN, "--learning-rate", -1),
        "learning rate: expected above 0",
    ),
    "unknown format": (("transfer", "{src}", "{}/out", "--format", "gguf"), "format: expected one of lci, "),
    "a field beyond the format": (
        ("transfer", "{src}", "{}/out", "--format", "fla"),
        "norm: expected rms, for the format fla, got layer; write it as lci",
    ),
    "a broken index": (("transfer", "{}/index", "{}/out"), "model.safetensors.index.json: expected JSON"),
    "a broken record": (("check", "{src}", "{}/record"), "growth.json: expected an object with 'verb'"),
    "attention where the source has none": (
        ("transfer", "{}/retnet", "{}/out", "--keep-attention", "1"),
        "layer 1: expected attention as the source has it, or R, got A, where the source has retention (R)",
    ),
    "a window where the source has none": (
        ("transfer", "{src}", "{}/out", "--pattern", "RWR"),
        "layer 1: expected attention as the source has it, or A, got W, where the source has attention (A)",
    ),
    "decays of nobody": (
        ("transfer", "{src}", "{}/out", "--decays", "slow"),
        "decays: expected retnet, alibi, learned, or a number for each of 4 heads, got slow",
    ),
    "too few decays": (
        ("transfer", "{src}", "{}/out", "--decays", "0.9,0.95"),
        "decays: expected retnet, alibi, learned, or a number for each of 4 heads, got 2 numbers",
    ),
    "a head that remembers more than there was": (
        ("transfer", "{src}", "{}/out", "--decays", "0.9,0.95,1.0,1.1"),
        "decays: expected above 0, and at most 1: the share that a head keeps, got 1.1",
    ),
    "decays of a Mamba": (
        ("transfer", "{src}", "{}/out", "--mixers", "mamba", "--decays", "alibi"),
        "decays: expected retention in the pattern (R), got none in MMM; leave it out",
    ),
    "heads that do not share attention's dims": (
        ("transfer", "{src}", "{}/out", "--retention-heads", 7),
        "retention-heads: expected a divisor of the 96 dims of attention, got 7; choose 1, 2, 3, 4, 6",
    ),
    "heads of a size that does not turn in pairs": (
        ("transfer", "{}/llama", "{}/out", "--retention-heads", 64),
        "llama: expected settings that an LCI model has too, got",
    ),
    "a family that is not known": (
        ("grow", "{}/opt", "{}/out", "--num-layers", 4),
        "expected a checkpoint of one of: gpt_neox, gpt2, llama,",
    ),
    "an option of another method": (
        ("grow", "{src}", "{}/out", "--num-layers", 4, "--data", "{}/words.txt"),
        "data: expected none, for lemon has no use for it, got some; leave it out, or choose method gradmax",
    ),
    "an option of one other method": (
        ("grow", "{src}", "{}/out", "--num-layers", 4, "--method", "mango", "--start", "lossless"),
        "start: expected none, for mango has no use for it, got lossless; leave it out, or choose",
    ),
    "a dtype of nobody": (
        ("grow", "{src}", "{}/out", "--num-layers", 4, "--dtype", "int4"),
        "dtype: expected one of",
    ),
    "files of nothing": (
        ("grow", "{src}", "{}/out", "--num-layers", 4, "--shard-size", 0),
        "shard-size: expected more than 0 GB",
    ),
    "no output and no dry run": (("grow", "{src}", "--num-layers", 4), "output folder: expected the name of"),
    "groups that do not divide": (
        ("grow", "{}/llama", "{}/out", "--num-heads", 6, "--num-kv-heads", 4),
        "num-kv-heads: expected a divisor of the 6 heads, got 4; choose 2, 3, 6",
    ),
    "groups of a family that has none": (
        ("grow", "{src}", "{}/out", "--hidden-size", 120, "--num-kv-heads", 2),
        "num-kv-heads: expected ",
    ),
    "an encoder that is to be transferred": (
        ("transfer", "{}/bert", "{}/out"),
        "bert: expected a decoder out of gpt_neox, gpt2, llama,",
    ),
    "a family that is not transferred": (
        ("transfer", "{}/opt", "{}/out"),
        "got opt; pass a language model of these, such as a Pythia or a Llama",
    ),
    "a post-norm width between whole factors": (
        ("grow", "{}/bert", "{}/out", "--hidden-size", 168),
        "168 channels are not those of the source's 96; and 3 more; choose hidden size 192, or",
    ),
    "groups that are cut": (
        ("grow", "{}/grouped", "{}/out", "--hidden-size", 72, "--num-kv-heads", 3),
        "9 query heads do not divide among 3 key and value heads as 8 do among 2; and 1 more; choose",
    ),
    "heads that transformers does not take": (
        ("grow", "{}/llama", "{}/out", "--hidden-size", 100, "--num-heads", 6),
        "target: expected sizes that transformers takes, got The hidden size (100) is not a multiple",
    ),
    "the same sizes": (("grow", "{src}", "{}/out"), "pass one of --hidden-size, --num-layers"),
    "a file of a checkpoint": (
        ("grow", "{}/whole/model.safetensors", "{}/out", "--num-layers", 4),
        "name the folder that it is in",
    ),
    "another program's file": (
        ("grow", "{}/gguf", "{}/out", "--num-layers", 4),
        "expected a checkpoint folder with config.json, got model.gguf, which is none",
    ),
    "ligo without a tokenizer": (
        ("grow", "{}/wordless", "{}/out", "--method", "ligo", "--num-layers", 4, "--data", "{}/text.txt"),
        "expected a tokenizer beside",
    ),
    "ligo without steps": (
        ("grow", "{src}", "{}/out", "--method", "ligo", "--num-layers", 4, "--steps", 0),
        "steps: expected at least 1",
    ),
    "an output below a file": (
        ("grow", "{src}", "{}/text.txt/out", "--num-layers", 4),
        "where nothing can be written",
    ),
    "layers that are no numbers": (
        ("transfer", "{src}", "{}/out", "--keep-attention", "one"),
        "separate them by commas",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_bad_call_is_one_line_exit_code_2_and_nothing_written(source, broken, monkeypatch, capsys, name):
    words, message = REFUSALS[name]
    before = sorted(broken.rglob("*"))
    capsys.readouterr()
    code, out, err = run(monkeypatch, capsys, *(str(word).format(broken, src=source) for word in words))
    assert code == 2 and out == ""
    assert len(err.strip().splitlines()) == 1 and message in err, err
    assert "; " in err, "the remedy"
    assert sorted(broken.rglob("*")) == before


WRONG = {
    "an unknown option": (("grow", "a", "b", "--x"), "No such option: --x; see growth grow --help"),
    "a missing argument": (("grow",), "Missing argument 'SRC'; see growth grow --help"),
    "no number": (("grow", "a", "b", "--num-layers", "x"), "Invalid value for '--num-layers'"),
    "a missing option": (("train", "a"), "Missing option '--"),
    "an unknown verb": (("juggle",), "No such command 'juggle'; see growth --help"),
    "an empty source": (
        ("grow", "", "b", "--num-layers", 4),
        "expected the name of a folder, got ''; name one",
    ),
    "an empty output": (("demo", "--out", ""), "expected the name of a folder, got ''; name one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_of_the_command_line_is_one_line_and_exit_code_2(monkeypatch, capsys, name):
    words, message = WRONG[name]
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("growth: ") and message in err


@pytest.mark.parametrize("words", [(), ("--help",), ("grow", "--help")])
def test_help_imports_nothing_that_takes_long(words):
    code = (
        f"import sys; sys.argv = {['growth', *words]!r}\n"
        "from growth.__main__ import main\n"
        "try: main()\n"
        "finally: print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage: growth" in done.stdout and done.stdout.endswith("set()\n")


@pytest.mark.parametrize("family, hidden_size", [("gpt_neox", 168), ("gpt2", 168), ("bert", 192)])
def test_grow_then_check(family, hidden_size, tmp_path, monkeypatch, capsys):
    source = FAMILIES[family](tmp_path / "src")
    words = "grow", source, tmp_path / "out", "--hidden-size", hidden_size, "--num-layers", 5
    code, out, _ = run(monkeypatch, capsys, *words)
    assert code == 0 and "by lemon" in out and "the same logits as the source" in out
    code, out, _ = run(monkeypatch, capsys, "check", source, tmp_path / "out")
    assert code == 0 and "kept" in out


def test_a_broken_promise_is_exit_code_1(source, tmp_path, monkeypatch, capsys):
    run(monkeypatch, capsys, "grow", source, tmp_path / "out", "--hidden-size", 168)
    config = tmp_path / "out" / "config.json"
    config.write_text(
        config.read_text()
        .replace('"rotary_pct": 0.25', '"rotary_pct": 0.5')
        .replace('"partial_rotary_factor": 0.25', '"partial_rotary_factor": 0.5')
    )
    code, out, _ = run(monkeypatch, capsys, "check", source, tmp_path / "out")
    assert code == 1 and "BROKEN" in out


def test_a_dry_run_prints_every_tensor_and_writes_nothing(source, text, tmp_path, monkeypatch, capsys):
    for words in (
        ("grow", source, tmp_path / "out", "--num-layers", 4),
        ("transfer", source, tmp_path / "out"),
    ):
        code, out, _ = run(monkeypatch, capsys, *words, "--dry-run")
        assert code == 0 and "dry run" in out
        assert "layers.2.mlp" in out and all(len(line.split()) > 3 for line in out.splitlines())
    train = ("train", source, "--data", text, "--steps", 4, "--sequence-length", 16, "--dry-run")
    for words in ((), ("--out", tmp_path / "out")):
        code, out, _ = run(monkeypatch, capsys, *train, *words)
        assert code == 0 and out.endswith("-> nothing (dry run): 4 steps\n")
        assert out.startswith("model: 255,168 parameters, ") and "FLOP a step" in out
    code, out, _ = run(monkeypatch, capsys, *train, "--json")
    assert code == 0 and json.loads(out)["out"] is None and json.loads(out)["takes"]["flops"] > 0
    assert not list(tmp_path.iterdir())


def test_a_dry_run_needs_no_output_and_tells_bytes_and_memory(source, monkeypatch, capsys):
    for words in (("transfer", source), ("grow", source, "--num-layers", 4)):
        code, _, err = run(monkeypatch, capsys, *words)
        assert code == 2 and "output folder: expected the name of a new folder, got none" in err
        words = *words, "--dry-run"
        code, out, _ = run(monkeypatch, capsys, *words)
        assert code == 0 and "costs: reads" in out
    code, out, _ = run(monkeypatch, capsys, *words, "--json")
    told = json.loads(out)
    assert code == 0 and told["target"] is None and told["lossless"]
    assert told["bytes"] == 4 * told["parameters"][1] < told["memory"] + 10**6
    assert {row["name"] for row in told["tensors"]} >= {"gpt_neox.layers.3.mlp.dense_4h_to_h.bias"}


def test_every_verb_that_reports_does_so_in_json_too(source, text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    code, told, _ = run(
        monkeypatch, capsys, "grow", source, out, "--hidden-size", 168, "--noise", 0.5, "--json"
    )
    assert code == 0 and json.loads(told)["target"] == str(out)
    assert json.loads((out / "growth.json").read_text())["noise"] == 0.5
    code, told, _ = run(monkeypatch, capsys, "check", source, out, "--json")
    assert code == 0 and json.loads(told)["kept"] and json.loads(told)["first"] == ""
    code, told, _ = run(monkeypatch, capsys, "inspect", out, "--json")
    assert code == 0 and json.loads(told)["family"] == "gpt_neox"
    code, told, _ = run(monkeypatch, capsys, "transfer", source, tmp_path / "retnet", "--json")
    assert code == 0 and json.loads(told)["method"] == "xatl RRR"
    words = ("--steps", 1, "--batch-size", 1, "--sequence-length", 16, "--out", tmp_path / "trained")
    code, told, err = run(monkeypatch, capsys, "train", source, "--data", text, *words, "--json")
    assert code == 0 and json.loads(told)["out"] == str(tmp_path / "trained") and "step 1 of 1" in err


def test_check_reads_a_text(source, text, tmp_path, monkeypatch, capsys):
    run(monkeypatch, capsys, "grow", source, tmp_path / "out", "--hidden-size", 168)
    code, out, _ = run(monkeypatch, capsys, "check", source, tmp_path / "out", "--text", text)
    assert code == 0 and "kept" in out
    code, _, err = run(monkeypatch, capsys, "check", source, tmp_path / "out", "--text", tmp_path / "none")
    assert code == 2 and "nothing there" in err


def test_what_is_lost_is_told_where_it_is_allowed(tmp_path, monkeypatch, capsys):
    words = "grow", bert(tmp_path / "src"), tmp_path / "out", "--hidden-size", 168
    assert run(monkeypatch, capsys, *words)[0] == 2
    code, out, _ = run(monkeypatch, capsys, *words, "--allow-lossy")
    assert code == 0 and "mixer_norm: the mean and variance of 168 channels" in out
    assert "other logits than the source" in out


def test_brackets_in_a_name_are_printed_as_they_are(source, tmp_path, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "grow", source, tmp_path / "[/a]", "--num-layers", 4)
    assert code == 0 and "[/a]" in out


@pytest.mark.parametrize(
    "family, tensor",
    [
        ("gpt_neox", "gpt_neox.layers.2.attention.dense.bias"),
        ("gpt2", "transformer.h.2.attn.c_proj.bias"),
        ("bert", "bert.encoder.layer.2.attention.output.dense.bias"),
    ],
)
def test_inspect_names_spaces_and_tensors(family, tensor, tmp_path, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "inspect", FAMILIES[family](tmp_path / "src"))
    assert code == 0 and "wire ffn.*" in out and "layers.*.mlp.up.weight" in out and tensor in out
    assert "hidden size 96 to any multiple of the head size 24" in out and "ffn size 160" in out
    assert ("transfer: to retention, mamba, mamba2, or" in out) == (family != "bert")


def test_help_tells_what_each_method_does_and_which_options_are_whose(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(monkeypatch, capsys, "grow", "--help")
    assert code == 0 and "Options of ligo, mango" in out and "Options of every method but upcycle" in out
    assert "'s ," not in out and "'s ." not in out  # a default of nothing
    assert "mixtral | qwen2_moe" in out and "append: added layers" in out  # as they are typed
    for method in METHODS.values():
        assert f"{method.name}: {method.__doc__.partition('.')[0]}." in out


def test_every_size_that_changed_is_told_with_those_that_nobody_gave(broken, monkeypatch, capsys):
    words = "grow", broken / "llama", "--num-heads", 5, "--dry-run"
    _, out, _ = run(monkeypatch, capsys, *words)
    assert "by lemon: hidden-size 64 -> 80, num-heads 4 -> 5, num-kv-heads 2 -> 5, ffn-size " in out
    assert json.loads(run(monkeypatch, capsys, *words, "--json")[1])["sizes"]["num-kv-heads"] == [2, 5]


GROUPS = {  # of 4 or 8 heads, 2 groups; what is told of sizes that nobody gave
    "smaller groups": (("llama", "--num-heads", 5), "5 for 5 heads, where the source has 2 for 4; "
        "--num-kv-heads chooses, --num-heads 6 keeps groups of 2"),
    "by the width": (("grouped", "--hidden-size", 72), "9 for 9 heads, where the source has 2 for 8; "
        "--num-kv-heads chooses, --hidden-size 96 keeps groups of 4"),
    "asked for": (("grouped", "--hidden-size", 72, "--num-kv-heads", 9), ""),
    "kept": (("grouped", "--hidden-size", 96), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", GROUPS)
def test_groups_of_heads_that_become_others_are_told_with_what_keeps_them(broken, monkeypatch, capsys, case):
    (name, *words), told = GROUPS[case]
    code, out, _ = run(monkeypatch, capsys, "grow", broken / name, *words, "--dry-run")
    assert code == 0 and [x for x in out.splitlines() if x.startswith("num-kv-heads: ")] == (
        [f"num-kv-heads: {told}"] if told else []
    )


def test_heads_and_experts_that_do_not_follow_the_rest_are_told(tmp_path):
    wide = ALL["llama"](tmp_path / "wide", num_attention_heads=4, head_dim=24)
    assert growth.grow(wide, hidden_size=72, dry_run=True).lines[0] == (
        "num-heads: 4, for 4 x 72 / 64 is no whole number; --num-heads chooses"
    )
    assert not growth.grow(wide, hidden_size=96, dry_run=True).lines
    mixture = ALL["qwen3_moe"](tmp_path / "mixture")
    told = "experts: 1 count for a token instead of 2, as many as are left"
    assert told in growth.shrink(mixture, experts=1, dry_run=True).lines
    assert not growth.shrink(mixture, experts=3, dry_run=True).lines


def test_a_number_is_no_size_and_heads_without_groups_are_told_once(source):
    with pytest.raises(Refusal, match="sizes: expected growth.Sizes, got 168; such as Sizes"):
        growth.grow(source, sizes=168, dry_run=True)
    sizes = growth.grow(source, sizes=growth.Sizes(hidden=168), dry_run=True).sizes
    assert sizes == {"hidden-size": (96, 168), "num-heads": (4, 7), "ffn-size": (160, 280)}
