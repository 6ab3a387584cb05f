"""What methods that copy write: which units, of which layer, with which noise."""

import math
from dataclasses import replace

import pytest
import torch
from checkpoints import ALL, gpt2, neox
from safetensors.torch import load_file

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.lossless import lost
from growth.maps import at_random, grouped, round_robin
from growth.plan import Source
from growth.sizes import resized

UP, DOWN = "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.mlp.down_proj.weight"


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return ALL["llama"](tmp_path_factory.mktemp("copying") / "src", torch.float64)


def grown(src, out, method, **sizes):
    growth.grow(src, out, method=method, allow_lossy=True, **sizes)
    return tensors(out)


def which(rows, of):
    """The row of `of` that each is equal to."""
    same = (rows[:, None] == of[None]).all(-1)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1).tolist()


@pytest.mark.parametrize("initialisation", ["fpi", "aki"])
def test_new_neurons_are_copies_of_the_layer_s_own_or_of_the_next_one_s(llama, tmp_path, initialisation):
    """Their readers are the layer's own, of the unit that stands there in it, over the number of copies."""
    old = tensors(llama)
    new = grown(llama, tmp_path / "out", growth.Bert2Bert(initialisation=initialisation), ffn_size=160)
    for layer in range(3):
        above = min(layer + 1, 2) if initialisation == "aki" else layer
        up, down = new[UP.format(layer)], new[DOWN.format(layer)]
        assert torch.equal(up[:96], old[UP.format(layer)])
        index = [*range(96), *which(up[96:], old[UP.format(above)])]
        count = torch.tensor([index.count(i) for i in index])
        assert count.max() > 2, "at random"
        torch.testing.assert_close(down * count, old[DOWN.format(layer)][:, index])


def test_a_wider_stream_is_written_by_the_next_layer_beyond_the_source_s_channels(llama, tmp_path):
    old = tensors(llama)
    new = grown(llama, tmp_path / "out", growth.Bert2Bert(), hidden_size=80, num_heads=5, num_kv_heads=5)
    index = which(new["model.embed_tokens.weight"].T, old["model.embed_tokens.weight"].T)
    assert index[:64] == list(range(64))
    neurons = new[UP.format(0)].shape[0]
    for layer in range(3):
        down, own, above = (
            x[DOWN.format(j)] for x, j in ((new, layer), (old, layer), (old, min(layer + 1, 2)))
        )
        assert down.shape == (80, neurons)
        single = down[:, [i for i in range(96) if (down[:64, i] == own[:, i]).all()]]
        places = which(single[:64].T, own.T)
        assert places and torch.equal(single[64:], above[index[64:]][:, places])
        gain = f"model.layers.{layer}.input_layernorm.weight"
        assert torch.equal(new[gain], old[gain][index]), "norms copy their own layer's"


def test_layers_are_stacked_and_the_topmost_stand_again(llama, tmp_path):
    old, new = tensors(llama), grown(llama, tmp_path / "out", growth.Bert2Bert(), num_layers=8)
    for layer, j in enumerate((0, 1, 2, 0, 1, 2, 1, 2)):
        assert torch.equal(new[UP.format(layer)], old[UP.format(j)])


def test_units_at_random_follow_the_seed(llama, tmp_path):
    made = [
        growth.grow(llama, tmp_path / f"{i}", method="bert2bert", ffn_size=160, seed=seed)
        and tensors(tmp_path / f"{i}")
        for i, seed in enumerate((0, 0, 1))
    ]
    assert all(torch.equal(x, made[1][name]) for name, x in made[0].items())
    assert not torch.equal(made[0][UP.format(0)], made[2][UP.format(0)])


def test_heads_are_chosen_at_random_inside_their_groups_and_none_is_left_out():
    index = grouped((4, 18), (2, 3), (0, 1, 0), lambda old, new: at_random(old, new, "0"))
    of_group = [{0, 1}, {2, 3}, {0, 1}]
    assert [set(index[g * 6 : g * 6 + 6]) for g in range(3)] == of_group
    assert grouped((4, 18), (2, 3)) == grouped((4, 18), (2, 3), (0, 1, 0), round_robin)
    assert at_random(5, 20, "0")[:12] == at_random(5, 12, "0") and at_random(5, 3, "0") == (0, 1, 2)


@pytest.mark.parametrize("learned", [False, True])
def test_heads_keep_the_decays_that_stand_in_the_configuration(tmp_path, learned):
    """Decays that are weights go along with their heads, whatever the order."""
    src = ALL["lci RRR"](tmp_path / "src", torch.float64, retention_learned_decay=learned)
    model = Source(Checkpoint(src)).model
    target = model.family.model(
        resized(model, growth.Sizes(hidden=256), lambda old, new: (0, 1, 2)), model.parts
    )
    old, new = model.architecture, target.architecture
    maps = growth.Net2Net().maps(old, new)
    assert not lost(old, new, maps)
    heads = {name: of for name, of in maps.wires.items() if name.startswith(("retention", "decay"))}
    turned = {name: replace(of, index=of.index[1:] + of.index[:1]) for name, of in heads.items()}
    losses = lost(old, new, replace(maps, wires=maps.wires | turned))
    told = "attention: the heads of retention.query.* are not in the configuration's order"
    assert losses == ([] if learned else [told])
    report = growth.grow(src, sizes=growth.Sizes(hidden=256), method="bert2bert", dry_run=True)
    assert not any("attention" in note for note in report.notes)


@pytest.mark.parametrize("snr", [0.0, 10.0, 30.0])
def test_noise_is_as_many_decibels_below_the_weight_and_cancels_out_in_pairs(tmp_path, snr):
    src = gpt2(tmp_path / "src", torch.float64)
    plain = grown(src, tmp_path / "plain", growth.HyperCloning(), hidden_size=288)
    noisy = grown(src, tmp_path / "noisy", growth.HyperCloning(snr=snr), hidden_size=288)
    for part in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        weight = plain[f"transformer.h.1.{part}.weight"]
        noise = noisy[f"transformer.h.1.{part}.weight"] - weight
        first, second, third = noise.chunk(3)  # what is read comes first in GPT-2
        torch.testing.assert_close(first, -second, rtol=0, atol=1e-12)
        assert (third == 0).all() and first.any()
        got = 10 * math.log10(weight.square().mean() / first.square().mean())
        assert abs(got - snr) < 0.3


def test_the_first_copy_gives_up_what_the_others_read(tmp_path):
    """LEMON's BERTs: W - c R and c R."""
    src = neox(tmp_path / "src", torch.float64)
    method = growth.Lemon(symmetry="comp", noise=0.1)
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    old, new = tensors(src)[name], grown(src, tmp_path / "out", method, ffn_size=320)[name]
    torch.testing.assert_close(new[:, :160] + new[:, 160:], old)
    assert new[:, 160:].std().item() == pytest.approx(0.1 * 0.02, rel=0.02)


def test_a_fresh_matrix_is_one_of_the_wide_model(tmp_path):
    """T5's start as 1 / sqrt(width)."""
    src = ALL["t5"](tmp_path / "src", torch.float64)
    new = grown(src, tmp_path / "out", growth.Lemon(symmetry="comp", noise=1.0), hidden_size=256)
    columns = new["encoder.block.1.layer.1.DenseReluDense.wo.weight"][:, 96:]
    assert columns.std().item() == pytest.approx(256**-0.5, rel=0.02)


@pytest.mark.parametrize(
    "method, told",
    [
        (
            lambda: growth.HyperCloning(snr=math.inf),
            "snr: expected a number of decibels, at least -100, got inf",
        ),
        (lambda: growth.Lemon(symmetry="none"), "symmetry: expected one of projection, comp, got none"),
        (lambda: growth.Bert2Bert(initialisation="lpi"), "initialisation: expected one of aki, fpi, got lpi"),
    ],
)
def test_what_a_method_cannot_be_told_is_refused(method, told):
    with pytest.raises(Refusal, match=told):
        method()


def test_no_part_of_a_unit_is_cloned(llama, tmp_path):
    with pytest.raises(
        Refusal, match=r"hypercloning: .*a whole multiple of the source's 64, got 112; choose 128"
    ):
        growth.grow(llama, tmp_path / "out", method="hypercloning", hidden_size=112)
    assert not (tmp_path / "out").exists()
