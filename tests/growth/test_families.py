"""Every family, under every method: do models compute what is promised, and does transformers load them?"""

import json
import shutil

import pytest
import torch
from checkpoints import ALL, PLAIN
from outputs import error, run
from safetensors.torch import load_file, save_file

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import quiet
from growth.plan import Source

METHODS = ("stack", "interpolate", "net2net", "lemon")
BOTH_WAYS = [
    ("lemon", {"hidden_size": 112, "num_layers": 7}),  # 4 heads to 7
    ("net2net", {"hidden_size": 128, "num_layers": 5}),
]
ONE_WAY = [
    ("lemon", {"hidden_size": 112}),
    ("lemon", {"hidden_size": 128, "num_layers": 5}),
    ("net2net", {"hidden_size": 112}),
    ("stack", {"hidden_size": 128}),
    ("interpolate", {"num_layers": 5}),
]
SHIFTED = "norm: the mean"
ABOVE = "layers: units beyond the source's are those of the layer above"
# What each loses, None where nothing.
COPYING = [
    (growth.HyperCloning(), {"hidden_size": 128}, None),
    (growth.HyperCloning(snr=10.0), {"hidden_size": 192, "num_layers": 5}, None),
    (growth.Lemon(symmetry="comp"), {"hidden_size": 128, "num_layers": 5}, None),
    (growth.Net2Net(symmetry="comp"), {"hidden_size": 192}, None),
    (growth.Bert2Bert(initialisation="fpi"), {"ffn_size": 264}, None),
    (growth.Bert2Bert(initialisation="fpi", noise=0.1), {"ffn_size": 320}, None),
    (growth.Bert2Bert(initialisation="fpi"), {"hidden_size": 128}, SHIFTED),
    (growth.Bert2Bert(), {"ffn_size": 264}, ABOVE),
    (growth.Bert2Bert(noise=0.1), {"hidden_size": 112, "num_layers": 5}, SHIFTED),
]
# Rows, columns or heads in one tensor with others, in another order, in groups, convolutions.
STORED = ["gpt_neox", "gpt2", "llama", "phi3", "olmo2", "granitemoehybrid", "t5 1.1", "lci RAM", "lci SMA"]
LARGER = {
    "384 to 768": ({"hidden_size": 384, "num_attention_heads": 6}, {"hidden_size": 768}),
    "512 to 768": ({"hidden_size": 512, "num_attention_heads": 8}, {"hidden_size": 768, "num_layers": 3}),
    "576 to 960": ({"hidden_size": 576, "num_attention_heads": 9}, {"hidden_size": 960}),
}
GROUPS = {
    "groups 2 to 3": (2, {"num_heads": 6, "num_kv_heads": 3}),
    "groups 1 to 2": (1, {"num_heads": 8, "num_kv_heads": 2}),
    "groups 1 to 3": (1, {"num_heads": 6, "num_kv_heads": 3}),
    "heads inside groups": (2, {"num_heads": 6, "num_kv_heads": 2}),
    "twice as many inside groups": (2, {"num_heads": 8, "num_kv_heads": 2}),
    "a group for each head": (2, {"num_heads": 8, "num_kv_heads": 8}),
    "groups of heads that had keys of their own": (4, {"num_heads": 8, "num_kv_heads": 4}),
    "groups alone": (2, {"num_heads": 4, "num_kv_heads": 4}),
    "heads that do not divide into the groups": (2, {"num_heads": 5}),
}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """name, dtype, sizes -> the folder of such a checkpoint, its configuration and what it gives."""
    made = {}

    def make(name, dtype=torch.float64, **sizes):
        key = name, dtype, *sorted(sizes.items())
        if key not in made:
            with quiet():
                folder = ALL[name](tmp_path_factory.mktemp("source") / "src", dtype, **sizes)
            made[key] = folder, *run(folder, dtype)
        return made[key]

    return make


def promised(method, old, new):
    """What the equations say."""
    whole, deeper = new.hidden_size % old.hidden_size == 0, new.num_hidden_layers > old.num_hidden_layers
    after_the_sum = old.model_type in ("bert", "roberta")
    return {
        "stack": whole and not deeper,
        "interpolate": whole and not deeper,
        "net2net": whole,
        "lemon": whole or not after_the_sum,
    }[method]


def agrees(source, tmp_path, method, sizes):
    """Grows, and holds the promise against the equations and against the numbers."""
    folder, old, truth = source
    report = growth.grow(folder, tmp_path / "out", method=method, allow_lossy=True, **sizes)
    new, got = run(tmp_path / "out", torch.float64)
    assert report.lossless == promised(method, old, new), report.notes
    assert error(truth, got) < 1e-9 if report.lossless else error(truth, got) > 1e-4
    notes = " ".join(report.notes)
    assert report.lossless == (not notes)
    if new.hidden_size % old.hidden_size and not report.lossless:
        assert f"norm: the mean{' square' if 'mean square' in notes else ' and variance'} of" in notes
    if method in ("stack", "interpolate") and new.num_hidden_layers > old.num_hidden_layers:
        assert "layers: not every layer acts once and in order" in notes
    return new


@pytest.mark.parametrize("method, sizes", BOTH_WAYS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_family_is_promised_lossless_exactly_where_the_equations_say_so(
    source, tmp_path, name, method, sizes
):
    agrees(source(name), tmp_path, method, sizes)


@pytest.mark.covering(1)
@pytest.mark.parametrize("method, sizes", ONE_WAY, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_family_is_promised_lossless_in_width_or_depth_alone_where_they_say_so(
    source, tmp_path, name, method, sizes
):
    agrees(source(name), tmp_path, method, sizes)


@pytest.mark.covering(3)
@pytest.mark.parametrize("method, sizes, loss", COPYING, ids=repr)
@pytest.mark.parametrize("name", PLAIN)
def test_a_copy_of_any_kind_keeps_what_it_promises_and_names_what_it_loses(
    source, tmp_path, name, method, sizes, loss
):
    folder, _, truth = source(name)
    if loss == ABOVE and (name.startswith("lci") or name == "qwen3_moe"):
        loss = None  # each layer that grows is the only one of its kind
    report = growth.grow(folder, tmp_path / "out", method=method, allow_lossy=True, **sizes)
    _, got = run(tmp_path / "out", torch.float64)
    if loss is None:
        assert report.lossless and not report.notes and error(truth, got) < 1e-9
    else:
        assert not report.lossless and error(truth, got) > 1e-4
        assert any(loss in note for note in report.notes), report.notes


@pytest.mark.covering(2)
@pytest.mark.parametrize("parting", ["spread", "first", "pairs", "blocks"])
@pytest.mark.parametrize("name", STORED)
def test_a_family_stays_the_same_function_however_copies_are_parted(
    source, tmp_path, monkeypatch, name, parting
):
    folder, _, truth = source(name)
    monkeypatch.setattr(growth.Net2Net, "parting", parting)
    heads = {"num_kv_heads": 2} if name in ("llama", "phi3", "granitemoehybrid") else {}
    method = growth.Net2Net(noise=0.1)
    report = growth.grow(folder, tmp_path / "out", method=method, hidden_size=192, **heads)
    _, got = run(tmp_path / "out", torch.float64)
    assert report.lossless and error(truth, got) < 1e-9


@pytest.mark.covering("pairs")
@pytest.mark.parametrize("method", ["net2net", "lemon"])
@pytest.mark.parametrize("ratio", LARGER)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_real_widths_and_heads_grow_as_small_ones_do(source, tmp_path, name, ratio, method):
    given, wanted = LARGER[ratio]
    groups = {"num_key_value_heads": 3} if given["num_attention_heads"] % 3 == 0 and name == "llama" else {}
    src = source(name, num_hidden_layers=2, intermediate_size=64, **given, **groups)
    config = agrees(src, tmp_path, method, wanted)
    if ratio == "576 to 960":
        assert config.num_attention_heads == 15
        assert name != "llama" or config.num_key_value_heads == 5


@pytest.mark.covering("pairs")
@pytest.mark.parametrize("method", ["net2net", "lemon"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_groups_of_heads_grow(source, tmp_path, name, groups, method):
    kv_heads, wanted = GROUPS[groups]
    config = agrees(source(name, num_key_value_heads=kv_heads), tmp_path, method, wanted)
    assert config.num_attention_heads == wanted["num_heads"]
    assert config.num_key_value_heads == wanted.get("num_kv_heads", 5)


def test_groups_that_are_chosen_hold_every_head(source, tmp_path):
    """9 heads in 3 groups would hold 3 of the 4 in the second, which has no copy."""
    eight = source("llama", num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    assert agrees(eight, tmp_path, "lemon", {"hidden_size": 72}).num_key_value_heads == 9


@pytest.mark.parametrize("size", [128.0, "128", True], ids=repr)
def test_a_size_is_a_whole_number(source, size):
    with pytest.raises(Refusal, match="hidden-size: expected a whole number, got "):
        growth.grow(source("llama")[0], hidden_size=size, dry_run=True)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_sizes_that_transformers_refuses_are_refused_before_any_work(source, tmp_path, name):
    folder, *_ = source(name)
    with pytest.raises(Refusal, match=r"target: .*\(80\) is not a multiple .* heads \(12\).*; choose sizes"):
        growth.grow(folder, method="net2net", hidden_size=80, num_heads=12, dry_run=True)


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_grow_under_a_norm_of_all_heads(source, tmp_path, groups):
    kv_heads, wanted = GROUPS[groups]
    agrees(source("olmo2", num_key_value_heads=kv_heads), tmp_path, "lemon", wanted)


@pytest.mark.parametrize("name", PLAIN)
def test_lemon_keeps_a_family_in_float32(source, tmp_path, name):
    folder, old, truth = source(name, torch.float32)
    width = 128 if old.model_type in ("bert", "roberta") else 112
    growth.grow(folder, tmp_path / "out", hidden_size=width, num_layers=5)
    _, got = run(tmp_path / "out", torch.float32)
    assert error(truth, got) < 1e-4


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(("bert", "roberta"))])
def test_lemon_refuses_what_it_would_lose_and_says_how_to_go_on(source, tmp_path, name):
    folder, *_ = source(name)
    with pytest.raises(
        Refusal, match="embed_norm: the mean and variance of 96 .*hidden size 128.*--allow-lossy"
    ):
        growth.grow(folder, tmp_path / "out", hidden_size=96)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, width", [("bert headless", 128), ("roberta headless", 128), ("t5 encoder", 112)]
)
def test_cosines_of_what_an_encoder_gives_stay(source, tmp_path, name, width):
    folder, _, (truth, *_) = source(name)
    growth.grow(folder, tmp_path / "out", hidden_size=width, num_layers=5)
    _, (got, *_) = run(tmp_path / "out", torch.float64)
    cosines = [torch.cosine_similarity(x[0, :, None], x[1, None], dim=-1) for x in (truth, got)]
    assert (cosines[0] - cosines[1]).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["bert token classifier", "bert answers", "roberta classifier"])
def test_a_pooler_that_the_class_does_not_read_is_left_behind(source, tmp_path, name):
    """Files that were saved by older versions hold it still."""
    folder, old, truth = source(name)
    held = shutil.copytree(folder, tmp_path / "src") / "model.safetensors"
    base, weight = name.split()[0], torch.ones(old.hidden_size, old.hidden_size, dtype=torch.float64)
    pooler = {f"{base}.pooler.dense.weight": weight, f"{base}.pooler.dense.bias": weight[0].clone()}
    save_file(load_file(held) | pooler, held, {"format": "pt"})
    new = agrees((held.parent, old, truth), tmp_path, "lemon", {"hidden_size": 128})
    assert new.architectures == old.architectures


@pytest.mark.parametrize("name", ALL)
def test_a_tensor_is_written_back_to_the_byte(source, name):
    folder, *_ = source(name, torch.float32)
    read = Source(Checkpoint(folder))
    assert set(read.on_disk.values()) == set(read.checkpoint.names)
    for tensor, (entry, _) in read.table.items():
        x = read.checkpoint.read(read.on_disk[tensor])
        parts = entry.from_disk(x)
        shapes = [read.model.architecture.shape(weight) for weight in entry.weights]
        assert [tuple(part.shape) for part in parts] == shapes
        assert torch.equal(entry.to_disk(parts).to(x.dtype), x), tensor


def test_layers_in_another_order_take_their_entries_along(source, tmp_path):
    """Also where there are as many as before."""
    growth.grow(
        source("lci RAM")[0], tmp_path / "lci", growth.Sizes(hidden=128), growth.StackBert(order="2,0,1")
    )
    config, _ = run(tmp_path / "lci", torch.float64)
    assert config.pattern == "MRA"
    growth.grow(
        source("qwen2")[0], tmp_path / "qwen2", growth.Sizes(hidden=128), growth.StackBert(order="1,1,2")
    )
    config, _ = run(tmp_path / "qwen2", torch.float64)
    assert config.layer_types == ["sliding_attention"] * 2 + ["full_attention"]


def test_an_order_that_leaves_out_a_kind_of_layer_is_refused(source, tmp_path):
    folder, *_ = source("lci RAM")
    with pytest.raises(
        Refusal, match="order: expected a layer of each kind, got 0,0,2; name one of kind A too"
    ):
        growth.grow(folder, tmp_path / "out", growth.Sizes(hidden=128), growth.StackBert(order="0,0,2"))
    assert not (tmp_path / "out").exists()


ORDERS = {"stack": "01201", "interpolate": "00112", "net2net": "01122", "lemon": "01122"}
ORDERS |= {"bert2bert": "01212", "hypercloning": "01122"}


@pytest.mark.covering(2)
@pytest.mark.parametrize("method", ORDERS)
@pytest.mark.parametrize(
    "name, field",
    [
        ("qwen2", "layer_types"),
        ("qwen3", "layer_types"),
        ("gemma2", "layer_types"),
        ("gemma3_text", "layer_types"),
        ("smollm3", "layer_types"),
        ("smollm3", "no_rope_layers"),
        ("lci RAM", "pattern"),
        ("lci SMA", "pattern"),
    ],
)
def test_lists_of_layers_follow_the_method_s_order(source, tmp_path, name, field, method):
    folder, config, _ = source(name)
    growth.grow(folder, tmp_path / "out", method=method, num_layers=5)
    entries = getattr(config, field)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [*written[field]] == [entries[int(i)] for i in ORDERS[method]]
