"""Mixtures of experts: out of dense models, out of smaller mixtures, and how the verbs read them."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from checkpoints import ALL, WIDE, inputs
from decoders import DECODERS
from exact import exact
from safetensors.torch import load_file
from transformers import LlamaConfig, ViTConfig, ViTForImageClassification

import growth
from growth import expand
from growth.__main__ import main
from growth.architecture import Experts
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.families import FAMILIES
from growth.inspection import inspect
from growth.loading import load_model, quiet
from growth.lossless import lost
from growth.methods import METHODS, Ligo, Upcycle
from growth.plan import Source
from growth.sizes import Sizes
from growth.targets import target_of
from growth.training.flops import count_flops
from growth.training.session import in_memory, whole

MOES = ("mixtral", "qwen2_moe", "qwen3_moe")
BECOMES = [
    ("llama", "mixtral"),
    ("llama", "qwen2_moe"),
    ("mistral", "mixtral"),
    ("mistral", "qwen2_moe"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name, dtype, fields -> the folder of such a checkpoint."""
    folders = {}

    def make(name, dtype=torch.float64, **fields):
        key = name, dtype, repr(fields)
        if key not in folders:
            with quiet():
                folders[key] = DECODERS.get(name, ALL.get(name))(
                    tmp_path_factory.mktemp("moe") / "src", dtype, **fields
                )
        return folders[key]

    return make


def grown(src, out, **options):
    """The report, the configuration, and how far logits are from the source's, in float64."""
    report = growth.grow(src, out, method=Upcycle(**options))
    assert report.lossless == (not report.notes)
    return report, Checkpoint(out).config, error(src, out)


def error(src, out):
    """How far logits are apart in float64, over the largest."""
    truth, got = (
        exact(load_model(x, torch.float64))(**inputs(Checkpoint(src).config)).logits for x in (src, out)
    )
    return ((got - truth).abs().max() / truth.abs().max()).item()


def command(monkeypatch, capsys, *words):
    """(exit code, standard output, standard error) of `growth WORDS`."""
    monkeypatch.setattr(sys, "argv", ["growth", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("name, target", BECOMES)
def test_the_experts_that_count_add_up_to_the_dense_model(made, tmp_path, name, target, G):
    report, config, apart = grown(made(name), tmp_path / "out", experts=4, granularity=G, format=target)
    assert report.lossless and apart < 1e-9
    assert config.model_type == target
    assert (config.num_experts, config.num_experts_per_tok) == (4 * G, 2 * G)
    told = " ".join(report.lines)
    assert f"{2 * G} of {4 * G} experts count, in 3 of 3 layers" in told
    assert ("one neuron, and writes zero at first" in told) == (target == "qwen2_moe")


@pytest.mark.parametrize("experts, top_k", [(1, None), (3, 1), (5, 5)])
def test_any_number_of_experts_may_count(made, tmp_path, experts, top_k):
    report, config, apart = grown(made("llama"), tmp_path / "out", experts=experts, top_k=top_k)
    assert report.lossless and apart < 1e-9 and config.num_experts_per_tok == (top_k or 1)


@pytest.mark.parametrize("turn", ["linear", "dynamic", "yarn", "llama3"])
def test_rotary_positions_of_every_kind_come_along(made, tmp_path, turn):
    for target in ("mixtral", "qwen2_moe"):
        report, _, apart = grown(made(f"llama {turn}"), tmp_path / target, format=target)
        assert report.lossless and apart < 1e-9


@pytest.mark.parametrize(
    "name, fields",
    [
        ("llama", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
        ("mistral", {"head_dim": 24, "sliding_window": None}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    ],
)
def test_settings_of_the_dense_model_come_along(made, tmp_path, name, fields):
    report, _, apart = grown(made(name, **fields), tmp_path / "out", granularity=2)
    assert report.lossless and apart < 1e-9


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_every_other_layer_may_stay_dense(made, tmp_path, name):
    report, _, apart = grown(made(name), tmp_path / "out", every=2, granularity=2)
    assert report.lossless and apart < 1e-9
    sparse = {row.name.split(".")[2] for row in report.plan.rows if ".experts." in row.name}
    dense = {row.name.split(".")[2] for row in report.plan.rows if ".mlp.gate_proj" in row.name}
    assert (sparse, dense) == ({"1"}, {"0", "2"})
    # In another order of layers every other one is another one.
    deeper = growth.grow(tmp_path / "out", tmp_path / "deeper", num_layers=5)
    assert deeper.lossless and error(tmp_path / "out", tmp_path / "deeper") < 1e-9
    assert Checkpoint(tmp_path / "deeper").config.mlp_only_layers == [0, 3, 4]


def test_shards_and_rows_of_the_router_lie_in_groups(made, tmp_path):
    src = made("qwen3", torch.float32)
    growth.grow(src, tmp_path / "out", method=Upcycle(experts=3, granularity=2, router_std=0.5), seed=3)
    old, new = (load_file(folder / "model.safetensors") for folder in (src, tmp_path / "out"))
    mlp = "model.layers.1.mlp"
    for e in range(6):
        half = slice(48 * (e % 2), 48 * (e % 2) + 48)
        for name in ("gate_proj", "up_proj"):
            assert torch.equal(new[f"{mlp}.experts.{e}.{name}.weight"], old[f"{mlp}.{name}.weight"][half])
        down = old[f"{mlp}.down_proj.weight"][:, half]
        assert torch.equal(new[f"{mlp}.experts.{e}.down_proj.weight"], 2 * down)
    router = new[f"{mlp}.gate.weight"]
    assert torch.equal(router[0::2], router[1::2]) and router[0::2].unique(dim=0).shape[0] == 3
    assert abs(router.std().item() - 0.5) < 0.1
    assert not torch.equal(router, new["model.layers.2.mlp.gate.weight"])


def test_the_record_says_what_every_expert_is_made_of(made, tmp_path):
    growth.grow(made("qwen2"), tmp_path / "out", method=Upcycle(experts=2))
    record = json.loads((tmp_path / "out" / "growth.json").read_text())
    rows = {row["name"]: row for row in record["tensors"]}
    options = ("experts", "top_k", "granularity", "router_std", "noise", "every")
    assert [record[name] for name in options] == [2, 2, 1, 0.02, 0.0, 1]
    assert record["method"] == "upcycle" and record["lossless"]
    for e in range(2):
        row = rows[f"model.layers.2.mlp.experts.{e}.up_proj.weight"]
        assert (row["origin"], row["sources"]) == ("copied", ["model.layers.2.mlp.up_proj.weight"])
    router, shared = (rows[f"model.layers.0.mlp.{x}.weight"] for x in ("gate", "shared_expert.down_proj"))
    assert router["origin"] == shared["origin"] == "initialised"
    assert (router["note"], shared["note"]) == (
        "normal numbers of deviation 0.02",
        "zero: it changes nothing at first",
    )
    assert record["dropped"] == {}


def test_the_shared_expert_learns_though_it_is_silent(made, tmp_path):
    growth.grow(made("qwen2", torch.float32), tmp_path / "out", method=Upcycle(experts=2))
    model = load_model(tmp_path / "out")
    ids = torch.randint(3, 61, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.shared_expert.down_proj.weight.grad.abs().max() > 0
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() == 0  # while experts are alike


def test_noise_parts_experts_and_is_told(made, tmp_path):
    report, _, apart = grown(made("llama"), tmp_path / "out", experts=3, granularity=2, noise=0.1)
    assert report.notes == ("layers.*.mlp.experts: noise of 0.1 of their deviation parts the copies",)
    assert apart > 1e-4
    new = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("w1", "w2", "w3"):
        one, other = (new[f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight"] for e in (0, 2))
        assert abs((other - one).std() / one.std() - 0.1) < 0.01


@pytest.mark.parametrize("name", MOES)
def test_twice_the_experts_of_which_twice_as_many_count_are_the_same_model(made, tmp_path, name):
    report, config, apart = grown(made(name), tmp_path / "out", noise=0.0)
    assert report.lossless and apart < 1e-9
    assert (config.num_experts, config.num_experts_per_tok) == (10, 4)
    report, config, apart = grown(made(name), tmp_path / "three", experts=15, noise=0.0)
    assert report.lossless and apart < 1e-9 and config.num_experts_per_tok == 6


@pytest.mark.parametrize("name", MOES)
def test_copied_experts_are_parted_by_a_hundredth_of_their_deviation(made, tmp_path, name):
    report, _, apart = grown(made(name), tmp_path / "out")
    assert not report.lossless and 1e-6 < apart < 0.1
    read = Source(Checkpoint(tmp_path / "out"))
    for part in ("gate", "up", "down"):
        one, copy = (
            read.raw(f"layers.{{}}.mlp.experts.{e}.{part}.weight", 2 - (name[4] == "3")) for e in (1, 6)
        )
        assert abs((copy - one).std() / one.std() - 0.01) < 0.001
    router = read.raw("layers.{}.mlp.router.weight", 2 - (name[4] == "3"))
    assert torch.equal(router[:5], router[5:])


def test_another_share_of_the_experts_is_lost_and_told(made, tmp_path):
    report, _, apart = grown(made("mixtral"), tmp_path / "out", experts=10, top_k=2, noise=0.0)
    assert report.notes == ("layers.*.mlp.experts: 2 of 10 experts count where 2 of 5 did",)
    assert apart > 1e-4


def plant(change):
    """What is judged lost where a change is made to the maps of a Llama cut in two."""
    source = FAMILIES["llama"].model(LlamaConfig(**WIDE))
    target, method = target_of(source, Sizes(), Upcycle(experts=2, top_k=1, granularity=2))
    old, new = source.architecture, target.architecture
    return lost(old, new, change(method.maps(old, new)))


def shards_of_half(maps):
    wires = {name: replace(of, share=(1.0,) * len(of.share)) for name, of in maps.wires.items()}
    return replace(maps, wires=wires)


def rows_apart(maps):
    return replace(maps, drawn={name: replace(of, each=1) for name, of in maps.drawn.items()})


def another_block(maps):
    name = "layers.{}.mlp.experts.1.down.weight"
    return replace(maps, made_of=maps.made_of | {name: "layers.{}.mixer.o.weight"})


def test_a_cut_that_adds_up_is_judged_lossless():
    assert plant(lambda maps: maps) == []


@pytest.mark.parametrize("change", [shards_of_half, rows_apart, another_block])
def test_a_cut_that_does_not_add_up_is_found_in_the_maps(change):
    assert plant(change) == [
        "layers.*.mlp.experts: 2 of 4 experts do not add up to the block that they were made of"
    ]


def test_blocks_of_any_size_make_the_same_files(made, tmp_path, monkeypatch):
    options = {"experts": 2, "granularity": 2}
    growth.grow(made("llama"), tmp_path / "one", method=Upcycle(**options))
    monkeypatch.setattr(expand, "BLOCK", 500)
    growth.grow(made("llama"), tmp_path / "many", method=Upcycle(**options))
    one, many = (load_file(tmp_path / x / "model.safetensors") for x in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_kept_to_the_last(made, tmp_path, dtype):
    """G is a power of two, so that nothing is rounded."""
    growth.grow(made("llama", getattr(torch, dtype)), tmp_path / "out", method=Upcycle(granularity=2))
    assert growth.check(made("llama", getattr(torch, dtype)), tmp_path / "out").kept


@pytest.mark.parametrize("name", MOES)
def test_check_and_generate_read_what_grew(made, tmp_path, name):
    src = made(name, torch.float32)
    growth.grow(
        src, tmp_path / "out", hidden_size=112, num_layers=5, ffn_size=101
    )  # rows of no whole 16 bytes
    agreement = growth.check(src, tmp_path / "out", generate=4)
    assert agreement.kept and agreement.limit


def test_a_mixture_in_float64_is_checked(made, tmp_path):
    growth.grow(made("llama"), tmp_path / "out", method=Upcycle())
    agreement = growth.check(made("llama"), tmp_path / "out")
    assert agreement.stored_dtype == "float64" and agreement.kept


@pytest.mark.parametrize("name", MOES)
def test_products_of_all_experts_at_once_are_counted(made, name):
    model = load_model(made(name, torch.float32))
    ids = torch.randint(3, 61, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    together = count_flops(model, batch)
    model.set_experts_implementation("eager")
    assert together == count_flops(model, batch) > 0


@pytest.mark.parametrize("name", MOES)
def test_every_tensor_on_disk_is_found_in_memory(made, name):
    checkpoint = Checkpoint(made(name, torch.float32))
    model = load_model(checkpoint.path)
    found = in_memory(model, checkpoint)
    assert found.keys() == {*checkpoint.names}
    assert {*found.values()} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_what_was_upcycled_trains_on_and_what_was_copied_at_another_rate(made, tmp_path, name, text):
    growth.grow(made(name, torch.float32, vocab_size=256), tmp_path / "moe", method=Upcycle(experts=3))
    options = {"steps": 3, "batch_size": 2, "sequence_length": 16, "eval_every": 3, "learning_rate": 1e-2}
    ends = []
    for rate in (None, 1e-9):
        report = growth.train(tmp_path / "moe", text, tmp_path / f"{rate}", copied_rate=rate, **options)
        ends.append(load_file(tmp_path / f"{rate}" / "model.safetensors"))
        assert report.curve[-1].loss < report.curve[0].loss or rate
    start = load_file(tmp_path / "moe" / "model.safetensors")
    rows = json.loads((tmp_path / "moe" / "growth.json").read_text())["tensors"]
    for row in rows:
        moved, held = ((end[row["name"]] - start[row["name"]]).abs().max() for end in ends)
        # The router of experts that are alike learns once these part.
        assert moved > 1e-4 or "gate.weight" in row["name"]
        assert row["origin"] != "copied" or held < 1e-6


class PowerCut(Exception):
    pass


def test_a_resumed_run_of_a_mixture_ends_like_an_unbroken_one(made, tmp_path, monkeypatch, text):
    growth.grow(made("qwen2", torch.float32, vocab_size=256), tmp_path / "moe", method=Upcycle(noise=0.1))
    options = {"steps": 4, "batch_size": 2, "sequence_length": 16, "eval_every": 2, "save_every": 2}

    def cut(self, now):
        if now == 3:
            raise PowerCut

    growth.train(tmp_path / "moe", text, tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr("growth.training.progress.RunProgress.step", cut)
        growth.train(tmp_path / "moe", text, tmp_path / "cut", **options)
    growth.train(tmp_path / "moe", text, tmp_path / "cut", **options, resume=True)
    one, other = (load_file(tmp_path / x / "model.safetensors") for x in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_share_of_the_experts_is_not_held_still(made, tmp_path, text):
    growth.grow(made("mixtral", torch.float32, vocab_size=256), tmp_path / "moe", method=Upcycle())
    message = "copied-rate: expected all or none of the 20 tensors that .*experts.gate_up_proj is made of"
    with pytest.raises(Refusal, match=message):
        growth.train(tmp_path / "moe", text, tmp_path / "out", steps=2, copied_rate=0.3, sequence_length=16)
    assert {path.name for path in tmp_path.iterdir()} == {"moe"}


def test_all_experts_of_a_layer_are_held_still_together():
    memory = {"a.0": "a", "a.1": "a", "b": "c"}
    assert whole("freeze", ["a.1", "b", "a.0", "x"], memory) == ["a", "c", "x"]
    with pytest.raises(Refusal, match="freeze: expected all or none of the 2 tensors"):
        whole("freeze", ["a.1"], memory)


def test_inspect_tells_what_can_be_upcycled(made):
    told = {name: [*inspect(made(name)).lines()] for name in ("llama", "llama with biases, tied", "mixtral")}
    assert "grow: experts 0 to any number, as mixtral, by upcycle" in told["llama"]
    assert any("experts 0 do not grow: attention_bias: " in x for x in told["llama with biases, tied"])
    assert "grow: experts 5 to any multiple of 5, by upcycle" in told["mixtral"]


def test_methods_that_learn_take_no_experts(made, text):
    with pytest.raises(Refusal, match="ligo: expected layers without experts"):
        growth.grow(made("qwen3_moe"), method=Ligo(data=str(text)), num_layers=4, dry_run=True)


@pytest.mark.parametrize("method, sizes", [("msg", {"hidden_size": 128}), ("gradmax", {"ffn_size": 128})])
def test_methods_that_watch_modules_take_no_experts(made, text, method, sizes):
    given = METHODS[method](data=str(text)) if method == "gradmax" else method
    with pytest.raises(Refusal, match=f"{method}: expected layers without experts"):
        growth.grow(made("mixtral"), method=given, dry_run=True, **sizes)


@pytest.mark.parametrize(
    "name, method", [("qwen2_moe", "lemon"), ("mixtral", Upcycle()), ("llama", Upcycle())]
)
def test_training_goes_on_with_the_moments_of_experts(made, tmp_path, text, name, method):
    options = {"steps": 2, "batch_size": 2, "sequence_length": 16, "keep_optimizer": True}
    growth.train(made(name, torch.float32, vocab_size=256), text, tmp_path / "src", **options)
    sizes = {"hidden_size": 128, "num_layers": 4} if method == "lemon" else {}
    growth.grow(tmp_path / "src", tmp_path / "out", method=method, optimizer=tmp_path / "src", **sizes)
    told = growth.train(tmp_path / "out", text, tmp_path / "on", resume=True, **options)
    assert "after 2 steps" in told.settings["moments"]
    steps = [int(x["step"]) for x in torch.load(tmp_path / "on/optimizer.pt")["state"].values()]
    new = any("copied" not in str(method) and x == 2 for x in steps)  # an added layer's, or a new router's
    assert 4 in steps and new == (name != "mixtral")


REFUSALS = {
    "too few experts": ("llama", ["--experts", 0], "experts: expected at least 1, got 0"),
    "too many that count": (
        "llama",
        ["--experts", 4, "--top-k", 5],
        "top-k: expected at most the 4 experts, got 5",
    ),
    "none that count": ("llama", ["--top-k", 0], "top-k: expected at least 1, got 0"),
    "shards that do not divide": ("llama", ["--granularity", 5], "granularity: expected a divisor of the 96"),
    "no shard": ("llama", ["--granularity", 0], "granularity: expected at least 1"),
    "a router of zeros": ("llama", ["--router-std", 0], "router-std: expected more than 0"),
    "noise below 0": ("llama", ["--noise", -1], "noise: expected at least 0.0, and finite, got -1.0"),
    "another format": (
        "llama",
        ["--format", "olmoe"],
        "format: expected one of mixtral, qwen2_moe, qwen3_moe",
    ),
    "a format that the family does not become": (
        "qwen3",
        ["--format", "mixtral"],
        "format: expected qwen3_moe",
    ),
    "biases": (
        "llama with biases, tied",
        [],
        "attention_bias: expected false, for mixtral has no such biases",
    ),
    "biases in qwen2_moe": (
        "llama with biases, tied",
        ["--format", "qwen2_moe"],
        "attention_bias: expected false, for qwen2_moe",
    ),
    "windows in some layers": ("qwen3 with windows", [], "layer_types: expected layers alike"),
    "dense layers in mixtral": (
        "llama",
        ["--every", 2],
        "every: expected 1, for mixtral has experts in every",
    ),
    "no sparse layer": ("qwen2", ["--every", 4], "every: expected at most the 3 layers, got 4"),
    "a width too": ("llama", ["--hidden-size", 128], "hidden-size: expected none, for upcycle leaves sizes"),
    "layers too": ("llama", ["--num-layers", 4], "num-layers: expected none, for upcycle leaves sizes"),
    "T5": ("t5", [], "got t5; switch_transformers, the one such type"),
    "another family": (
        "gpt_neox",
        [],
        "upcycle: expected a checkpoint of one of: llama, mistral, qwen2, qwen3, ",
    ),
    "ViT": ("vit", [], "got vit; transformers has no V-MoE"),
    "fewer experts": ("mixtral", ["--experts", 4], "experts: expected a multiple of the source's 5, got 4"),
    "as many experts": ("mixtral", ["--experts", 5], "experts: expected a multiple of the source's 5, got 5"),
    "a mixture cut": ("mixtral", ["--granularity", 2], "granularity: expected 1, for the source has experts"),
    "a mixture's router": (
        "mixtral",
        ["--router-std", 1],
        "router-std: expected none, for the router is copied",
    ),
    "some layers of a mixture": (
        "qwen3_moe",
        ["--every", 2],
        "every: expected 1, for the source has experts",
    ),
    "a mixture as another": ("mixtral", ["--format", "qwen2_moe"], "format: expected mixtral"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_cannot_be_upcycled_is_one_line_and_writes_nothing(made, tmp_path, monkeypatch, capsys, why):
    name, words, message = REFUSALS[why]
    if name == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        src = tmp_path / "vit"
        ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(src)
    else:
        src = made(name)
    capsys.readouterr()
    code, out, err = command(
        monkeypatch, capsys, "grow", src, tmp_path / "out", "--method", "upcycle", *words
    )
    assert code == 2 and err.count("\n") == 1 and message in err, err
    assert not out and not (tmp_path / "out").exists()


def test_a_whole_number_is_asked_for():
    with pytest.raises(Refusal, match="experts: expected a whole number, got 8.0"):
        Upcycle(experts=8.0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: expected 1 to the 5 experts, got 9"),
        (
            {"shared_expert_intermediate_size": 0},
            "shared_expert_intermediate_size: expected at least 1, got 0",
        ),
        ({"num_experts": 0}, "num_experts: expected at least 1, got 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: expected at least 1, got 0"),
        ({"mlp_only_layers": [0, 1, 2]}, "layers: expected one with experts at least"),
    ],
)
def test_mixtures_that_no_table_describes_are_refused(made, tmp_path, fields, message):
    name = "qwen2_moe" if "shared_expert_intermediate_size" in fields else "qwen3_moe"
    folder = shutil.copytree(made(name), tmp_path / "src")
    config = json.loads((folder / "config.json").read_text())
    if "num_experts" in fields:
        fields = {"num_local_experts": 0}
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(Refusal, match=message):
        Source(Checkpoint(folder))


def test_the_table_holds_one_mixture_a_layer(made):
    model = Source(Checkpoint(made("qwen2_moe"))).model.architecture
    (mixture,) = {op for op in model.all_ops if isinstance(op, Experts)}
    assert (mixture.top_k, mixture.normalised, len(mixture.neurons)) == (2, False, 5)
    assert model.wires["expert4.ffn.{}"].size == 48 and model.wires["shared.ffn.{}"].size == 32
