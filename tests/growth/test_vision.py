"""ViT and DeiT: every tensor of a checkpoint, and the function of what is grown from it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import quiet
from growth.plan import Source
from growth.sizes import Sizes

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
IMAGES = {"image_size": 12, "patch_size": 4, "num_channels": 3, "num_labels": 5}
OBLONG = {"image_size": [8, 12], "patch_size": [4, 2]}
KINDS = {
    "vit": (ViTForImageClassification, ViTConfig, {}),
    "vit without biases": (ViTForImageClassification, ViTConfig, {"qkv_bias": False}),
    "vit of oblong patches": (ViTForImageClassification, ViTConfig, OBLONG),
    "vit without classifier": (ViTModel, ViTConfig, {}),
    "vit with a small pooler": (ViTModel, ViTConfig, {"pooler_output_size": 24}),
    "vit without pooler": (ViTModel, ViTConfig, {"add_pooling_layer": False}),
    "deit": (DeiTForImageClassification, DeiTConfig, {}),
    "deit with a teacher": (DeiTForImageClassificationWithTeacher, DeiTConfig, {}),
    "deit without classifier": (DeiTModel, DeiTConfig, {}),
}
TARGETS = {
    "wider by a part": Sizes(hidden=112),
    "twice as wide": Sizes(hidden=128),
    "deeper": Sizes(layers=5),
    "wider and deeper": Sizes(hidden=112, layers=5),
}
WHOLE = {"width": Sizes(hidden=128), "neurons": Sizes(ffn=192), "both and depth": Sizes(hidden=192, layers=5)}


def options(kind):
    """What a model is built with beside its configuration."""
    return {name: x for name, x in KINDS[kind][2].items() if name == "add_pooling_layer"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint of each kind, in float64, every parameter random."""
    folder, made = tmp_path_factory.mktemp("vision"), {}
    for kind, (model, config, extra) in KINDS.items():
        torch.manual_seed(0)
        own = {name: x for name, x in extra.items() if name not in options(kind)}
        with quiet():
            made[kind] = model(config(**SIZES | IMAGES | own), **options(kind)).double()
            for parameter in made[kind].parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)
            made[kind].save_pretrained(folder / kind)
        processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.3, 0.4, 0.5]}
        (folder / kind / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def loaded(folder, kind):
    """By the auto class and nothing else, with no tensor too many or too few."""
    auto = AutoModelForImageClassification if "For" in KINDS[kind][0].__name__ else AutoModel
    with quiet():
        model, info = auto.from_pretrained(
            folder, dtype=torch.float64, output_loading_info=True, **options(kind)
        )
    assert type(model) is KINDS[kind][0]
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def outputs(folder, kind):
    model = loaded(folder, kind)
    config = model.config
    sides = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    images = torch.randn(4, 3, *sides, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model(images)


def same(source, grown, kind):
    """Logits agree; of an output that grows, the source's channels come first and the others are copies or
    zero."""
    names = [name for name in grown.keys() if name != "loss"]
    assert names == list(source.keys())
    for name in names:
        x, y = source[name], grown[name]
        S, T = x.shape[-1], y.shape[-1]
        copies = T // S
        want = torch.cat([x] * copies + [x.new_zeros(*x.shape[:-1], T - S * copies)], -1)
        torch.testing.assert_close(y, want, rtol=0, atol=1e-9 * max(1.0, x.abs().max().item()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_comes_back_from_its_weights_to_the_byte(sources, kind):
    source = Source(Checkpoint(sources / kind))
    disk = load_file(sources / kind / "model.safetensors")
    assert set(source.on_disk.values()) == set(disk)
    for name, (entry, _) in source.table.items():
        x = disk[source.on_disk[name]]
        back = entry.to_disk(entry.from_disk(x))
        assert back.shape == x.shape and torch.equal(back, x)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_lemon_gives_the_same_numbers_in_float64(sources, tmp_path, kind, target):
    report = growth.grow(sources / kind, tmp_path / "grown", TARGETS[target], "lemon")
    assert report.lossless and not report.notes
    same(outputs(sources / kind, kind), outputs(tmp_path / "grown", kind), kind)


@pytest.mark.parametrize("target", WHOLE)
@pytest.mark.parametrize("kind", ["vit", "deit with a teacher", "vit without classifier"])
def test_net2net_gives_the_same_numbers_at_whole_factors(sources, tmp_path, kind, target):
    assert growth.grow(sources / kind, tmp_path / "grown", WHOLE[target], "net2net").lossless
    same(outputs(sources / kind, kind), outputs(tmp_path / "grown", kind), kind)


def test_every_wire_of_the_width_grows_and_pixels_and_classes_stay(sources):
    model = Source(Checkpoint(sources / "vit")).model.architecture
    assert {name for name, wire in model.wires.items() if wire.fixed} == {"pixels", "positions", "classes"}
    assert (model.wires["pixels"].size, model.wires["positions"].size) == (3 * 4 * 4, 3 * 3 + 1)
    kinds = ("vit without classifier", "vit with a small pooler")
    pooled = [Source(Checkpoint(sources / kind)).model.architecture.wires["pooled"] for kind in kinds]
    assert [(wire.size, wire.fixed) for wire in pooled] == [(64, False), (24, True)]


@pytest.mark.parametrize("kind, size", [("vit", 128), ("vit with a small pooler", 24)])
def test_the_pooler_keeps_a_size_of_its_own_and_else_goes_with_the_width(sources, tmp_path, kind, size):
    growth.grow(sources / kind, tmp_path / "grown", hidden_size=128)
    config = json.loads((tmp_path / "grown/config.json").read_text())
    assert (config["pooler_output_size"], config["image_size"], config["patch_size"]) == (size, 12, 4)


def test_what_makes_numbers_of_images_travels(sources, tmp_path):
    growth.grow(sources / "vit", tmp_path / "grown", hidden_size=128)
    name = "preprocessor_config.json"
    assert (tmp_path / "grown" / name).read_bytes() == (sources / "vit" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_names_in_memory_lead_to_those_on_disk(sources, kind):
    source = Source(Checkpoint(sources / kind))
    names = {name for name, _ in loaded(sources / kind, kind).named_parameters()}
    assert {source.model.named(name) for name in names} == set(source.table)
    assert len(names) == len(source.table)


def test_a_masked_image_model_is_refused_by_its_tensors(sources, tmp_path):
    (tmp_path / "masked").mkdir()
    for file in (sources / "vit").iterdir():
        (tmp_path / "masked" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(sources / "vit/model.safetensors")
    save_file(
        tensors | {"vit.embeddings.mask_token": torch.zeros(1, 1, 64)}, tmp_path / "masked/model.safetensors"
    )
    with pytest.raises(Refusal, match="unknown: vit.embeddings.mask_token, missing: none"):
        growth.grow(tmp_path / "masked", tmp_path / "grown", hidden_size=128)
