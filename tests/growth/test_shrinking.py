"""growth shrink: what stays is what scores say, as it was; nothing runs twice; what cannot be is refused."""

import json
import sys

import pytest
import torch
from checkpoints import ALL, inputs, neox
from safetensors.torch import load_file, save_file

import growth
from growth.__main__ import main
from growth.architecture import Experts
from growth.card import CARD
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import load_model, quiet
from growth.plan import Source
from growth.shrinking import calibration
from growth.shrinking.bonds import Bonds
from growth.shrinking.streaming import Streamed
from growth.sizes import sizes_of
from growth.training.data import Windows

WEIGHTS = "model.safetensors"
MLP = "gpt_neox.layers.{}.mlp.dense_{}.weight"


def rescaled(folder, factors):
    """The checkpoint with rows or columns of these tensors multiplied: name -> (axis, indices, factor)."""
    tensors = load_file(folder / WEIGHTS)
    for name, (axis, index, factor) in factors.items():
        tensors[name].index_copy_(
            axis, torch.tensor(index), tensors[name].index_select(axis, torch.tensor(index)) * factor
        )
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def run(monkeypatch, capsys, *words):
    """(exit code, standard output, standard error) of `growth WORDS`."""
    monkeypatch.setattr(sys, "argv", ["growth", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def record(folder):
    return json.loads((folder / "growth.json").read_text())


def kept(folder, wire, layer):
    return next(x["kept"] for x in record(folder)["units"] if wire in x["wires"] and x["layer"] == layer)


@pytest.mark.parametrize("name", ALL)
def test_every_family_shrinks_to_the_sizes_that_are_asked_for_and_runs(name, tmp_path):
    with quiet():
        ALL[name](tmp_path / "src")
    have = sizes_of(Source(Checkpoint(tmp_path / "src")).model)
    report = growth.shrink(tmp_path / "src", tmp_path / "dst", growth.Sizes(have.hidden // 2, 2))
    got = sizes_of(Source(Checkpoint(tmp_path / "dst")).model)
    assert (got.hidden, got.layers, got.ffn) == (have.hidden // 2, 2, have.ffn // 2)
    assert report.parameters[1] < report.parameters[0] and not report.lossless
    with torch.no_grad(), quiet():
        model = load_model(tmp_path / "dst").eval()
        assert model(**inputs(model.config))[0].isfinite().all()


def test_layers_that_are_named_stay_as_they_are(source, tmp_path):
    growth.shrink(source, tmp_path / "dst", layers=[2, 0])
    want, got = load_file(source / WEIGHTS), load_file(tmp_path / "dst" / WEIGHTS)
    for name, x in got.items():
        origin = name.replace("layers.1.", "layers.2.")
        assert torch.equal(x, want[origin]), name
    assert record(tmp_path / "dst")["layers"] == [{"stack": "", "kept": [0, 2], "scores": None}]


def test_the_layer_of_the_smallest_matrices_goes_wherever_it_stands(tmp_path):
    for weak in range(3):
        folder = neox(tmp_path / f"src{weak}")
        names = [name for name in load_file(folder / WEIGHTS) if f"layers.{weak}." in name]
        rescaled(folder, {name: (0, range(len(load_file(folder / WEIGHTS)[name])), 0.5) for name in names})
        growth.shrink(folder, tmp_path / f"dst{weak}", num_layers=2)
        assert record(tmp_path / f"dst{weak}")["layers"][0]["kept"] == [i for i in range(3) if i != weak]


def test_neurons_of_the_largest_product_of_norms_stay_in_their_order(tmp_path):
    folder, strong = neox(tmp_path / "src"), list(range(1, 160, 4))
    rescaled(
        folder,
        {
            MLP.format(1, "h_to_4h"): (0, strong, 0.2),
            MLP.format(1, "4h_to_h"): (1, strong, 50.0),
        },
    )
    growth.shrink(folder, tmp_path / "dst", ffn_size=40)
    assert kept(tmp_path / "dst", "ffn.{}", 1) == strong
    want, got = load_file(folder / WEIGHTS), load_file(tmp_path / "dst" / WEIGHTS)
    up, down = MLP.format(1, "h_to_4h"), MLP.format(1, "4h_to_h")
    assert torch.equal(got[up], want[up][strong]) and torch.equal(got[down], want[down][:, strong])


def test_channels_are_chosen_once_for_all_layers(tmp_path):
    folder, strong = neox(tmp_path / "src"), [*range(24), *range(72, 96)]
    tensors = load_file(folder / WEIGHTS)
    wide = [name for name, x in tensors.items() if x.ndim == 2]
    reads = [name for name in wide if "query_key_value" in name or "h_to_4h" in name or "embed" in name]
    rescaled(folder, dict.fromkeys(reads, (1, strong, 9.0)))
    growth.shrink(folder, tmp_path / "dst", hidden_size=48)
    assert kept(tmp_path / "dst", "residual", None) == strong


def test_heads_go_by_whole_groups_or_evenly_inside_them(tmp_path):
    make = ALL["llama"](tmp_path / "src", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    growth.shrink(make, tmp_path / "groups", num_heads=4)
    growth.shrink(make, tmp_path / "inside", num_heads=4, num_kv_heads=4)
    for layer in range(3):
        heads, groups = (kept(tmp_path / "groups", f"{x}.{{}}", layer) for x in ("query", "key"))
        assert heads == [2 * g + i for g in groups for i in range(2)]
        inside = kept(tmp_path / "inside", "query.{}", layer)
        assert [head // 2 for head in inside] == [0, 1, 2, 3]


def test_fewer_groups_for_as_many_heads_are_the_means_of_neighbours(tmp_path):
    make = ALL["llama with biases, tied"](tmp_path / "src", num_key_value_heads=4)
    report = growth.shrink(make, tmp_path / "dst", num_kv_heads=2)
    want, got = load_file(make / WEIGHTS), load_file(tmp_path / "dst" / WEIGHTS)
    for part in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        name = f"model.layers.1.self_attn.{part}"
        pairs = want[name].unflatten(0, (2, 2, 16))
        assert torch.allclose(got[name], pairs.mean(1).flatten(0, 1), atol=1e-7)
    assert any("2 means of 4" in note for note in report.notes)
    assert torch.equal(*(x["model.layers.1.self_attn.q_proj.weight"] for x in (want, got)))


def test_lists_of_layers_and_of_heads_follow_what_stays(tmp_path):
    qwen = ALL["qwen2"](tmp_path / "qwen2")
    growth.shrink(qwen, tmp_path / "q", layers=[1, 2])
    assert Checkpoint(tmp_path / "q").config.layer_types == ["sliding_attention", "full_attention"]
    lci = ALL["lci around RWA"](tmp_path / "lci", retention_learned_decay=False)
    growth.shrink(lci, tmp_path / "l", hidden_size=32, layers=[0, 1])
    config = Checkpoint(tmp_path / "l").config
    heads = kept(tmp_path / "l", "retention.query.{}", None)
    from lcikernels.layers.retention import log_decays

    assert config.pattern == "RW" and config.no_rope_layers == [1]
    assert config.retention_log_decay == [log_decays(4, None).tolist()[i] for i in heads]


def test_a_hybrid_keeps_a_layer_of_each_kind(tmp_path):
    layers = ["mamba", "mamba", "attention"]
    make = ALL["granitemoehybrid"](tmp_path / "src", layer_types=layers)
    growth.shrink(make, tmp_path / "dst", num_layers=2)
    assert set(Checkpoint(tmp_path / "dst").config.layer_types) == {"linear_attention", "full_attention"}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_the_experts_that_tokens_choose_stay_with_their_rows_of_the_router(name, tmp_path, text):
    make, cache = ALL[name](tmp_path / "src", vocab_size=256), tmp_path / "cache"
    report = growth.shrink(
        make, tmp_path / "dst", experts=1, score="activation", data=text, merge=False, cache=cache
    )
    want, got = load_file(make / WEIGHTS), load_file(tmp_path / "dst" / WEIGHTS)
    config = Checkpoint(tmp_path / "dst").config
    assert (config.num_experts, config.num_experts_per_tok) == (1, 1)
    moes = [x for x in record(tmp_path / "dst")["units"] if x["wires"] == ["experts.{}"]]
    assert len(moes) == (3 if name == "mixtral" else 2) and "4 of 5 left out" in " ".join(report.notes)
    for row in moes:
        (best,), layer = row["kept"], row["layer"]
        assert row["scores"][best] == max(row["scores"]) and sum(row["scores"]) == pytest.approx(2)
        mlp = f"model.layers.{layer}." + ("block_sparse_moe" if name == "mixtral" else "mlp")
        down = "w2" if name == "mixtral" else "down_proj"
        a, b = f"{mlp}.experts.{best}.{down}.weight", f"{mlp}.experts.0.{down}.weight"
        assert torch.equal(got[b], want[a])
        assert torch.equal(got[f"{mlp}.gate.weight"], want[f"{mlp}.gate.weight"][best : best + 1])


@pytest.mark.parametrize("name", ["gpt2", "phi3", "bert", "t5 1.1", "lci SMA", "lci inside WRS"])
def test_a_model_that_streams_computes_the_same_with_a_layer_in_memory_at_a_time(name, tmp_path):
    with quiet():
        folder = ALL[name](tmp_path / "src")
    source = Source(Checkpoint(folder))
    streamed, most = Streamed(source, torch.device("cpu")), 0
    layers = [layer for stack in streamed.layers.values() for layer in stack]

    def count(*_):
        nonlocal most
        full = [any(not x.is_meta and x.ndim > 1 for x in layer.parameters()) for layer in layers]
        tables = source.family.model_type == "t5"  # first layers hold the biases by distance of all
        most = max(most, sum(full) - (2 if tables else 0))

    for layer in layers:
        layer.register_forward_hook(count, prepend=True)
    given = inputs(source.config)
    with torch.no_grad(), quiet():
        got, want = streamed.model(**given)[0], load_model(folder).eval()(**given)[0]
    assert streamed.streams and torch.equal(got, want) and most == 1


@pytest.mark.parametrize("name", ALL)
def test_every_place_that_matrices_read_is_seen(name, tmp_path):
    with quiet():
        folder = ALL[name](tmp_path / "src")
    source = Source(Checkpoint(folder))
    bonds = Bonds(source.model.architecture)
    windows = Windows(torch.randint(3, 61, (64,), generator=torch.Generator().manual_seed(0)), 16)
    found = calibration.calibrated(source, bonds, windows, False, tmp_path / "cache")
    unseen = {site.name for site in bonds.sites if site not in found}
    for layer, op in ((layer, op) for layer, ops in bonds.ops() for op in ops if isinstance(op, Experts)):
        idle = (found.chosen(bonds.router(op), layer) == 0).nonzero()[:, 0].tolist()
        unseen -= {f"{op.name}.{e}.down.weight".format(layer) for e in idle}  # no token chooses these
    assert not unseen
    assert all(len(rows) == 3 and all(rows) for rows in found.layers.values())


def test_one_calibration_serves_many_targets(tmp_path, text, monkeypatch):
    folder, cache = neox(tmp_path / "src"), tmp_path / "cache"
    first = growth.shrink(folder, tmp_path / "a", ffn_size=80, score="activation", data=text, cache=cache)
    assert first.details["calibration"]["cached"] is False
    ran = []
    monkeypatch.setattr(Streamed, "run", lambda self, inputs: ran.append(1))
    for name, sizes in {"b": {"hidden_size": 48}, "c": {"num_layers": 1}, "d": {"ffn_size": 80}}.items():
        for score in ("activation", "redundancy"):
            report = growth.shrink(
                folder, tmp_path / f"{name}{score}", data=text, score=score, cache=cache, **sizes
            )
            assert report.details["calibration"]["cached"] is True
    assert not ran
    same = (load_file(tmp_path / x / WEIGHTS) for x in ("a", "dactivation"))
    assert all(torch.equal(x, y) for x, y in zip(*(x.values() for x in same), strict=True))
    monkeypatch.undo()
    other = tmp_path / "other.txt"
    other.write_text("five boxing wizards jump quickly. " * 200)
    for given in ({"data": other}, {"data": text, "windows": 3}, {"data": text, "sequence_length": 16}):
        report = growth.shrink(
            folder, None, ffn_size=80, score="activation", cache=cache, dry_run=True, **given
        )
        assert report.details["calibration"]["cached"] is False


@pytest.mark.parametrize("name", ["vectors.safetensors", "moments-1.safetensors", "calibration.json"])
def test_a_damaged_cache_is_made_again(name, tmp_path, text):
    folder, cache = neox(tmp_path / "src"), tmp_path / "cache"
    half = b'{"layers": {}, "moments": {}, "alone": []}'
    for out, damage in {"a": b"nothing", "b": half, "c": b""}.items():
        report = growth.shrink(folder, tmp_path / out, hidden_size=48, data=text, cache=cache)
        assert report.details["calibration"]["cached"] is False
        (file,) = cache.rglob(name)
        file.write_bytes(damage)


def test_a_neuron_that_never_fires_goes_by_activation_however_large_its_weights(tmp_path, text):
    folder, quiet_ones = neox(tmp_path / "src"), list(range(0, 160, 2))
    rescaled(folder, {MLP.format(1, "4h_to_h"): (1, quiet_ones, 90.0)})
    tensors = load_file(folder / WEIGHTS)
    tensors[MLP.format(1, "h_to_4h")][quiet_ones] = 0.0
    tensors[MLP.format(1, "h_to_4h").replace("weight", "bias")][quiet_ones] = 0.0
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    growth.shrink(folder, tmp_path / "dst", ffn_size=80, score="activation", data=text, cache=tmp_path / "c")
    assert kept(tmp_path / "dst", "ffn.{}", 1) == list(range(1, 160, 2))


def test_merging_brings_a_model_closer_to_its_source(tmp_path, text):
    folder, far = ALL["llama"](tmp_path / "src", vocab_size=256), {}
    for merge in (True, False):
        growth.shrink(
            folder, tmp_path / f"{merge}", ffn_size=64, data=text, merge=merge, cache=tmp_path / "cache"
        )
        far[merge] = growth.check(folder, tmp_path / f"{merge}", text=text).float32
    assert far[True] < 0.8 * far[False]


def test_a_removed_units_mean_goes_into_the_bias_where_there_is_one(tmp_path, text):
    folder = neox(tmp_path / "src")
    tensors = load_file(folder / WEIGHTS)
    up = MLP.format(1, "h_to_4h")
    tensors[up][80:] = 0.0  # these neurons say the same of every token
    tensors[up.replace("weight", "bias")][80:] = 1.0
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    growth.shrink(folder, tmp_path / "dst", ffn_size=159, data=text, cache=tmp_path / "cache")
    assert 80 <= min(set(range(160)) - set(kept(tmp_path / "dst", "ffn.{}", 1)))
    down = MLP.format(1, "4h_to_h").replace("weight", "bias")
    gone = min(set(range(160)) - set(kept(tmp_path / "dst", "ffn.{}", 1)))
    moved = load_file(tmp_path / "dst" / WEIGHTS)[down] - tensors[down]
    told = torch.nn.functional.gelu(torch.tensor(1.0)) * tensors[MLP.format(1, "4h_to_h")][:, gone]
    assert torch.allclose(moved, told, atol=1e-5)


def test_the_record_the_card_and_check_tell_what_shrink_did(source, tmp_path):
    growth.grow(source, tmp_path / "large", num_layers=4)
    growth.shrink(tmp_path / "large", tmp_path / "dst", num_layers=2, ffn_size=80)
    found = record(tmp_path / "dst")
    assert (found["verb"], found["method"], found["lossless"]) == ("shrink", "magnitude", False)
    assert [x["verb"] for x in found["lineage"]] == ["grow"]
    scores = found["layers"][0]["scores"]
    assert len(scores) == 4 and {scores[i] for i in found["layers"][0]["kept"]} == set(sorted(scores)[2:])
    for row in found["units"]:
        assert row["score_kept"] > row["score_dropped"]
    card = (tmp_path / "dst" / CARD).read_text()
    assert "`growth shrink`, method magnitude" in card and "before that, `growth grow`" in card
    agreement = growth.check(tmp_path / "large", tmp_path / "dst")
    assert (
        agreement.kept
        and agreement.limit is None
        and "2 of 4 left out" in str(agreement).replace("1, 3", "2")
    )
    growth.grow(tmp_path / "dst", tmp_path / "again", num_layers=3)
    assert [x["verb"] for x in record(tmp_path / "again")["lineage"]] == ["grow", "shrink"]


def test_what_a_headless_model_gives_is_compared_by_the_channels_that_stay(tmp_path):
    make = ALL["bert headless"](tmp_path / "src")
    growth.shrink(make, tmp_path / "dst", hidden_size=48, num_heads=3)
    assert growth.check(make, tmp_path / "dst").compared == "output"


def test_training_with_the_source_as_teacher_recovers(tmp_path, text):
    folder = ALL["llama"](tmp_path / "src", vocab_size=256)
    growth.shrink(folder, tmp_path / "dst", num_layers=2, ffn_size=48)
    report = growth.train(
        tmp_path / "dst",
        text,
        tmp_path / "out",
        steps=8,
        batch_size=4,
        sequence_length=16,
        learning_rate=3e-3,
        teacher=folder,
        teacher_weight=1.0,
    )
    assert report.curve[-1].loss < report.curve[0].loss


SHRINK = ("shrink", "{src}", "{}/out")
REFUSALS = {
    "wider": (
        (*SHRINK, "--hidden-size", 120),
        "hidden-size: expected 1 to the source's 96, got 120; growth grow",
    ),
    "deeper": ((*SHRINK, "--num-layers", 4), "num-layers: expected 1 to the source's 3, got 4; growth grow"),
    "no layers": ((*SHRINK, "--num-layers", 0), "num-layers: expected 1 to the source's 3, got 0; choose"),
    "more neurons": ((*SHRINK, "--ffn-size", 161), "ffn-size: expected 1 to the source's 160, got 161"),
    "the same sizes": ((*SHRINK, "--hidden-size", 96), "target: expected something smaller than the source"),
    "nothing asked for": (SHRINK, "target: expected something smaller than the source, got the same sizes"),
    "half a head": (
        (*SHRINK, "--hidden-size", 60),
        "a multiple of the head size 24, got 60; choose 48 or 72",
    ),
    "less than a head": ((*SHRINK, "--hidden-size", 12), "a multiple of the head size 24, got 12; choose 24"),
    "experts of a model without": (
        (*SHRINK, "--experts", 2),
        "experts: expected none, for the model has no such",
    ),
    "a layer that is not there": (
        (*SHRINK, "--layers", "0,3"),
        "layers: expected some out of 0 to 2, each once",
    ),
    "a layer twice": (
        (*SHRINK, "--layers", "1,1"),
        "layers: expected some out of 0 to 2, each once, got 1,1",
    ),
    "no layer": ((*SHRINK, "--layers", ","), "layers: expected some out of 0 to 2, each once, got none"),
    "words for layers": (
        (*SHRINK, "--layers", "all"),
        "layers: expected layer numbers such as 1,11, got 'all'",
    ),
    "all layers": ((*SHRINK, "--layers", "0,1,2"), "target: expected something smaller than the source"),
    "two numbers of layers": (
        (*SHRINK, "--layers", "0,1", "--num-layers", 1),
        "layers: expected 1, the number of layers, got 2, 0,1; leave num-layers out",
    ),
    "an unknown score": (
        (*SHRINK, "--num-layers", 2, "--score", "luck"),
        "score: expected one of magnitude,",
    ),
    "no data for a score": (
        (*SHRINK, "--num-layers", 2, "--score", "redundancy"),
        "data: expected text for score redundancy, got none",
    ),
    "no data to merge by": (
        (*SHRINK, "--ffn-size", 80, "--merge"),
        "merge: expected data to merge by, got none",
    ),
    "data that are not there": ((*SHRINK, "--ffn-size", 80, "--data", "{}/nothing.txt"), "nothing.txt"),
    "no windows": (
        (*SHRINK, "--ffn-size", 80, "--data", "{text}", "--windows", 0),
        "windows: expected at least 1, got 0",
    ),
    "too long windows": (
        (*SHRINK, "--ffn-size", 80, "--data", "{text}", "--sequence-length", 64),
        "at most 32 tokens, the model's positions, got 64",
    ),
    "data for nothing": (
        (*SHRINK, "--num-layers", 2, "--data", "{text}"),
        "data: expected none where whole layers and experts go by magnitude",
    ),
    "masks that never opened": (
        ("shrink", "{}/masked", "{}/out", "--ffn-size", 80),
        "expected a source that was trained since method msg made it, got one whose masks never opened",
    ),
    "redundancy behind masks": (
        ("inspect", "{}/masked", "--redundancy", "--data", "{text}"),
        "got one whose masks never opened",
    ),
    "a cache that is a file": (
        (*SHRINK, "--ffn-size", 80, "--data", "{text}", "--cache", "{text}"),
        "expected a folder for the cache",
    ),
    "a dtype that is none": (
        (*SHRINK, "--num-layers", 2, "--dtype", "int8"),
        "dtype: expected one of float64",
    ),
    "no place to write": (
        ("shrink", "{src}", "--num-layers", 2),
        "output folder: expected the name of a new",
    ),
    "groups that do not divide": (
        ("shrink", "{}/llama", "{}/out", "--num-kv-heads", 3),
        "some of the 4 groups, or a number that divides them, for 4 heads, got 3; choose 1, 2, 4",
    ),
    "more experts": (
        ("shrink", "{}/mixtral", "{}/out", "--experts", 6),
        "experts: expected 1 to the source's 5",
    ),
    "redundancy without data": (
        ("inspect", "{src}", "--redundancy"),
        "data: expected text for redundancy, got none",
    ),
    "data without redundancy": (
        ("inspect", "{src}", "--data", "x"),
        "data: expected none without --redundancy",
    ),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    ALL["llama"](folder / "llama", num_key_value_heads=4)
    ALL["mixtral"](folder / "mixtral")
    growth.grow(folder / "llama", folder / "masked", method="msg", ffn_size=100)
    return folder


@pytest.mark.parametrize("words, told", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_shrunk_is_one_line_and_writes_nothing(
    words, told, others, source, text, monkeypatch, capsys
):
    before = sorted(others.rglob("*"))
    words = [str(word).format(others, src=source, text=text) for word in words]
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 2 and told in err and len(err.splitlines()) == 1 and not out
    assert sorted(others.rglob("*")) == before


def test_the_command_line_says_what_it_did(source, tmp_path, text, monkeypatch, capsys):
    words = [
        "shrink",
        source,
        tmp_path / "dst",
        "--ffn-size",
        80,
        "--data",
        text,
        "--cache",
        tmp_path / "cache",
    ]
    code, out, err = run(monkeypatch, capsys, *words, "--score", "activation", "--json")
    told = json.loads(out)
    assert code == 0 and told["sizes"] == {"ffn-size": [160, 80]} and not told["calibration"]["cached"]
    assert record(tmp_path / "dst")["merge"] is True
    code, out, err = run(monkeypatch, capsys, "shrink", source, "--num-layers", 1, "--dry-run")
    assert code == 0 and "dropped gpt_neox.layers." in out and "no layer of the target takes it" in out
    assert "layers: " in out and "of 3 left out" in out


def test_python_takes_sizes_or_their_short_forms(source, tmp_path):
    with pytest.raises(Refusal, match="Sizes, or the short forms"):
        growth.shrink(source, tmp_path / "dst", growth.Sizes(layers=1), ffn_size=8)
