"""Is what the maps promise what the grown models compute?"""

from dataclasses import replace

import pytest
import torch
from checkpoints import ALL, FAMILIES, bert

import growth
from growth import expand
from growth.apply import read, unseen, write
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.learned.maps import dense
from growth.loading import load_model
from growth.lossless import lost
from growth.methods import Bert2Bert, HyperCloning, Lemon, method_of
from growth.plan import Source
from growth.sizes import Sizes, resized

SIZES = {
    "ratio that divides nothing": (168, 5),
    "twice as wide": (192, 3),
    "more than twice in both": (264, 8),
    "a whole factor and more than twice as deep": (288, 8),
    "depth alone": (96, 4),
}


def architectures(folder, hidden_size, num_layers):
    model = Source(Checkpoint(folder)).model
    target = resized(model, Sizes(hidden_size, num_layers), Lemon().layers)
    return model.architecture, model.family.model(target, model.parts).architecture


def difference64(src, dst):
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(256, (2, 32), generator=generator)}
    if Checkpoint(src).config.model_type == "bert":
        inputs["token_type_ids"] = torch.randint(2, (2, 32), generator=generator)
    with torch.no_grad():
        a, b = (load_model(path, torch.float64).eval()(**inputs).logits for path in (src, dst))
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("method", ["stack", "interpolate", "net2net", "lemon"])
def test_a_model_is_promised_lossless_exactly_when_its_logits_stay(source64, tmp_path, method, name):
    hidden_size, num_layers = SIZES[name]
    wanted = {"method": method, "hidden_size": hidden_size, "num_layers": num_layers}
    old, new = architectures(source64, hidden_size, num_layers)
    if method == "lemon" and lost(old, new, Lemon().maps(old, new)):
        assert Checkpoint(source64).config.model_type == "bert" and hidden_size % 96
        with pytest.raises(
            Refusal,
            match="nothing is lost, got .*norm: the mean and variance of .*; choose hidden size (192|288), ",
        ):
            growth.grow(source64, tmp_path / "out", **wanted)
        report = growth.grow(source64, tmp_path / "out", allow_lossy=True, **wanted)
        assert not report.lossless and difference64(source64, tmp_path / "out") > 1e-3
        return
    report = growth.grow(source64, tmp_path / "out", **wanted)
    error = difference64(source64, tmp_path / "out")
    assert error < 1e-10 if report.lossless else error > 1e-3
    assert report.lossless or method != "lemon"


@pytest.mark.parametrize(
    "family, kind",
    [
        ("gpt_neox", {"tie_word_embeddings": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"attention_bias": False}),
        ("gpt_neox", {"layer_norm_eps": 0.1}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("gpt2", {"n_inner": None}),
        ("gpt2", {"layer_norm_epsilon": 0.1, "reorder_and_upcast_attn": True}),
        ("bert", {"tie_word_embeddings": False}),
        ("bert", {"hidden_act": "relu", "type_vocab_size": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("method, hidden_size", [("lemon", 168), ("net2net", 192)])
def test_every_kind_of_a_family_stays_the_same_function(tmp_path, family, kind, method, hidden_size):
    src = FAMILIES[family](tmp_path / "src", torch.float64, **kind)
    hidden_size = 192 if family == "bert" else hidden_size
    report = growth.grow(src, tmp_path / "out", method=method, hidden_size=hidden_size, num_layers=4)
    assert report.lossless and difference64(src, tmp_path / "out") < 1e-10


@pytest.mark.parametrize("method", ["net2net", "lemon"])
def test_layers_added_to_a_bert_with_a_large_eps_are_close_and_not_promised(tmp_path, method):
    """A norm of a norm is the norm, but for O(eps)."""
    src = bert(tmp_path / "src", torch.float64, layer_norm_eps=1e-5)
    wider = growth.grow(src, tmp_path / "wider", method=method, hidden_size=192)
    deeper = growth.grow(src, tmp_path / "deeper", method=method, num_layers=6, allow_lossy=True)
    assert deeper.notes == ("layers: the norms of added layers change the stream",)
    assert wider.lossless and difference64(src, tmp_path / "wider") < 1e-10
    assert not deeper.lossless and 1e-8 < difference64(src, tmp_path / "deeper") < 1e-4


def test_gpt_2_s_depth_stays_where_a_layer_s_number_scales_its_attention(tmp_path):
    src = FAMILIES["gpt2"](tmp_path / "src", torch.float64, scale_attn_by_inverse_layer_idx=True)
    report = growth.grow(src, tmp_path / "out", method="lemon", hidden_size=168)
    assert report.lossless and difference64(src, tmp_path / "out") < 1e-10
    with pytest.raises(Refusal, match="num-layers: expected the source's 3, .*, got 4; change"):
        growth.grow(src, tmp_path / "deeper", method="lemon", num_layers=4)


def test_lemon_keeps_the_logits_in_float32(source, tmp_path):
    growth.grow(source, tmp_path / "out", method="lemon", hidden_size=168, num_layers=5)
    agreement = growth.check(source, tmp_path / "out")
    assert agreement.kept and agreement.float32 < 1e-4


def test_maps_that_are_slightly_wrong_are_not_called_lossless(source):
    old, new = architectures(source, 168, 5)
    maps = Lemon().maps(old, new)
    assert not lost(old, new, maps)
    final, value = maps.wires["final"], maps.wires["value.0"]
    turned = value.index[-1:] + value.index[:-1]
    other = replace(value, index=turned, share=value.share[-1:] + value.share[:-1])
    down = "layers.{}.mlp.down.weight"
    for wrong in (
        replace(maps, eps={}),
        replace(
            maps, wires=maps.wires | {"final": replace(final, share=tuple(1.001 * x for x in final.share))}
        ),
        replace(maps, wires=maps.wires | {"gain": replace(maps.wires["gain"], scale=1.0)}),
        replace(maps, wires=maps.wires | {"residual": replace(maps.wires["residual"], rest="zero")}),
        replace(maps, wires=maps.wires | {"value.0": other}),
        replace(maps, depth=maps.depth | {down: maps.depth[down][::-1]}),
        replace(maps, constants={"layers.{}.mlp_norm.weight": (1.0,) * 5}),
    ):
        assert lost(old, new, wrong)


def test_maps_of_a_post_norm_model_that_are_slightly_wrong_are_not_called_lossless(tmp_path):
    old, new = architectures(bert(tmp_path / "src"), 192, 5)
    maps = Lemon().maps(old, new)
    assert not lost(old, new, maps)
    assert lost(old, new, replace(maps, constants={}))
    assert lost(old, new, replace(maps, eps={"layer_norm_eps": 1e6}))
    for part in ("mixer_norm.weight", "mixer_norm.bias", "mlp_norm.weight", "mlp_norm.bias"):
        name = f"layers.{{}}.{part}"
        turned = maps.depth[name][-1:] + maps.depth[name][:-1]
        assert lost(old, new, replace(maps, depth=maps.depth | {name: turned}))
    for name in ("residual", "gain", "transform", "final_gain", "final"):
        of = maps.wires[name]
        for wrong in (replace(of, scale=1.001), replace(of, index=of.index[-1:] + of.index[:-1])):
            assert lost(old, new, replace(maps, wires=maps.wires | {name: wrong}))


def test_noise_that_readers_would_see_is_a_loss(source):
    """Units of their own that are written as a mean, where LEMON's are zero."""
    old, new = architectures(source, 168, 5)
    maps = Lemon().maps(old, new)
    for noise, told in ((1.0, True), (0.0, False)):
        normed = replace(maps.wires["normed"], rest="mean", noise=noise)
        losses = lost(old, new, replace(maps, wires=maps.wires | {"normed": normed}))
        assert any("mlp.up: what parts the copies is seen" in why for why in losses) == told


@pytest.mark.parametrize("order", ["1,0,2", "0,0,2"])
def test_an_order_that_loses_layers_is_refused_with_one_that_does_not(source, tmp_path, order):
    with pytest.raises(Refusal, match="in turn, such as 0,1,1,2, or --allow-lossy$"):
        growth.grow(source, tmp_path / "out", Sizes(hidden=192), Lemon(order=order))
    assert growth.grow(
        source, sizes=Sizes(hidden=192), method=Lemon(order="0,1,1,0,2"), dry_run=True
    ).lossless


def test_a_loss_is_told_by_the_op_that_has_it(source):
    old, new = architectures(source, 168, 5)
    maps = method_of("net2net").maps(old, new)
    assert (
        "layers.*.mixer_norm: the mean and variance of 168 channels are not those of the source's 96"
        in lost(old, new, maps)
    )
    (why,) = lost(old, new, method_of("stack").maps(*architectures(source, 96, 5)))
    assert why == "layers: not every layer acts once and in order"


def test_what_is_given_to_readers_as_noise_is_unseen(source):
    old, new = architectures(source, 168, 5)
    maps = Lemon().maps(old, new)
    for name in ("normed", "ffn.4", "value.2"):
        of = maps.wires[name]
        S = of.sources * of.width
        r = torch.randn(7, len(of.index) * of.width, dtype=torch.float64)
        hidden, x = unseen(of, r.clone()), torch.randn(S, dtype=torch.float64)
        assert hidden.abs().max() > 0.1
        assert (hidden @ write(of, x)).abs().max() < 1e-12
        whole = dense(of, S)
        assert torch.allclose(hidden, whole.unseen(r))
        assert torch.allclose(write(of, x), whole.write(x)) and torch.allclose(read(of, x), whole.read(x))


@pytest.mark.parametrize(
    "method, differ",
    [
        (Lemon(noise=0.0), False),
        (Lemon(noise=1.0), True),
        (Lemon(symmetry="comp"), True),
        (HyperCloning(), False),
        (HyperCloning(snr=10.0), True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_part_ways_only_because_their_readers_differ(family, method, differ, tmp_path):
    source = FAMILIES[family](tmp_path / "src")
    growth.grow(source, tmp_path / "out", Sizes(hidden=192), method)
    model = load_model(tmp_path / "out").eval()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(5):
        ids = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = model.get_input_embeddings().weight
    apart = (rows[:, :96] - rows[:, 96:]).abs().max().item()
    assert apart > 1e-4 if differ else apart < 1e-5


@pytest.mark.parametrize("method", [Lemon(noise=0.0), Bert2Bert(), HyperCloning()], ids=str)
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "lci SSS"])
def test_a_tensor_made_in_blocks_of_rows_is_the_one_made_at_once(tmp_path, monkeypatch, name, method):
    """Also where several weights lie side by side in it."""
    src = ALL[name](tmp_path / "src")
    for block in (2**18, 2**8):
        monkeypatch.setattr(expand, "BLOCK", block)
        growth.grow(src, tmp_path / f"{block}", Sizes(hidden=128, layers=4), method)
    whole, parts = (Checkpoint(tmp_path / f"{block}") for block in (2**18, 2**8))
    assert all(torch.equal(whole.read(tensor), parts.read(tensor)) for tensor in whole.names)
