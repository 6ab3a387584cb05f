"""What is fastest on a GPU is what its launchers then choose; here time is made up."""

import json

import pytest
import torch
from devices import GPU

pytest.importorskip("triton")

from benchmarks import measure, tune
from benchmarks.cases import FORWARD, Case
from lcikernels.ops import tuned
from lcikernels.ops.retention import launch, tiles

SIZES = {"B": 1, "T": 20, "H": 1, "K": 8, "V": 128}  # two candidates: one program has all columns, or half
ASKED = ("fused", 8, 128, torch.float32, 90)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Where `tune` writes, of one call of which the second tile takes half the time of the first."""
    times = iter((2.0, 1.0))
    drawn = tune.drawn
    monkeypatch.setattr(measure, "DEVICE", GPU)
    monkeypatch.setattr(measure, "gpu_seconds", lambda call: (call(), next(times))[1])
    monkeypatch.setattr(tune, "drawn", lambda *of: {name: u.float() for name, u in drawn(*of).items()})
    monkeypatch.setattr(tune, "OPS", {"retention": tune.OPS["retention"]})
    monkeypatch.setattr(tune, "cases", lambda op: [Case(op, SIZES, FORWARD)])
    monkeypatch.setattr(tuned, "table", lambda op, gpu: tmp_path / f"{gpu}.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A chip")
    for cached in (tuned.measured, tiles.chosen):
        cached.cache_clear()
    yield tmp_path / "A chip.json"
    for cached in (tuned.measured, tiles.chosen):
        cached.cache_clear()


def test_the_fastest_tile_is_written_and_chosen_on_that_gpu_and_no_other(table, monkeypatch):
    tune.main()
    first, second = tiles.candidates(*ASKED)
    assert json.loads(table.read_text()) == {tiles.key(*ASKED[:4], False): list(second)}
    assert tiles.chosen(*ASKED, gpu="A chip") == second and tiles.chosen(*ASKED, gpu="Another") == first
    q, v, rate = torch.zeros(1, 20, 1, 8), torch.zeros(1, 20, 1, 128), torch.zeros(1)
    monkeypatch.setattr(launch, "name", lambda x: "A chip")
    monkeypatch.setattr(launch, "device", lambda x: (1, 90))
    assert launch.Problem(q, q, v, rate, 1.0, None).tile(*ASKED[:3]) == second


def test_no_candidate_is_begun_when_time_is_up(table):
    tune.main(until=0)
    assert json.loads(table.read_text()) == {}
    assert tiles.chosen(*ASKED, gpu="A chip") == tiles.candidates(*ASKED)[0]


KEY = tiles.key(*ASKED[:4], False)
OLD = {KEY: [1, 2, 3, 4, 5]}, {KEY: [1, 2]}, {KEY: {"BX": 8}}, [1]


@pytest.mark.parametrize("text", [*map(json.dumps, OLD), json.dumps(OLD[0])[:-3], ""], ids=str)
def test_a_table_that_is_old_or_broken_is_passed_over(table, text):
    table.write_text(text)
    assert tiles.chosen(*ASKED, gpu="A chip") == tiles.candidates(*ASKED)[0]


def test_each_call_of_ours_is_tuned_once():
    assert tune.tiles_of("retention") is tiles and not tune.tiles_of("kronecker_expand, dense maps")
    for op in filter(tune.tiles_of, tune.OPS):
        calls = [(case.mode, str(case.sizes)) for case in tune.cases(op)]
        assert calls and len(calls) == len(set(calls))
