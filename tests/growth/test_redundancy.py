"""How alike layers and units are: the measures by themselves, and what inspect and shrink make of them."""

import json
import sys

import pytest
import torch
from checkpoints import ALL, neox

import growth
from growth.__main__ import main
from growth.checkpoint import Checkpoint
from growth.shrinking.likeness import likeness, linear_cka
from growth.shrinking.merging import regression, tied_factors
from growth.shrinking.redundancy import most_alike, redundancy
from growth.shrinking.scores import pivots


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(x):
    return x.T @ x / len(x)


def test_cka_is_one_for_a_rotation_times_a_number_and_small_for_another_draw():
    x = random(400, 8)
    turned = 3 * x @ torch.linalg.qr(random(8, 8, seed=1))[0] + 5
    assert linear_cka(x, turned) == pytest.approx(1)
    assert linear_cka(x, random(400, 8, seed=2)) < 0.05


def test_cka_is_that_of_gram_matrices_of_the_tokens():
    x, y = random(30, 5), random(30, 7, seed=1) + random(30, 5) @ random(5, 7, seed=2)
    centre = torch.eye(30, dtype=torch.float64) - 1 / 30
    K, L = (centre @ part @ part.T @ centre for part in (x, y))
    hsic = (K * L).sum() / ((K * K).sum() * (L * L).sum()).sqrt()
    assert linear_cka(x, y) == pytest.approx(hsic.item())


def test_a_layer_that_only_doubles_the_stream_has_cosine_one_and_adds_all_of_it():
    found = likeness(x := random(2, 9, 6), 2 * x)
    assert found == {
        name: pytest.approx(x) for name, x in (("cosine", 1), ("cka", 1), ("ratio", 4), ("added", 1))
    }


def test_pivots_take_each_direction_once_before_any_copy():
    x = random(200, 6)
    order, left = pivots(moments(torch.cat([x, 2 * x, x[:, :2] + x[:, 2:4]], 1)), 1, 14)
    directions = {unit % 6 if unit < 12 else unit for unit in order[:6]}
    assert len(order[:6]) == len(directions) == 6 and set(order[:6]) <= {*range(6, 14)}
    assert not left[order].any()


def test_where_data_are_few_what_no_single_unit_tells_comes_before_copies():
    x = random(4, 8)
    order, _ = pivots(moments(torch.cat([x, x], 1)), 1, 8)
    assert {unit % 8 for unit in order} == set(range(8))


def test_pivots_of_blocks_take_whole_heads():
    x = random(300, 12)
    order, _ = pivots(moments(torch.cat([x, x[:, :8] @ random(8, 4, seed=3)], 1)), 4, 3)
    spans = torch.cat(
        [torch.cat([x, x[:, :8] @ random(8, 4, seed=3)], 1)[:, 4 * i : 4 * i + 4] for i in order], 1
    )
    assert torch.linalg.matrix_rank(spans) == 12


def test_regression_folds_copies_without_a_loss_and_else_as_ridge_does():
    x = random(500, 5)
    copied = moments(torch.cat([x, x[:, [3, 1]] * torch.tensor([2.0, -1.0], dtype=x.dtype)], 1))
    mix = regression(copied[:5, :5], copied[5:, :5])
    want = torch.zeros(2, 5, dtype=x.dtype)
    want[0, 3], want[1, 1] = 2.0, -1.0
    assert torch.allclose(mix, want, atol=1e-12)
    y = x @ random(5, 3, seed=1) + 0.1 * random(500, 3, seed=2)
    both = moments(torch.cat([x, y], 1))
    mix = regression(both[:5, :5], both[5:, :5])
    assert (y - x @ mix.T).square().mean() < 1.01 * (
        y - x @ torch.linalg.lstsq(x, y).solution
    ).square().mean()


def test_a_tied_head_counts_what_stays_as_often_as_its_copies_stood_there():
    table, x = random(40, 6), random(300, 6, seed=1)
    index = torch.tensor([0, 1, 2, 3, 4, 5, 0, 3, 3])
    wide, copied = table[:, index], x[:, index]
    factors = tied_factors(wide.T @ wide, moments(copied), torch.arange(6))
    assert torch.allclose(factors, torch.tensor([2, 1, 1, 3, 1, 1], dtype=x.dtype), atol=1e-12)


def test_units_are_as_alike_as_their_nearest():
    x = random(4000, 6)
    assert most_alike(torch.cov(torch.cat([x, -x], 1).T), 1) == pytest.approx(1)
    assert most_alike(torch.cov(x.T), 1) < 0.05
    turned = x.view(-1, 2, 3) @ torch.linalg.qr(random(3, 3, seed=4))[0]
    assert most_alike(torch.cov(torch.cat([x, turned.flatten(1)], 1).T), 3) == pytest.approx(1)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "lci RAM", "t5"])
def test_layers_that_add_nothing_are_found_and_dropped_first(name, tmp_path, text):
    small, cache = ALL[name](tmp_path / "small", torch.float64, vocab_size=256), tmp_path / "cache"
    growth.grow(small, tmp_path / "large", num_layers=5)
    found = redundancy(tmp_path / "large", text, cache=cache)
    idle = [row.layer for row in found.layers if row.added == 0]
    assert len(idle) == 2 * len(found.drops)
    for order in found.drops.values():
        assert set(order[:2]) <= set(idle)
    growth.shrink(
        tmp_path / "large", tmp_path / "back", num_layers=3, score="redundancy", data=text, cache=cache
    )
    want, got = Checkpoint(small), Checkpoint(tmp_path / "back")
    assert all(torch.equal(want.read(x), got.read(x)) for x in want.names)


def test_inspect_prints_a_row_for_each_layer_and_what_shrink_would_drop(tmp_path, text, monkeypatch, capsys):
    folder = neox(tmp_path / "src")
    words = ["inspect", folder, "--redundancy", "--data", text, "--cache", tmp_path / "cache"]
    printed = []
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["growth", *map(str, [*words, *more])])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        printed.append(capsys.readouterr().out)
    told = json.loads(printed[1])
    order = ", ".join(map(str, told["drops"][""]))
    assert f"layers, the first to be dropped first: {order}" in printed[0]
    assert [row["layer"] for row in told["layers"]] == [0, 1, 2]
    for row in told["layers"]:
        assert f"{row['influence']:.3f}" in printed[0]
        assert 0 <= row["heads"] <= 1 and 0 <= row["neurons"] <= 1
    assert told["layers"][2]["next"] is None and 0 < told["layers"][0]["next"] <= 1
    growth.shrink(
        folder, tmp_path / "dst", num_layers=2, score="redundancy", data=text, cache=tmp_path / "cache"
    )
    kept = json.loads((tmp_path / "dst" / "growth.json").read_text())["layers"][0]["kept"]
    assert set(range(3)) - set(kept) == {told["drops"][""][0]}


def test_a_grown_models_copies_are_alike(tmp_path, text):
    growth.grow(neox(tmp_path / "small"), tmp_path / "large", growth.Sizes(192), "net2net")
    for folder, alike in (("small", False), ("large", True)):
        found = redundancy(tmp_path / folder, text, cache=tmp_path / "cache")
        assert all((min(row.heads, row.neurons) > 0.999) is alike for row in found.layers)
