"""What was grown shrinks back to what it was: copies are found, and folded into what they are copies of."""

import pytest
import torch
from checkpoints import ALL, inputs
from exact import exact
from transformers import ViTConfig, ViTForImageClassification

import growth
from growth.checkpoint import Checkpoint
from growth.loading import load_model, quiet
from growth.plan import Source
from growth.sizes import sizes_of
from growth.training.data import Windows
from growth.training.images import Images

NET2NET = ("gpt_neox tied", "qwen2", "gemma2", "bert", "t5 gated", "lci inside WRS", "lci SMA", "qwen2_moe")
VIT = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
VIT |= {"image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": 5}
LEMON = ("gpt2", "gemma3_text", "granite", "lci RRR", "lci learned ARM", "lci SSS", "qwen3_moe")


def windows(count=64, length=32):
    return Windows(
        torch.randint(3, 61, (count * length,), generator=torch.Generator().manual_seed(0)), length
    )


def outputs(folder):
    with quiet(), torch.no_grad():
        model = exact(load_model(folder, torch.float64))
        return model(**inputs(model.config))[0]


def there_and_back(name, folder, method, times, more):
    """(of the source, of what was grown and shrunk again), logits in float64."""
    with quiet():
        ALL[name](folder / "small", torch.float64)
    have = sizes_of(Source(Checkpoint(folder / "small")).model)
    layers = have.layers + (
        0 if name == "bert" else more
    )  # added after-sum layers are the stream's last norm
    large = growth.Sizes(int(have.hidden * times), layers)
    growth.grow(folder / "small", folder / "large", large, method)
    growth.shrink(
        folder / "large",
        folder / "back",
        have,
        score="redundancy",
        data=windows(),
        windows=64,
        cache=folder / "cache",
    )
    return outputs(folder / "small"), outputs(folder / "back")


@pytest.mark.parametrize("name", NET2NET)
def test_a_model_grown_twofold_by_net2net_shrinks_back_to_its_function(name, tmp_path):
    want, got = there_and_back(name, tmp_path, growth.Net2Net(noise=1.0), 2, 2)
    assert (got - want).abs().max() <= 1e-11 * want.abs().max()


@pytest.mark.parametrize("name", LEMON)
def test_a_model_grown_by_half_by_lemon_shrinks_back_to_its_function(name, tmp_path):
    want, got = there_and_back(name, tmp_path, growth.Lemon(), 1.5, 1)
    assert (got - want).abs().max() <= 1e-11 * want.abs().max()


def test_an_image_classifier_shrinks_back_by_images(tmp_path):
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**VIT)).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "small")
    growth.grow(tmp_path / "small", tmp_path / "large", growth.Sizes(96, 5), "net2net")
    images = Images(torch.randn(64, 1, 16, 16), torch.randint(5, (64,)))
    sizes = growth.Sizes(48, 3)
    given = {"score": "redundancy", "data": images, "windows": 64, "cache": tmp_path / "cache"}
    growth.shrink(tmp_path / "large", tmp_path / "back", sizes, **given)
    with quiet(), torch.no_grad():
        pixels = torch.randn(4, 1, 16, 16, dtype=torch.float64)
        want, got = (load_model(tmp_path / x, torch.float64).eval()(pixels).logits for x in ("small", "back"))
    assert (got - want).abs().max() <= 1e-11 * want.abs().max()


def test_without_merging_copies_that_differ_in_noise_are_lost(tmp_path):
    growth.grow(
        ALL["llama"](tmp_path / "small", torch.float64), tmp_path / "large", growth.Sizes(128), "net2net"
    )
    back = {}
    for merge in (True, False):
        growth.shrink(
            tmp_path / "large",
            tmp_path / f"back {merge}",
            growth.Sizes(64),
            score="redundancy",
            data=windows(),
            merge=merge,
            cache=tmp_path / "cache",
        )
        back[merge] = outputs(tmp_path / f"back {merge}")
    want = outputs(tmp_path / "small")
    assert (back[True] - want).abs().max() <= 1e-11 * want.abs().max()
    assert (back[False] - want).abs().max() > 0.1 * want.abs().max()
