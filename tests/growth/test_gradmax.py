"""GradMax: the function stays, and no other directions of one length have a larger gradient."""

import shutil
import sys

import pytest
import torch
from checkpoints import ALL, VOCAB, inputs, neox, saved
from exact import exact
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, ViTConfig, ViTForImageClassification

import growth
from growth.__main__ import main
from growth.checkpoint import Checkpoint
from growth.demo.corpus import byte_tokenizer
from growth.errors import Refusal
from growth.learned.blocks import blocks_of
from growth.learned.gradients import TOKENS, Outgoing
from growth.loading import load_model, quiet
from growth.plan import Source
from growth.training.data import Windows
from growth.training.images import Images

REFUSED = ("headless", "classifier", "answers", "t5", "mixtral", "_moe")
LEARNING = [name for name in ALL if not any(word in name for word in REFUSED)]
IMAGES = {"image_size": 12, "patch_size": 4, "num_labels": 5, "hidden_size": 32, "num_hidden_layers": 2}
IMAGES |= {"num_attention_heads": 4, "intermediate_size": 48}
MORE = 20


def windows():
    return Windows(torch.randint(3, VOCAB, (320,), generator=torch.Generator().manual_seed(0)), 20)


def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(16, 3, 12, 12, generator=generator)
    return Images(pixels, torch.randint(5, (16,), generator=generator))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    def make(name, dtype=torch.float64):
        folder = tmp_path_factory.mktemp("source") / "src"
        with quiet():
            if name == "vit":
                return saved(ViTForImageClassification, ViTConfig(**IMAGES), folder, dtype)
            ALL[name](folder, dtype, **({"vocab_size": 257} if "bert" in name else {}))
        if "bert" in name:  # whose tokenizer needs a mask
            mask = AddedToken("<mask>", special=True)
            tokenizer = byte_tokenizer()
            tokenizer.add_special_tokens({"mask_token": mask})
            tokenizer.save_pretrained(folder)
        return folder

    return make


class Grown:
    """A grown checkpoint in memory, and the weights of its new neurons by their own names."""

    def __init__(self, folder, data):
        self.source = Source(Checkpoint(folder))
        self.model = exact(load_model(folder, torch.float64))
        seen = self.source.model
        self.parameters = {seen.named(name): x for name, x in self.model.named_parameters()}
        self.blocks = list(blocks_of(seen.architecture, {x for x in seen.architecture.wires if "ffn" in x}))

    def part(self, weight, layer, gradient=False):
        name, entry, part = self.source.place[weight, layer]
        x = self.parameters[name]
        return entry.from_disk((x.grad if gradient else x).detach())[part]

    def turn(self, block, columns):
        """Writes other new columns of down."""
        name, entry, _ = self.source.place[block.down, block.layer]
        x = torch.cat([self.part(block.down, block.layer)[:, :-MORE], columns], 1)
        self.parameters[name].data.copy_(entry.to_disk([x]))

    def pulls(self, batches):
        """The gradients of what new neurons read, of each block: [neurons, D]."""
        self.model.zero_grad()
        for batch in batches:
            given = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
            self.model(**given).loss.backward()
        return [self.part(block.up, block.layer, gradient=True)[-MORE:] for block in self.blocks]


def grown(folder, data, tmp_path, monkeypatch, **options):
    """The grown checkpoint, and the batches that were asked."""
    asked = []
    fit = Outgoing.fit
    monkeypatch.setattr(Outgoing, "fit", lambda self: (asked.extend(self.batches()), fit(self))[1])
    old = Source(Checkpoint(folder)).model
    ffn = next(wire.size for name, wire in old.architecture.wires.items() if "ffn" in name)
    method = growth.GradMax(data=data, batch_size=8, **options)
    report = growth.grow(folder, tmp_path / "out", growth.Sizes(ffn=ffn + MORE), method)
    assert report.lossless and report.flops > 0
    return Grown(tmp_path / "out", data), asked


@pytest.mark.parametrize("name", [*LEARNING, "vit"])
def test_the_function_stays_and_no_directions_at_random_have_a_larger_gradient(
    source, tmp_path, monkeypatch, name
):
    folder, data = source(name), images() if name == "vit" else windows()
    new, batches = grown(folder, data, tmp_path, monkeypatch)
    old = exact(load_model(folder, torch.float64))
    probe = {"pixel_values": data.pixel_values[:2].double()} if name == "vit" else inputs(old.config)
    with torch.no_grad():
        truth, got = (model(**probe).logits for model in (old, new.model))
    assert (got - truth).abs().max() < 1e-9 * truth.abs().max()
    best, generator = [x.norm() for x in new.pulls(batches)], torch.Generator().manual_seed(1)
    for _ in range(3):
        for block in new.blocks:
            down = new.part(block.down, block.layer)
            lengths = down.norm(dim=0)
            assert torch.allclose(lengths[-MORE:], lengths[:-MORE].mean().expand(MORE), rtol=1e-5)
            turned = torch.linalg.qr(torch.randn(len(down), MORE, dtype=down.dtype, generator=generator)).Q
            new.turn(block, turned * lengths[-1])
        others = [x.norm() for x in new.pulls(batches)]
        assert all(a > 1.05 * b for a, b in zip(best, others, strict=True))


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_directions_are_singular_vectors(source, tmp_path, monkeypatch, name):
    """A step from them, to where the others leave room, makes no neuron's gradient larger to first order."""
    new, batches = grown(source(name), windows(), tmp_path, monkeypatch, outgoing="max")
    block = new.blocks[0]
    down = new.part(block.down, block.layer)
    lengths = down.norm(dim=0)
    assert torch.allclose(lengths[-MORE:], lengths[:-MORE].max().expand(MORE), rtol=1e-5)
    before, generator = new.pulls(batches)[0].norm(dim=1), torch.Generator().manual_seed(1)
    columns = down[:, -MORE:].clone()
    beside = torch.randn(columns.shape, dtype=columns.dtype, generator=generator)
    if block.gate:  # each has a matrix of its own
        beside -= columns * (beside * columns).sum(0) / lengths[-1] ** 2
    else:  # among what the others leave
        beside -= columns @ (columns.T @ beside) / lengths[-1] ** 2
    beside *= lengths[-1] / beside.norm(dim=0)
    slopes = []
    for step in (1e-3, -1e-3):
        new.turn(block, (columns + step * beside) / (1 + step**2) ** 0.5)
        slopes.append((new.pulls(batches)[0].norm(dim=1) - before) / before)
    assert max(x.max() for x in slopes) < 1e-6
    assert (slopes[0] - slopes[1]).abs().max() < 2e-5


def test_neurons_beyond_the_stream_s_width_are_of_one_length_and_none_alike(source, tmp_path):
    method = growth.GradMax(data=windows(), batch_size=8)
    growth.grow(source("gpt_neox"), tmp_path / "out", growth.Sizes(ffn=96 + 70), method)
    down = Source(Checkpoint(tmp_path / "out")).read("layers.{}.mlp.down.weight", 1)[:, 96:]
    unit = down / down.norm(dim=0)
    assert torch.allclose(down.norm(dim=0), down[:, 0].norm().expand(70), rtol=1e-5)
    assert (unit.T @ unit - torch.eye(70, dtype=down.dtype)).abs().max() < 0.9
    assert torch.linalg.matrix_rank(down[:, :64]) == 64


def test_what_does_not_fit_is_refused(source, tmp_path):
    folder, method = source("gpt_neox"), growth.GradMax(data=windows(), batch_size=8)
    cases = {
        "expected ffn-size alone to grow, got hidden-size 64 -> 128, .*; grow that first, by lemon": (
            folder,
            growth.Sizes(hidden=128),
            method,
        ),
        "data: expected text that gradmax learns from, got none": (
            folder,
            growth.Sizes(ffn=100),
            growth.GradMax(),
        ),
        "gradmax: expected a causal or a masked language model, got T5": (
            source("t5"),
            growth.Sizes(ffn=100),
            method,
        ),
        "data: expected text": (folder, growth.Sizes(ffn=100), growth.GradMax(data=images())),
    }
    for said, (given, sizes, how) in cases.items():
        with pytest.raises(Refusal, match=said):
            growth.grow(given, tmp_path / "out", sizes, how)
    with pytest.raises(Refusal, match="order: expected none, for gradmax adds no layers"):
        growth.GradMax(order="0,1")
    with pytest.raises(Refusal, match="outgoing: expected one of mean, max"):
        growth.GradMax(outgoing="least")
    shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"].fill_(float("nan"))
    save_file(weights, tmp_path / "broken/model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match="gradmax: expected a finite loss of the source, got nan"):
        growth.grow(tmp_path / "broken", tmp_path / "out", growth.Sizes(ffn=100), method)
    odd = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_act="sigmoid",
    )
    saved(GPTNeoXForCausalLM, odd, tmp_path / "odd", torch.float32)
    with pytest.raises(Refusal, match="gradmax: expected an activation that is 0 at 0, got 0.5"):
        growth.grow(tmp_path / "odd", tmp_path / "out", growth.Sizes(ffn=40), method)
    assert not (tmp_path / "out").exists()


def test_the_command_line_reads_text(tmp_path, monkeypatch, capsys):
    neox(tmp_path / "src")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    words = "src", "out", "--method", "gradmax", "--ffn-size", 180, "--data", "text.txt", "--batches", 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["growth", "grow", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and "by gradmax: ffn-size 160 -> 180" in capsys.readouterr().out
    assert growth.check("src", "out").kept
    record = Checkpoint("out").record()
    assert record["lossless"] and record["batches"] == 1 and record["data"].startswith("84 windows")


def test_the_rows_that_are_kept_of_a_gated_block_are_bounded(source, tmp_path, monkeypatch):
    monkeypatch.setattr("growth.learned.gradients.TOKENS", 64)
    seen = []
    settle = Outgoing.settle
    monkeypatch.setattr(
        Outgoing, "settle", lambda self, block, x, g: (seen.append(len(x)), settle(self, block, x, g))
    )
    method = growth.GradMax(data=windows(), batch_size=4)
    growth.grow(source("llama"), tmp_path / "out", growth.Sizes(ffn=110), method)
    assert seen == [64] * 3 and TOKENS > 64
