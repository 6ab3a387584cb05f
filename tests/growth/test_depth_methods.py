"""The methods of depth: their orders, what they preserve, what training is to hold still."""

import pytest
import torch
from checkpoints import ALL, PLAIN
from outputs import error, run

import growth
from growth import GStack, Interpolate, LlamaPro, Mslt, Sizes, Solar, Staged
from growth.loading import quiet
from growth.methods import METHODS

LOST = "layers: not every layer acts once and in order"
NOISY = "layers: some that act are not those of the source, but for noise"
# A method, its number of layers from 3, the order that this gives.
DEEPER = [
    (GStack(), 12, "012012012012"),
    (GStack(), 6, "012012"),
    (Solar(), 4, "0112"),
    (Solar(), 6, "012012"),
    (Mslt(), 5, "01212"),
    (Mslt(), 6, "012012"),
    (Interpolate(skip_first=1), 5, "01122"),
    (Interpolate(skip_first=1, skip_last=1), 6, "011112"),
    (Interpolate(zero_outputs=True), 6, "001122"),
    (Interpolate(zero_outputs=True, copy_noise=0.5), 5, "00112"),
    (LlamaPro(), 4, "0122"),
    (LlamaPro(), 5, "01122"),
    (LlamaPro(), 6, "001122"),
    (LlamaPro(), 8, "00111222"),
    (LlamaPro(insert="0,2"), 5, "00122"),
    (LlamaPro(insert=(1, 1)), 5, "01112"),
    (Staged(), 6, "012012"),
    (Staged(place="alternate"), 6, "001122"),
    (Staged(added="copy"), 6, "012012"),
]


def lossless(method):
    """What the files of the methods say."""
    kept = isinstance(method, LlamaPro) or method in (Staged(), Staged(place="alternate"))
    return kept or getattr(method, "zero_outputs", False)


def title(method):
    options = {name: x for name, x in vars(method).items() if x != getattr(type(method)(), name)}
    return f"{method.name} {options}"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """name -> the folder of such a checkpoint in float64, its configuration and what it gives."""
    made = {}

    def make(name):
        if name not in made:
            with quiet():
                folder = ALL[name](tmp_path_factory.mktemp("source") / "src", torch.float64)
            made[name] = folder, *run(folder, torch.float64)
        return made[name]

    return make


@pytest.mark.parametrize("method, layers, order", DEEPER, ids=lambda x: title(x) if x in METHODS else str(x))
def test_layers_stand_in_the_order_that_the_paper_has(method, layers, order):
    assert method.layers(3, layers) == tuple(map(int, order))
    assert method.depth(None, 3) == layers or getattr(method, "insert", None) is None


PROMISES = [GStack(times=2), Solar(), Mslt(), Interpolate(copy_noise=0.01), Interpolate(zero_outputs=True)]
PROMISES += [LlamaPro(), Staged(), Staged(place="alternate", added="copy")]


@pytest.mark.parametrize("method", PROMISES, ids=title)
@pytest.mark.parametrize("name", PLAIN)
def test_a_family_keeps_its_function_exactly_where_the_method_says_so(source, tmp_path, name, method):
    folder, old, truth = source(name)
    report = growth.grow(folder, tmp_path / "out", Sizes(layers=6), method)
    _, got = run(tmp_path / "out", torch.float64)
    assert report.lossless == lossless(method)
    if report.lossless:
        assert not report.notes and error(truth, got) < 1e-9
    else:
        assert any(LOST in note for note in report.notes) and error(truth, got) > 1e-4
