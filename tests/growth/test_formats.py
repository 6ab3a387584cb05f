"""What others load computes what our model computes; what a format does not hold is refused by its name."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from checkpoints import GROUPED, LCI, WIDE, pico
from decoders import DECODERS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import growth
from growth.errors import Refusal
from growth.loading import load_model, quiet
from growth.training.freeze import transferred
from growth.transferring.formats import FORMATS, written
from lcikernels.models import LCIConfig, LCIForCausalLM

GRANITE, FLA = "granitemoehybrid", "fla"
LLAMA_FRAME = {"norm": "rms", "use_parallel_residual": False, "gated_mlp": True, "mlp_bias": False}
LLAMA_FRAME |= {"attention_bias": False, "hidden_act": "silu"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SCALES = {"embedding_scale": 3.0, "residual_scale": 0.5, "logits_scale": 0.3, "attention_scale": 0.2}
MORE = {
    "llama 3": pico(LlamaForCausalLM, LlamaConfig, **GROUPED, rope_parameters=LLAMA3),
    "mistral of wide heads": pico(
        MistralForCausalLM, MistralConfig, **GROUPED, head_dim=32, sliding_window=None
    ),
    "own": pico(LCIForCausalLM, LCIConfig, **LCI | LLAMA_FRAME | SCALES, pattern="SAS", expand=3),
    "own without positions": pico(
        LCIForCausalLM, LCIConfig, **LCI | LLAMA_FRAME, pattern="ASA", position_embedding_type="none"
    ),
    "own retention": pico(
        LCIForCausalLM,
        LCIConfig,
        **WIDE | LLAMA_FRAME,
        pattern="RRR",
        retention_num_heads=6,
        retention_num_kv_heads=2,
        retention_head_dim=8,
        tie_word_embeddings=True,
    ),
}
SOURCES = DECODERS | MORE
# source: {pattern: the field that the format does not hold, "" where it holds all}
HELD = {
    GRANITE: {
        "gpt_neox": {"AAA": "norm", "SSS": "norm"},
        "gpt_neox tied": {"SAS": "norm"},
        "gpt2": {"AAA": "norm", "SSS": "norm"},
        "llama": {"AAA": "", "SAS": "", "SSS": "pattern", "RAS": "pattern", "MMM": "pattern"},
        "llama with biases, tied": {"AAA": "mlp_bias", "SSS": "mlp_bias"},
        "llama 3": {"AAA": "", "SAS": ""},
        "mistral": {"AAA": "pattern", "SAS": "pattern"},
        "mistral of wide heads": {"AAA": "", "SSA": ""},
        "qwen2": {"AAA": "pattern", "ASA": "", "SSS": "pattern"},
        "qwen3": {"AAA": "qk_norm", "SAS": "qk_norm", "SSS": "pattern"},
        "gemma": {"AAA": "zero_centered_norms", "SSS": "zero_centered_norms"},
        "gemma2": {"AAA": "norm_placement", "SSS": "norm_placement"},
        "gemma3_text": {"AAA": "norm_placement", "SSS": "norm_placement"},
        "phi3": {"AAA": "", "SAS": ""},
        "olmo2": {"AAA": "norm_placement", "SSS": "norm_placement"},
        "granite": {"AAA": "", "SAS": "", "SSS": "pattern"},
        "smollm3": {"AAA": "no_rope_layers", "ASA": "", "SAS": "", "SSS": "pattern"},
        "granitemoehybrid": {"SAS": ""},
        "granitemoehybrid rope, biases, tied": {"SAS": ""},
        "own": {"SAS": "", "SSS": "pattern", "RRR": "pattern"},
        "own without positions": {"ASA": ""},
    },
    FLA: {
        "gpt_neox": {"RRR": "norm"},
        "gpt2": {"RRR": "norm"},
        "llama": {"RRR": "", "RAR": "pattern", "SSS": "pattern"},
        "llama with biases, tied": {"RRR": "mlp_bias"},
        "llama 3": {"RRR": "rope_parameters"},
        "mistral": {"RRR": ""},
        "mistral of wide heads": {"RRR": ""},
        "qwen2": {"RRR": "attention_bias"},
        "qwen3": {"RRR": "qk_norm"},
        "gemma": {"RRR": "zero_centered_norms"},
        "gemma2": {"RRR": "norm_placement"},
        "gemma3_text": {"RRR": "norm_placement"},
        "phi3": {"RRR": ""},
        "olmo2": {"RRR": "norm_placement"},
        "granite": {"RRR": "embedding_scale"},
        "smollm3": {"RRR": "rope_parameters"},
        "own retention": {"RRR": ""},
    },
}
TABLE = [
    (form, source, pattern, field)
    for form, sources in HELD.items()
    for source, patterns in sources.items()
    for pattern, field in patterns.items()
]
# fla is for Linux alone, as Triton is.
LOADED = [form for form in HELD if form != FLA or find_spec("fla")]
# Rows and tokens that are read, and tokens that are written: fewer in Triton's interpreter.
SIZES = {GRANITE: (2, 40, 8), FLA: (1, 8, 2)}

# A process that never heard of this package. Of the shapes that fla's kernels could be timed in the first is
# taken: in the interpreter there is nothing to time.
LOAD = """
import sys, warnings, torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
root, kind, new, *folders = sys.argv[1:]
new = int(new)
if kind == "fla":
    sys.path.insert(0, root + "/tests")
    import interpreter
    sys.path.remove(root + "/tests")
    from triton.runtime.autotuner import Autotuner
    Autotuner.do_bench = property(lambda self: lambda call, quantiles: [0.0] * 3)
    import fla
from transformers import AutoModelForCausalLM
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.load("ids.pt")
    with torch.no_grad():
        logits = model(ids).logits
        text = model.generate(ids[:1, :6], max_new_tokens=new, min_new_tokens=new, do_sample=False)
    torch.save((type(model).__name__, logits, text), folder + ".pt")
assert not [name for name in sys.modules if name.startswith(("lcikernels", "growth"))]
if kind == "fla":  # which makes its type known to this package too
    sys.path.insert(0, root)
    import growth
    out, few = folders[0], dict(batch=1, length=6)
    same = growth.check(out + ".lci", out, **few)
    assert same.float32 <= 1e-5 * max(1, same.largest), same
    growth.grow(out, out + ".deep", method="lemon", num_layers=4)
    deep = growth.check(out, out + ".deep", **few)
    assert deep.limit and deep.kept, deep
    try:
        growth.grow(out, out + ".wide", method="lemon", hidden_size=128)
    except growth.Refusal as refusal:
        assert "a head's decay follows from its number" in str(refusal), refusal
    else:
        raise AssertionError("heads of a RetNet keep no decays of their own")
"""


ROOT = Path(__file__).resolve().parents[2]
ALONE = {"PYTHONPATH": "", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> the folder of a random checkpoint of that kind."""
    made = {}

    def source(name):
        if name not in made:
            with quiet():
                made[name] = SOURCES[name](tmp_path_factory.mktemp("source") / "src")
        return made[name]

    return source


@pytest.mark.parametrize("form", LOADED)
def test_what_others_load_computes_and_writes_what_our_model_does(sources, tmp_path, form):
    """Every entry of the table that the format holds, in one process that loads them all."""
    B, T, new = SIZES[form]
    ids = torch.randint(3, WIDE["vocab_size"], (B, T), generator=torch.Generator().manual_seed(1))
    torch.save(ids, tmp_path / "ids.pt")
    truth = {}
    for source, pattern in [case[1:3] for case in TABLE if case[0] == form and not case[3]]:
        out = str(tmp_path / f"{source} {pattern}")
        growth.transfer(sources(source), out, pattern=pattern, format=form)
        ours = f"{out}.lci"
        growth.transfer(sources(source), ours, pattern=pattern)
        with quiet(), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(ours).eval()
            assert isinstance(model, LCIForCausalLM)
            text = model.generate(ids[:1, :6], max_new_tokens=new, min_new_tokens=new, do_sample=False)
            truth[out] = model(ids).logits, text
    run = [sys.executable, "-c", LOAD, str(ROOT), form, str(new), *truth]
    done = subprocess.run(run, cwd=tmp_path, env=os.environ | ALONE, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for out, (logits, text) in truth.items():
        kind, got, written = torch.load(f"{out}.pt")
        assert kind == {GRANITE: "GraniteMoeHybridForCausalLM", FLA: "RetNetForCausalLM"}[form]
        assert (got - logits).abs().max() <= 1e-5 * logits.abs().max().clamp(min=1), out
        assert written.shape == (1, 6 + new) and torch.equal(written, text), out


@pytest.mark.parametrize("form, source, pattern, field", [case for case in TABLE if case[-1]], ids=str)
def test_what_a_format_does_not_hold_is_refused_with_the_formats_that_do(
    sources, tmp_path, form, source, pattern, field
):
    with pytest.raises(
        Refusal, match=f"^{field}: expected .*, for the format {form}, got .*; write it as lci"
    ):
        growth.transfer(sources(source), tmp_path / "out", pattern=pattern, format=form)
    assert not [*tmp_path.iterdir()]


ROPE = {"rope_type": "default", "rope_theta": 1e4}
BEYOND = {
    GRANITE: (
        "SAS",
        {
            "norm": {"norm": "layer"},
            "norm_placement": {"norm_placement": "around"},
            "zero_centered_norms": {"zero_centered_norms": True},
            "use_parallel_residual": {"use_parallel_residual": True},
            "gated_mlp": {"gated_mlp": False},
            "mlp_bias": {"mlp_bias": True},
            "hidden_act": {"hidden_act": "gelu"},
            "qk_norm": {"qk_norm": "head"},
            "final_softcap": {"final_softcap": 30.0},
            "pattern": {"pattern": "SAM"},
            "attention_softcap": {"attention_softcap": 50.0},
            "scale_attention_by_layer": {"scale_attention_by_layer": True},
            "position_embedding_type": {"position_embedding_type": "learned"},
            "rope_parameters": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
            "no_rope_layers": {"pattern": "AAS", "no_rope_layers": [1, 2]},
            "expand": {"expand": 1.5},
            "time_step_limit": {"time_step_limit": (0.01, 0.1)},
        },
    ),
    FLA: (
        "RRR",
        {
            "norm": {"norm": "layer"},
            "norm_placement": {"norm_placement": "inside"},
            "zero_centered_norms": {"zero_centered_norms": True},
            "use_parallel_residual": {"use_parallel_residual": True},
            "gated_mlp": {"gated_mlp": False},
            "mlp_bias": {"mlp_bias": True},
            "hidden_act": {"hidden_act": "gelu"},
            "qk_norm": {"qk_norm": "all"},
            "final_softcap": {"final_softcap": 30.0},
            "pattern": {"pattern": "RRA"},
            "attention_bias": {"attention_bias": True},
            "attention_out_bias": {"attention_out_bias": True},
            "position_embedding_type": {"position_embedding_type": "none"},
            "rope_parameters": {"rope_parameters": ROPE | {"rope_theta": 5e5}},
            "no_rope_layers": {"no_rope_layers": [2]},
            "embedding_scale": {"embedding_scale": 8.0},
            "residual_scale": {"residual_scale": 0.5},
            "logits_scale": {"logits_scale": 0.25},
            "retention_head_dim": {"retention_head_dim": 320},
            "retention_learned_decay": {"retention_learned_decay": True},
            "retention_log_decay": {"retention_log_decay": [-0.1] * 4},
        },
    ),
}


def test_every_limit_of_a_format_is_tried_below():
    for form, (_, fields) in BEYOND.items():
        assert list(fields) == [limit.field for limit in FORMATS[form].limits]
    assert not FORMATS["lci"].limits and set(FORMATS) == {"lci", *BEYOND}


@pytest.mark.parametrize(
    "form, pattern, field, fields",
    [(form, pattern, field, x) for form, (pattern, cases) in BEYOND.items() for field, x in cases.items()],
    ids=str,
)
def test_each_field_beyond_a_format_is_named(form, pattern, field, fields):
    base = LCI | LLAMA_FRAME | {"pattern": pattern}
    within, beyond = LCIConfig(**base), LCIConfig(**base | fields)
    assert written(FORMATS[form], within).table() and written(FORMATS["lci"], beyond).table()
    with pytest.raises(Refusal, match=f"^{field}: expected "):
        written(FORMATS[form], beyond)


@pytest.mark.parametrize("form", [GRANITE, FLA])
def test_a_refusal_names_another_format_that_holds_it_all(form):
    other, pattern = {GRANITE: (FLA, "RRR"), FLA: (GRANITE, "SAS")}[form]
    with pytest.raises(Refusal, match=f"write it as lci or {other}$"):
        written(FORMATS[form], LCIConfig(**LCI | LLAMA_FRAME | {"pattern": pattern}))


def test_where_triton_runs_both_formats_are_loaded():
    assert LOADED == [GRANITE, FLA] or sys.platform != "linux"


def test_an_unknown_format_is_refused_and_nothing_is_written(sources, tmp_path):
    with pytest.raises(Refusal, match="^format: expected one of lci, granitemoehybrid, fla, got gguf"):
        growth.transfer(sources("llama"), tmp_path / "out", format="gguf")
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def hybrid(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("hybrid") / "out"
    growth.transfer(sources("llama"), out, pattern="SAS", format=GRANITE)
    return out


@pytest.mark.parametrize("source, scaling", [("llama", None), ("llama 3", LLAMA3)])
def test_a_native_configuration_says_in_older_words_what_transformers_reads(
    sources, tmp_path, source, scaling
):
    """SGLang reads rope_theta and rope_scaling, as transformers did."""
    growth.transfer(sources(source), tmp_path / "out", pattern="SAS", format=GRANITE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == (scaling or {"rope_theta": 1e4})["rope_theta"]
    older = config.pop("rope_scaling")
    assert older == (scaling and {name: x for name, x in scaling.items() if name != "rope_theta"})
    newer = config.pop("rope_parameters")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"rope_scaling": older}))
    read = AutoConfig.from_pretrained(tmp_path / "out")
    assert read.rope_parameters == newer and read.layer_types[:2] == ["linear_attention", "full_attention"]


def test_a_native_configuration_has_the_words_that_older_readers_know(hybrid):
    config = json.loads((hybrid / "config.json").read_text())
    assert config["architectures"] == ["GraniteMoeHybridForCausalLM"]
    assert config["layer_types"] == ["mamba", "attention", "mamba"]
    assert not {"auto_map", "time_step_limit", "head_dim"} & set(config)
    assert not [*hybrid.glob("*.py")]
    assert json.loads((hybrid / "growth.json").read_text())["format"] == GRANITE


@pytest.mark.parametrize(
    "form, pattern, there, absent",
    [
        ("lci", "SAS", ["trust_remote_code", "lcikernels"], ["vLLM", "import fla"]),
        (GRANITE, "SAS", ["vllm serve", "sglang"], ["trust_remote_code", "lcikernels", "import fla"]),
        (FLA, "RRR", ["import fla\nfrom transformers", "flash-linear-attention"], ["trust_remote", "vLLM"]),
    ],
)
def test_the_card_says_how_to_load_and_who_serves(sources, tmp_path, form, pattern, there, absent):
    growth.transfer(sources("llama"), tmp_path / "out", pattern=pattern, format=form)
    loading = (tmp_path / "out" / "README.md").read_text().partition("## Loading")[2]
    assert all(word in loading for word in there) and not any(word in loading for word in absent)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("growth check" in card.partition("Not measured yet: ")[2][:20]) is (form != FLA)


def test_heads_that_vllm_does_not_read_are_told_of(sources, tmp_path):
    report = growth.transfer(
        sources("mistral of wide heads"), tmp_path / "out", pattern="AAA", format=GRANITE, dry_run=True
    )
    assert any("vLLM and SGLang do not" in note for note in report.notes)


def test_rates_stay_in_float32_whatever_the_format(tmp_path):
    with quiet():
        src = SOURCES["llama"](tmp_path / "src", torch.bfloat16)
    report = growth.transfer(src, tmp_path / "out", pattern="SAS", format=GRANITE, dry_run=True)
    exact = {row.name.rpartition(".")[2] for row in report.plan.rows if row.dtype == "float32"}
    assert exact == {"A_log", "dt_bias"}


def test_a_bias_that_a_format_adds_is_zero(sources, tmp_path):
    report = growth.transfer(sources("qwen2"), tmp_path / "out", pattern="ASA", format=GRANITE)
    added = {row.name: row for row in report.plan.rows if "zero" in row.note}
    assert set(added) == {f"model.layers.{layer}.self_attn.o_proj.bias" for layer in (0, 2)}
    model = load_model(tmp_path / "out")
    assert not any(model.get_parameter(name).any() for name in added)


TURNING = ["llama linear", "llama dynamic", "llama yarn", "llama llama3", "phi3 longrope"]


@pytest.mark.parametrize("source", ["llama", *TURNING])
def test_attention_in_every_layer_of_another_class_gives_the_source_s_logits(sources, tmp_path, source):
    """Of 38 tokens, where what turns changes at 16."""
    growth.transfer(sources(source), tmp_path / "out", mixers="attention", format=GRANITE)
    agreement = growth.check(sources(source), tmp_path / "out", length=38)
    assert agreement.limit is not None and agreement.kept


def test_what_was_transferred_is_held_still_in_a_model_of_another_class(text, tmp_path):
    hybrid = tmp_path / "hybrid"
    with quiet():
        src = SOURCES["llama"](tmp_path / "src", vocab_size=256)
    growth.transfer(src, hybrid, pattern="SAS", format=GRANITE)
    growth.train(hybrid, text, tmp_path / "out", steps=2, batch_size=2, freeze="transferred", save_every=0)
    before, after = (load_model(folder).state_dict() for folder in (hybrid, tmp_path / "out"))
    layers = [json.loads((x / "config.json").read_text())["layer_types"] for x in (hybrid, tmp_path / "out")]
    assert layers[0] == layers[1] == ["mamba", "attention", "mamba"]
    same = {name for name, x in before.items() if torch.equal(x, after[name])}
    assert same == set(transferred(hybrid)) < set(before)


def test_a_model_whose_type_another_package_knows_is_refused_with_its_name(sources, tmp_path):
    growth.transfer(sources("llama"), tmp_path / "out", pattern="RRR", format=FLA)
    with pytest.raises(Refusal, match=re.escape("got 'retnet'; it is known in Python after `import fla`")):
        growth.check(sources("llama"), tmp_path / "out")


@pytest.mark.parametrize("file", [True, False])
def test_a_format_whose_cache_is_lost_generates_without_it(tmp_path, file):
    with quiet():
        src = SOURCES["llama"](tmp_path / "src")
    if not file:
        (src / "generation_config.json").unlink()
    growth.transfer(src, tmp_path / "out", pattern="RRR", format=FLA)
    files = ["config.json", *(["generation_config.json"] if file else [])]
    assert not any(json.loads((tmp_path / "out" / name).read_text())["use_cache"] for name in files)
    assert (tmp_path / "out" / "generation_config.json").exists() == file
