"""Masked growth: closed, the masks leave the source; open, the plain model; between, what training opens."""

import pytest
import torch
from checkpoints import ALL, inputs, saved
from exact import exact
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import load_model, quiet
from growth.plan import Source
from growth.training.masks import Masks, closed_of

SIZES = {"hidden_size": 112, "num_layers": 5}

IMAGES = {"image_size": 12, "patch_size": 4, "num_labels": 5, "hidden_size": 64, "num_hidden_layers": 3}
IMAGES |= {"num_attention_heads": 4, "intermediate_size": 96}
SEEING = {
    "vit": (ViTForImageClassification, ViTConfig),
    "vit without classifier": (ViTModel, ViTConfig),
    "deit with a teacher": (DeiTForImageClassificationWithTeacher, DeiTConfig),
}
GIVEN = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
GROUPS = {
    "groups 2 to 3": (2, {"num_heads": 6, "num_kv_heads": 3}),
    "groups 1 to 3, which share old heads out": (1, {"num_heads": 6, "num_kv_heads": 3}),
    "heads inside groups": (2, {"num_heads": 6, "num_kv_heads": 2}),
    "a group for each head": (2, {"num_heads": 8, "num_kv_heads": 8}),
    "groups of heads that had keys of their own": (4, {"num_heads": 8, "num_kv_heads": 4}),
    "heads that do not divide into the groups": (2, {"num_heads": 5}),
}


def loaded(folder, dtype=torch.float64):
    with quiet():
        model = load_model(folder, dtype).eval()
    # Of Granite's scans `exact` makes layers of our own, which no hook of the model's modules sees.
    return model if model.config.model_type == "granitemoehybrid" else exact(model)


def given(model):
    if model.config.model_type in ("vit", "deit"):
        pixels = torch.randn(2, 3, 12, 12, dtype=model.dtype, generator=torch.Generator().manual_seed(1))
        out = model(pixel_values=pixels)
    else:
        out = model(**inputs(model.config))
    return [out[name] for name in GIVEN if out.get(name) is not None]


def error(truth, got):
    """The largest difference of the channels that both have, over the largest number there."""
    return max(((y[..., : x.shape[-1]] - x).abs().max() / x.abs().max()).item() for x, y in zip(truth, got))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    made = {}

    def make(name, **sizes):
        key = name, *sorted(sizes.items())
        if key not in made:
            with quiet():
                folder = tmp_path_factory.mktemp("source") / "src"
                if name in SEEING:
                    kind, config = SEEING[name]
                    made[key] = saved(kind, config(**IMAGES), folder, torch.float64)
                else:
                    made[key] = ALL[name](folder, torch.float64, **sizes)
        return made[key]

    return make


def holds(folder, tmp_path, sizes):
    """Grows, and holds closed, half open and open masks against the source and the plain model."""
    report = growth.grow(folder, tmp_path / "out", method="msg", **sizes)
    model = loaded(tmp_path / "out")
    limit = 1e-5 if model.config.model_type == "granitemoehybrid" else 1e-9  # scans in float32
    with torch.no_grad():
        truth, plain = given(loaded(folder)), given(model)
        masks = Masks(model, closed_of(tmp_path / "out"))
        assert error(truth, given(model)) < limit
        assert not masks.idle()
    assert not report.lossless
    assert error(truth, plain) > 1e-3
    masks.open(0.5)
    half = given(model)
    assert error(truth, half) > 1e-4
    sum((y * torch.randn_like(y)).sum() for y in half).backward()
    with torch.no_grad():
        masks.open(1.0)
        assert error(plain, given(model)) < limit
        masks.remove()
        assert all(torch.equal(x, y) for x, y in zip(plain, given(model)))
    return model


@pytest.mark.parametrize("name", [*(x for x in ALL if "mixtral" not in x and "_moe" not in x), *SEEING])
def test_masks_closed_a_family_is_its_source_and_open_it_is_what_was_written(source, tmp_path, name):
    model = holds(source(name), tmp_path, SIZES)
    idle = {name for name, x in model.named_parameters() if x.grad is None or not x.grad.any()}
    idle = {name for name in idle if not name.endswith(("key.bias", "k_proj.bias"))}  # softmax sees none
    assert not idle, "gradients reach every weight while masks are open by half"


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_groups_of_heads_grow_behind_masks(source, tmp_path, name, groups):
    kv_heads, wanted = GROUPS[groups]
    holds(source(name, num_key_value_heads=kv_heads), tmp_path, wanted)


@pytest.mark.parametrize("sizes", [{"ffn_size": 130}, {"num_layers": 4}, {"hidden_size": 128}], ids=str)
@pytest.mark.parametrize("name", ["gemma2", "bert", "t5"])
def test_one_size_grows_behind_masks(source, tmp_path, name, sizes):
    holds(source(name), tmp_path, sizes)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "lci SMA"])
def test_what_is_made_by_blocks_of_rows_has_its_old_part_in_place(source, tmp_path, monkeypatch, name):
    monkeypatch.setattr("growth.expand.BLOCK", 300)
    holds(source(name), tmp_path, SIZES)


def test_what_is_new_starts_as_a_new_model_does(source, tmp_path):
    growth.grow(source("gemma2"), tmp_path / "out", method="msg", **SIZES)
    old, new = (Source(Checkpoint(folder)) for folder in (source("gemma2"), tmp_path / "out"))
    up, gain = "layers.{}.mlp.up.weight", "layers.{}.mlp_norm.weight"
    assert torch.equal(new.read(up, 1)[:96, :64], old.read(up, 1))
    assert new.read(gain, 1)[64:].eq(1).all() and torch.equal(new.read(gain, 1)[:64], old.read(gain, 1))
    fresh = new.read(up, 2), new.read(up, 1)[96:], new.read(up, 1)[:96, 64:]
    fresh = torch.cat([x.flatten() for x in fresh])
    assert abs(fresh.std() / old.config.initializer_range - 1) < 0.05 and abs(fresh.mean()) < 1e-3
    rows = {row["name"]: row for row in Checkpoint(tmp_path / "out").record()["tensors"]}
    layer = rows["model.layers.2.mlp.up_proj.weight"]
    assert (layer["origin"], layer["sources"], layer["note"]) == ("initialised", [], "a new layer")


def test_a_check_says_why_no_equality_is_promised(source, tmp_path):
    growth.grow(source("llama"), tmp_path / "out", method="msg", **SIZES)
    agreement = growth.check(source("llama"), tmp_path / "out")
    assert agreement.limit is None and agreement.kept
    assert "no equality was promised: masks closed, as growth train begins, it is the source" in str(
        agreement
    )


def test_new_layers_go_where_the_order_has_them(source, tmp_path):
    growth.grow(source("llama"), tmp_path / "out", growth.Sizes(hidden=128), growth.Msg(order="0,0,1,2,1"))
    assert closed_of(tmp_path / "out")["layers"] == {"": [1, 4]}
    model = loaded(tmp_path / "out")
    Masks(model, closed_of(tmp_path / "out"))
    with torch.no_grad():
        assert error(given(loaded(source("llama"))), given(model)) < 1e-9


def test_groups_that_leave_heads_out_are_refused(source, tmp_path):
    folder = source("llama", num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    with pytest.raises(Refusal, match="num-kv-heads: expected groups of heads that hold all .* leave out"):
        growth.grow(folder, tmp_path / "out", method="msg", num_heads=9, num_kv_heads=3, dry_run=True)


def test_an_order_that_takes_layers_in_another_order_is_refused(source):
    with pytest.raises(Refusal, match="order: expected layers 0 to 2, each first seen after those below it"):
        growth.grow(source("llama"), method=growth.Msg(order="0,2,1,1"), dry_run=True)
