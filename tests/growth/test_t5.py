"""T5: what two stacks on one stream have that no other family has."""

from dataclasses import replace

import pytest
import torch
from checkpoints import ALL
from safetensors.torch import load_file, save_file

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import load_model
from growth.lossless import lost
from growth.methods import Lemon
from growth.plan import Source
from growth.sizes import Sizes, resized

BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
WEIGHTS = "model.safetensors"
TWINS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("method", ["stack", "interpolate", "net2net", "lemon"])
def test_biases_by_distance_stay_in_the_first_layer_and_go_along_with_the_heads(tmp_path, method):
    ALL["t5"](tmp_path / "src")
    growth.grow(tmp_path / "src", tmp_path / "deeper", method=method, num_layers=5)
    growth.grow(
        tmp_path / "src", tmp_path / "wider", method=method, hidden_size=112, num_layers=5, allow_lossy=True
    )
    old, deeper, wider = (load_file(tmp_path / name / WEIGHTS) for name in ("src", "deeper", "wider"))
    for stack in ("encoder", "decoder"):
        table = old[BIAS.format(stack)]
        assert torch.equal(deeper[BIAS.format(stack)], table)
        assert torch.equal(wider[BIAS.format(stack)], table[:, [0, 1, 2, 3, 0, 1, 2]])
    assert sum("relative_attention_bias" in name for name in wider) == 2


def test_a_head_of_its_own_stays_apart_from_the_embedding(tmp_path):
    ALL["t5 1.1"](tmp_path / "src")
    growth.grow(tmp_path / "src", tmp_path / "out", hidden_size=112)
    model = load_model(tmp_path / "out")
    assert not model.config.scale_decoder_outputs
    assert (model.lm_head.weight - model.shared.weight).abs().max() > 1


def test_names_of_older_files_are_the_embedding_s(tmp_path):
    src = ALL["t5"](tmp_path / "src")
    growth.grow(src, tmp_path / "new", hidden_size=112)
    tensors = load_file(src / WEIGHTS)
    save_file(tensors | {name: tensors["shared.weight"].clone() for name in TWINS}, src / WEIGHTS)
    growth.grow(src, tmp_path / "old", hidden_size=112)
    new, old = (load_file(tmp_path / name / WEIGHTS) for name in ("new", "old"))
    assert set(new) == set(old) == set(tensors)
    assert all(torch.equal(x, old[name]) for name, x in new.items())


@pytest.mark.parametrize("name", TWINS)
def test_two_names_of_the_embedding_with_two_values_are_refused(tmp_path, name):
    src = ALL["t5"](tmp_path / "src")
    tensors = load_file(src / WEIGHTS)
    save_file(tensors | {name: tensors["shared.weight"] + 1}, src / WEIGHTS)
    with pytest.raises(Refusal, match="expected the values of .*, got others"):
        growth.grow(src, tmp_path / "out", hidden_size=112)


def test_stacks_of_unlike_depth_grow_in_width_alone(tmp_path):
    src = ALL["t5"](tmp_path / "src", torch.float64, num_decoder_layers=2)
    assert growth.grow(src, tmp_path / "out", hidden_size=112).lossless
    config = load_model(tmp_path / "out").config
    assert (config.num_layers, config.num_decoder_layers) == (3, 2)
    with pytest.raises(Refusal, match="stacks of as many layers, got 3 and 2; change the width alone"):
        growth.grow(src, tmp_path / "deeper", num_layers=5)


@pytest.mark.parametrize("method", ["ligo", "mango"])
def test_methods_that_learn_from_text_are_refused(tmp_path, method):
    src = ALL["t5"](tmp_path / "src")
    with pytest.raises(Refusal, match=f"{method}: expected a causal or a masked language model, got T5For"):
        growth.grow(src, tmp_path / "out", hidden_size=112, method=method)


@pytest.mark.parametrize(
    "wire, why", [("decoder.bias", "attention: "), ("memory", "decoder.layers.*.cross.k: ")]
)
def test_heads_without_their_biases_and_keys_of_another_memory_are_not_called_lossless(tmp_path, wire, why):
    model = Source(Checkpoint(ALL["t5"](tmp_path / "src"))).model
    config = resized(model, Sizes(hidden=112), Lemon().layers)
    old, new = model.architecture, model.family.model(config, model.parts).architecture
    maps = Lemon().maps(old, new)
    assert not lost(old, new, maps)
    wrong = replace(maps.wires[wire], index=maps.wires[wire].index[1:] + maps.wires[wire].index[:1])
    notes = lost(old, new, replace(maps, wires=maps.wires | {wire: wrong}))
    assert any(note.startswith(why) for note in notes), notes
