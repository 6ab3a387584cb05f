"""Images beside text: what is taken, what is refused, and whole runs of a tiny ViT."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from checkpoints import neox
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import growth
from growth.errors import Refusal
from growth.loading import load_model, quiet
from growth.methods import Ligo, Mango
from growth.sizes import Sizes
from growth.training.images import Images

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PIXELS = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}


def vit(folder, model=ViTForImageClassification, config=ViTConfig, **sizes):
    """A random ViT with what makes numbers of images beside it."""
    torch.manual_seed(0)
    with quiet():
        made = model(config(**SIZES | PIXELS | sizes))
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        made.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.3], "image_std": [0.2]}')
    return folder


def images(N=120, labels=3, **shape):
    """Each class is the quarter that is bright."""
    generator = torch.Generator().manual_seed(0)
    of = torch.arange(N) % labels
    x = 0.3 * torch.randn(N, 1, 8, 8, generator=generator)
    for i, label in enumerate(of):
        row, column = divmod(label.item(), 2)
        x[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 2
    return Images(x, of)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vit(tmp_path_factory.mktemp("images") / "vit")


# ---- the data


def test_items_batches_and_what_is_held_out_keep_images_and_labels_together():
    data = Images(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
    rest, held_out = data.hold_out(3, seed=5)
    assert (len(rest), len(held_out)) == (7, 3)
    assert sorted([*rest.labels.tolist(), *held_out.labels.tolist()]) == list(range(10))
    for part in (rest, held_out, data.sample(4, seed=1)):
        assert part.pixel_values.flatten().tolist() == part.labels.tolist()
        batch = part.batch([2, 0])
        assert batch["pixel_values"].flatten().tolist() == batch["labels"].tolist()
        assert batch["labels"][1] == part[0]["labels"]
    assert torch.equal(data.hold_out(3, seed=5)[1].labels, held_out.labels)


def test_the_fingerprint_tells_pixels_and_labels_apart():
    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])
    prints = {Images(a, b).fingerprint() for a in (x, x + 1) for b in (y, y.flip(0))}
    assert len(prints) == 4 and all(text.startswith("2 images, ") for text in prints)


@pytest.mark.parametrize(
    "pixels, labels, said",
    [
        (
            torch.zeros(2, 8, 8),
            torch.zeros(2).long(),
            r"pixel_values: expected \[N, C, H, W\], float32, got ",
        ),
        (torch.zeros(2, 1, 8, 8).double(), torch.zeros(2).long(), "pixel_values: .* got .*, float64; "),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), r"labels: expected \[N\], int64, got \(2,\), float32; "),
        (torch.zeros(2, 1, 8, 8), torch.zeros(3).long(), "at least one image, and a label .* got 2 and 3; "),
        (torch.zeros(0, 1, 8, 8), torch.zeros(0).long(), "at least one image, .* got 0 and 0; "),
        (torch.full((2, 1, 8, 8), torch.nan), torch.zeros(2).long(), "pixel_values: expected finite"),
    ],
)
def test_what_are_no_images_is_refused(pixels, labels, said):
    with pytest.raises(Refusal, match=said):
        Images(pixels, labels)


def blank(labels=0, shape=(1, 8, 8)):
    return Images(torch.zeros(9, *shape), torch.full((9,), labels))


@pytest.mark.parametrize(
    "data, settings, said",
    [
        (blank(shape=(3, 8, 8)), {}, r"images of \(1, 8, 8\), .* got \(3, 8, 8\)"),
        (blank(shape=(1, 8, 4)), {}, r"images of \(1, 8, 8\), .* got \(1, 8, 4\)"),
        (blank(labels=3), {}, "labels below the model's 3, got 3"),
        (blank(labels=-1), {}, "labels below the model's 3, got -1"),
        (images(9), {"batch_size": 9}, "one batch, 9 images, got 8 images besides 1 held out"),
        (images(1), {}, "data: expected at least 2 images, one to train on and one to measure on, got 1"),
        (images(), {"sequence_length": 8}, "sequence length: expected none, .* got 8 for images"),
        (images(), {"validation": "text"}, "validation: expected Images, which a vit learns from, got text"),
        ("text.txt", {}, "data: expected Images, which a vit learns from, got text"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(folder, tmp_path, data, settings, said):
    with pytest.raises(Refusal, match=said):
        growth.train(folder, data, tmp_path / "out", **{"steps": 2, "batch_size": 2} | settings)
    assert list(tmp_path.iterdir()) == []


def test_labels_of_validation_are_looked_at_too(folder, tmp_path):
    odd = Images(torch.zeros(2, 1, 8, 8), torch.tensor([0, 7]))
    with pytest.raises(Refusal, match="validation: expected labels below the model's 3, got 7"):
        growth.train(folder, images(), tmp_path / "out", steps=2, validation=odd)


def test_images_are_refused_for_a_language_model(tmp_path):
    said = "data: expected text, which a gpt_neox learns from, got Images"
    source = neox(tmp_path / "neox")
    with pytest.raises(Refusal, match=said):
        growth.train(source, images(), tmp_path / "out", steps=2)
    with pytest.raises(Refusal, match=said):
        growth.grow(source, tmp_path / "out", Sizes(layers=4), Ligo(data=images(), steps=1))


@pytest.mark.parametrize(
    "model, config", [(ViTModel, ViTConfig), (DeiTForImageClassificationWithTeacher, DeiTConfig)]
)
def test_a_model_without_one_classifier_does_not_learn(tmp_path, model, config):
    source = vit(tmp_path / "source", model, config)
    with pytest.raises(Refusal, match=f"an image classifier with one head, got {model.__name__}"):
        growth.train(source, images(), tmp_path / "out", steps=2)
    with pytest.raises(Refusal, match=f"an image classifier with one head, got {model.__name__}"):
        growth.grow(source, tmp_path / "out", Sizes(layers=4), Ligo(data=images(), steps=1))


# ---- runs


def test_a_run_lowers_the_mean_cross_entropy_of_the_images_held_out(folder, tmp_path):
    data, held_out = images(150).hold_out(30)
    report = growth.train(
        folder, data, tmp_path / "out", steps=60, batch_size=20, learning_rate=1e-2, validation=held_out
    )
    for at, checkpoint in ((0, folder), (-1, tmp_path / "out")):
        model = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
        logits = model(held_out.pixel_values).logits
        want = F.cross_entropy(logits, held_out.labels).item()
        assert report.curve[at].loss == pytest.approx(want, rel=1e-5)
        assert held_out.accuracy(model) == (logits.argmax(1) == held_out.labels).float().mean().item()
    assert report.curve[-1].loss < report.curve[0].loss / 2 and held_out.accuracy(model) > 0.9
    assert report.settings["data"].startswith("120 images, ") and report.settings["sequence_length"] is None
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "training.json",
        "README.md",
        "preprocessor_config.json",
    }
    card = (tmp_path / "out/README.md").read_text()
    assert "nats an image" in card and "AutoModelForImageClassification.from_pretrained" in card


def test_without_validation_a_twentieth_is_held_out(folder, tmp_path):
    report = growth.train(folder, images(), tmp_path / "out", steps=1, batch_size=8)
    found = report.settings["data"], report.settings["validation"]
    assert [text.split(",")[0] for text in found] == ["114 images", "6 images"]


def test_a_step_follows_the_gradient_of_the_batchs_mean_loss(folder, tmp_path):
    """With one batch there is, AdamW's first step of each matrix tells the sign of each gradient."""
    data = images(12)
    growth.train(
        folder, data, tmp_path / "out", steps=1, batch_size=12, learning_rate=1e-3, warmup=0, validation=data
    )
    before, after = load_model(folder), load_model(tmp_path / "out")
    before(**data.batch(range(12))).loss.backward()
    moved = after.classifier.bias - before.classifier.bias
    assert torch.equal(moved.sign(), -before.classifier.bias.grad.sign())


def test_an_interrupted_run_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch):
    settings = {"steps": 6, "batch_size": 8, "eval_every": 2, "save_every": 2}
    growth.train(folder, images(), tmp_path / "whole", **settings)
    losses, calls = Images.losses, iter(range(3))

    def cut(self, model):
        if next(calls) == 2:
            raise RuntimeError("power cut")
        return losses(self, model)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(Images, "losses", cut)
        growth.train(folder, images(), tmp_path / "cut", **settings)
    growth.train(folder, images(), tmp_path / "cut", resume=True, **settings)
    one, other = (load_model(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- learned growth


@pytest.mark.parametrize("method", [partial(Ligo, noise=2.0), Mango], ids=["ligo", "mango"])
def test_methods_that_learn_learn_from_images(folder, tmp_path, method):
    """From the source's loss, where they start, to a lower one."""
    data = images()
    sizes = Sizes(hidden=32, layers=3)
    learned = method(data=data, steps=30, batch_size=40, learning_rate=3e-2)
    report = growth.grow(folder, tmp_path / "grown", sizes, learned)
    before, after = (data.losses(load_model(x)).mean() for x in (folder, tmp_path / "grown"))
    assert after < before - 0.1 and report.flops > 0
    record = json.loads((tmp_path / "grown/growth.json").read_text())
    assert record["data"] == data.fingerprint() and record["sequence_length"] is None


@pytest.mark.parametrize(
    "model, config", [(ViTForImageClassification, ViTConfig), (DeiTForImageClassification, DeiTConfig)]
)
def test_the_start_of_what_learns_is_the_source(tmp_path, model, config):
    """A rate of almost nothing leaves the lossless start, so that maps, patches and tokens are all right."""
    data, source = images(), vit(tmp_path / "source", model, config, qkv_bias=False)
    learned = Ligo(data=data, steps=1, batch_size=8, learning_rate=1e-12)
    growth.grow(source, tmp_path / "grown", Sizes(hidden=40, layers=3), learned)
    before, after = (data.losses(load_model(x)) for x in (source, tmp_path / "grown"))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_learning_needs_images(folder, tmp_path):
    with pytest.raises(Refusal, match="data: expected Images that ligo learns from, got none"):
        growth.grow(folder, tmp_path / "out", Sizes(layers=3), "ligo")
    with pytest.raises(Refusal, match="data: expected Images, which a vit learns from, got text"):
        growth.grow(folder, tmp_path / "out", Sizes(layers=3), Ligo(data="text.txt"))
