"""FINE: factors that layers share, resized in depth and width, of which S alone learns."""

import json

import pytest
import torch
from checkpoints import ALL, FAMILIES, PLAIN
from outputs import error, run

import growth
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.learned.factors import factorised
from growth.loading import load_model, quiet
from growth.methods import Fine, Net2Net
from growth.methods.fine import between
from growth.plan import Source
from growth.sizes import Sizes
from growth.training.data import Windows


@pytest.fixture(scope="session")
def factored(tmp_path_factory):
    """name, dtype -> the folder of a checkpoint."""
    made = {}

    def make(name, dtype=torch.float64, **sizes):
        key = name, dtype, *sorted(sizes.items())
        if key not in made:
            with quiet():
                made[key] = ALL[name](tmp_path_factory.mktemp("fine") / "src", dtype, **sizes)
        return made[key]

    return make


def weights(folder):
    made = Checkpoint(folder)
    return {name: made.read(name) for name in made.names}


@pytest.mark.parametrize("name", PLAIN)
def test_all_columns_give_back_every_matrix_of_every_layer(factored, name):
    source = Source(Checkpoint(factored(name)))
    bases = factorised(source)
    layered = source.model.architecture.layered
    assert set(bases) == {name for name, weight in layered.items() if weight.reads} != set()
    for (weight, layer), _ in source.place.items():
        if weight in bases:
            x, basis = source.read(weight, layer), bases[weight]
            for side in (basis.written, basis.read):
                torch.testing.assert_close(side.T @ side, torch.eye(len(side)).double(), rtol=0, atol=1e-10)
            torch.testing.assert_close(basis.whole(basis.own(x)), x, rtol=0, atol=1e-10)
            assert basis.error == 0.0


def test_the_shared_columns_are_the_singular_vectors_of_all_layers_side_by_side(factored):
    source = Source(Checkpoint(factored("llama")))
    name = "layers.{}.mlp.up.weight"
    layers = [source.read(name, i) for i in range(3)]
    basis = factorised(source, 5)[name]
    written = torch.linalg.svd(torch.cat(layers, 1))[0][:, :5]
    read = torch.linalg.svd(torch.cat(layers, 0))[2][:5].T
    for got, truth in ((basis.written, written), (basis.read, read)):
        torch.testing.assert_close((truth.T @ got).abs(), torch.eye(5).double(), rtol=0, atol=1e-8)
    made = [written @ written.T @ x @ read @ read.T for x in layers]
    lost = sum((x - y).square().sum() for x, y in zip(layers, made))
    assert basis.error == pytest.approx((lost / sum(x.square().sum() for x in layers)).sqrt().item())


def test_more_columns_lose_less_and_growth_json_tells_how_much(factored, tmp_path):
    src, lost = factored("gpt_neox"), []
    for rank in (4, 16, 48):
        out = tmp_path / f"{rank}"
        report = growth.grow(src, out, Sizes(layers=4), Fine(rank=rank))
        errors = json.loads((out / "growth.json").read_text())["errors"]
        assert not report.lossless and report.details["errors"] == errors
        told = {name.replace("{}", "*"): f"{x:.1%} of its norm is left out" for name, x in errors.items()}
        assert report.lines == tuple(f"{name}: {x} at this rank" for name, x in told.items())
        assert not any(row.origin == "copied" for row in report.plan.rows if "dense.weight" in row.name)
        lost.append(errors["layers.{}.mlp.up.weight"])
        up = weights(out)["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
        assert torch.linalg.matrix_rank(up) == rank
    assert 1 > lost[0] > lost[1] > lost[2] > 0.01


@pytest.mark.parametrize("sizes", [{"hidden_size": 128, "num_layers": 5}, {"hidden_size": 112}], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_a_family_is_kept_at_full_rank_where_net2net_keeps_it(factored, tmp_path, name, sizes):
    """By its maps, and by the product of all factors alike, which is the way of every lower rank."""
    folder = factored(name)
    _, truth = run(folder, torch.float64)
    whole = growth.grow(folder, tmp_path / "whole", method="fine", **sizes)
    net2net = growth.grow(folder, method="net2net", dry_run=True, **sizes)
    assert whole.lossless == net2net.lossless == (sizes["hidden_size"] == 128)
    growth.grow(folder, tmp_path / "factors", method=Fine(rank=10**6), **sizes)
    found = [run(tmp_path / made, torch.float64)[1] for made in ("whole", "factors")]
    for got in found:
        assert error(truth, got) < 1e-9 if whole.lossless else error(truth, got) > 1e-4
    ours, theirs = weights(tmp_path / "factors"), weights(tmp_path / "whole")
    for tensor, x in theirs.items():
        torch.testing.assert_close(ours[tensor], x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PLAIN)
def test_a_family_of_any_size_is_made_of_few_columns(factored, tmp_path, name):
    folder = factored(name, torch.float32)
    report = growth.grow(folder, tmp_path / "out", Sizes(128, 5), Fine(rank=8, added="nearest"))
    assert not report.lossless and 0 < max(report.details["errors"].values()) < 1
    _, got = run(tmp_path / "out", torch.float32)
    assert all(x.isfinite().all() for x in got)


def test_layers_in_between_are_mixes_of_their_neighbours(factored, tmp_path):
    assert between(3, 5) == (
        ((0, 1.0),),
        ((0, 0.5), (1, 0.5)),
        ((1, 1.0),),
        ((1, 0.5), (2, 0.5)),
        ((2, 1.0),),
    )
    assert between(1, 3) == (((0, 1.0),),) * 3 and between(2, 2) == (((0, 1.0),), ((1, 1.0),))
    src = factored("gpt_neox")
    growth.grow(src, tmp_path / "out", Sizes(layers=5), Fine(rank=10**6, added="linear"))
    old, new = weights(src), weights(tmp_path / "out")
    name = "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight"
    mean = (old[name.format(0)] + old[name.format(1)]) / 2
    torch.testing.assert_close(new[name.format(1)], mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(new[name.format(2)], old[name.format(1)], rtol=0, atol=1e-9)


def test_layers_follow_an_order(factored, tmp_path):
    src = factored("gpt_neox")
    report = growth.grow(src, tmp_path / "out", method=Fine(rank=10**6, order="0,0,1,2"))
    _, truth = run(src, torch.float64)
    assert error(truth, run(tmp_path / "out", torch.float64)[1]) < 1e-9
    x = weights(tmp_path / "out")["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"]
    assert not x.any() and "layer" not in " ".join(report.notes)


@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_s_alone_learns_and_what_is_written_is_what_learned(tmp_path, text, family, rank):
    src = FAMILIES[family](tmp_path / "src")
    how = Fine(data=text, steps=6, batch_size=4, learning_rate=5e-3, rank=rank, noise=0.0)
    before = Fine(rank=rank or 10**6, noise=0.0)
    start = growth.grow(src, tmp_path / "start", Sizes(192, 4), before)
    report = growth.grow(src, tmp_path / "learned", Sizes(192, 4), how)
    assert report.flops > start.flops > 0 and not report.lossless
    record = Checkpoint(tmp_path / "learned").record()
    assert record["steps"] == 6 and record["training_losses"][0] > 0 and record["rank"] == rank
    ids = torch.tensor([list(text.read_bytes()[:32])])
    losses = []
    for made in ("start", "learned"):
        model = load_model(tmp_path / made).eval()
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    assert losses[1] < losses[0] - 0.05
    # what learned lies in the span of the shared columns, widened
    source = Source(Checkpoint(src))
    grown = Source(Checkpoint(tmp_path / "learned"))
    bases = factorised(source, rank)
    for name, basis in bases.items():
        x = grown.read(name, 0).double()
        narrow = x[: len(basis.written)] if x.shape[0] > len(basis.written) else x
        rest = narrow - basis.written @ (basis.written.T @ narrow)
        assert rest.norm() < 1e-4 * narrow.norm(), name
    vectors = [name for name, x in weights(tmp_path / "learned").items() if x.ndim == 1]
    ours, theirs = weights(tmp_path / "learned"), weights(tmp_path / "start")
    assert vectors and all(torch.equal(ours[name], theirs[name]) for name in vectors)


def test_what_does_not_fit_is_refused(factored, text, tmp_path):
    few = Windows(torch.arange(4096) % 61, 16)
    for why, name, options in (
        ("rank: expected at least 1, got 0", "llama", {"rank": 0}),
        ("added: expected one of idle, nearest, linear, got now", "llama", {"added": "now"}),
        ("steps: expected at least 1 with data, got 0", "llama", {"data": text}),
        ("data: expected text that fine learns from, got none", "llama", {"steps": 3}),
        (
            "order: expected none, .* got .0, 1, 1.*choose nearest",
            "llama",
            {"added": "linear", "order": (0, 1, 1)},
        ),
        ("fine: expected layers of one kind", "lci RAM", {"rank": 4, "added": "linear"}),
        ("fine: expected layers of one kind", "lci RAM", {"data": few, "steps": 3}),
    ):
        with pytest.raises(Refusal, match=why):
            growth.grow(factored(name), tmp_path / "out", Sizes(layers=4), Fine(**options))
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_head_is_factorised_and_does_not_learn(factored, text, tmp_path):
    src = factored("bert headless")
    growth.grow(src, tmp_path / "out", Sizes(layers=4), Fine(rank=8))
    with pytest.raises(Refusal, match="fine: expected a causal or a masked language model, got BertModel"):
        growth.grow(src, tmp_path / "learned", Sizes(layers=4), Fine(data=text, steps=1))


def test_noise_is_net2net_s(factored, tmp_path):
    src = factored("gpt_neox")
    growth.grow(src, tmp_path / "fine", Sizes(128), Fine(rank=10**6, noise=0.3))
    growth.grow(src, tmp_path / "net2net", Sizes(128), Net2Net(noise=0.3))
    ours, theirs = weights(tmp_path / "fine"), weights(tmp_path / "net2net")
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=0, atol=1e-9)
