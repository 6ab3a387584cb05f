"""The methods of depth: their orders, what they preserve, what training is to hold still."""

from dataclasses import replace

import command
import pytest
import torch
from checkpoints import ALL, FAMILIES, PLAIN
from outputs import error, run
from safetensors.torch import load_file

import growth
from growth import GStack, Interpolate, Lemon, LlamaPro, Mslt, Sizes, Solar, Staged, growth_timing
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.loading import load_model, quiet
from growth.lossless import lost
from growth.methods import METHODS
from growth.plan import Source
from growth.sizes import resized
from growth.training.freeze import transferred

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


@pytest.mark.parametrize("method, layers, order", DEEPER, ids=str)
def test_layers_stand_in_the_order_that_the_paper_has(method, layers, order):
    assert method.layers(3, layers) == tuple(map(int, order))
    assert method.depth(None, 3) == layers or getattr(method, "insert", None) is None


PROMISES = [GStack(times=2), Solar(), Mslt(), Interpolate(copy_noise=0.01), Interpolate(zero_outputs=True)]
PROMISES += [LlamaPro(), Staged(), Staged(place="alternate", added="copy")]


@pytest.mark.covering(3)
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


@pytest.mark.parametrize("name", PLAIN)
def test_staged_training_s_width_is_exact_in_every_family(source, tmp_path, name):
    folder, _, truth = source(name)
    report = growth.grow(folder, tmp_path / "out", Sizes(hidden=128, layers=6), Staged())
    _, got = run(tmp_path / "out", torch.float64)
    assert report.lossless and error(truth, got) < 1e-9


def test_staged_training_s_width_is_two_blocks_on_a_diagonal(source, tmp_path):
    folder = source("llama")[0]
    growth.grow(folder, tmp_path / "out", Sizes(hidden=128), Staged(noise=0.0))
    small, wide = (load_file(x / "model.safetensors") for x in (folder, tmp_path / "out"))
    for part in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
    ):
        w = small[name := f"model.layers.1.{part}.weight"]
        assert torch.equal(wide[name], torch.block_diag(w, w)), part
    head = small["lm_head.weight"]
    assert torch.equal(wide["lm_head.weight"], torch.cat([head, head], 1) / 2)
    norm = small["model.layers.1.input_layernorm.weight"]
    assert torch.equal(wide["model.layers.1.input_layernorm.weight"], torch.cat([norm, norm]))


def layer_of(name):
    """The number of the layer that a tensor is in, None outside."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


ALONE = [("gpt_neox", LlamaPro(insert="0,2"), {1, 4}), ("gpt2", Mslt(), {3, 4}), ("bert", LlamaPro(), {2, 4})]


@pytest.mark.parametrize("name, method, alone", ALONE, ids=str)
def test_only_added_layers_train_at_first_and_all_do_after_a_plateau(tmp_path, text, name, method, alone):
    """By any of both: a window's loss does not improve by a half."""
    source, grown = FAMILIES[name](tmp_path / "src"), tmp_path / "grown"
    report = growth.grow(source, grown, Sizes(layers=5), method)
    names = {row.name: layer_of(row.name) in alone for row in report.plan.rows}
    assert set(transferred(grown)) == {name for name, added in names.items() if not added}
    assert f"{len(transferred(grown))} of {len(names)} tensors are to be held still" in report.lines[0]
    before = load_file(grown / "model.safetensors")
    how = {
        "steps": 4,
        "batch_size": 2,
        "sequence_length": 16,
        "learning_rate": 1e-2,
        "warmup": 0,
        "window": 1,
    }
    growth.train(grown, text, tmp_path / "alone", freeze="transferred", **how)
    after = load_file(tmp_path / "alone" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))}
    assert moved and moved <= {name for name, added in names.items() if added}
    assert {layer_of(name) for name in moved} == alone
    then = growth.train(
        grown, text, tmp_path / "all", freeze="transferred", unfreeze="plateau", threshold=0.5, **how
    )
    after = load_file(tmp_path / "all" / "model.safetensors")
    assert then.unfrozen_at == 2
    assert any(not torch.equal(before[name], after[name]) for name, added in names.items() if not added)


@pytest.mark.parametrize("method", [LlamaPro(), Mslt()], ids=title)
def test_without_added_layers_nothing_is_held_still(source, method):
    report = growth.grow(source("llama")[0], sizes=Sizes(hidden=128), method=method, dry_run=True)
    assert not report.lines and not any(row.freeze for row in report.plan.rows)


@pytest.mark.parametrize("method", [Lemon(), LlamaPro(), Interpolate(zero_outputs=True), Staged()], ids=title)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_what_an_added_layer_writes_with_gets_a_gradient(source, tmp_path, name, method):
    """Zero gains of norms before it would leave it as it is for ever."""
    growth.grow(source(name)[0], tmp_path / "out", Sizes(layers=6), method)
    model = load_model(tmp_path / "out")
    ids = torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    last = [x.grad for name, x in model.named_parameters() if layer_of(name) == 5]
    assert last and any(grad is not None and grad.abs().max() > 0 for grad in last)


def test_copies_start_off_their_originals_by_as_much_as_is_asked(source, tmp_path):
    folder = source("gpt2")[0]
    growth.grow(folder, tmp_path / "out", Sizes(layers=6), Interpolate(copy_noise=0.25))
    small, deep = (load_file(x / "model.safetensors") for x in (folder, tmp_path / "out"))
    for name, x in deep.items():
        if (layer := layer_of(name)) is None:
            continue
        original = small[name.replace(f".{layer}.", f".{layer // 2}.")]
        if layer % 2 and x.ndim == 2:
            off = (x - original).std() / original.std()
            assert 0.22 < off < 0.28, name
        else:
            assert torch.equal(x, original), name


def test_noise_shows_only_where_a_layer_acts(source):
    """The copies that are noisy add nothing, here; maps that put noise on others are found out."""
    folder = source("llama")[0]
    method = Interpolate(copy_noise=0.1, zero_outputs=True)
    assert not growth.grow(folder, sizes=Sizes(layers=6), method=method, dry_run=True).notes
    model = Source(Checkpoint(folder)).model
    new = model.family.model(resized(model, Sizes(layers=6), method.layers), model.parts).architecture
    old = model.architecture
    maps = method.maps(old, new)
    assert {name.split(".")[1] for name in maps.parted} == {"1", "3", "5"} and not lost(old, new, maps)
    assert lost(old, new, replace(maps, parted={"layers.2.mlp.up.weight": 0.1})) == [NOISY]


@pytest.mark.parametrize("symmetry", ["projection", "comp"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_noise_of_copied_layers_leaves_copies_of_units_alike(source, tmp_path, name, symmetry):
    """What parts these is not to be seen by layers that are to add nothing."""
    method = Interpolate(copy_noise=0.1, zero_outputs=True, noise=1.0, symmetry=symmetry)
    report = growth.grow(source(name)[0], tmp_path / "out", Sizes(hidden=128, layers=6), method)
    _, got = run(tmp_path / "out", torch.float64)
    assert report.lossless and error(source(name)[2], got) < 1e-9


@pytest.mark.parametrize("method", [name for name, x in METHODS.items() if "num-layers" in x.grows])
def test_every_method_of_depth_takes_an_order_from_the_command_line_without_a_number(
    source, text, tmp_path, monkeypatch, capsys, method
):
    learns = ("--data", text) if METHODS[method]().needs_head else ()
    words = "grow", source("gpt2")[0], "--method", method, "--order", "0,1,1,2", "--dry-run", *learns
    code, out, err = command.run(monkeypatch, capsys, *words)
    assert code == 0 and "num-layers 3 -> 4" in out, err
    made = "transformer.h.2.mlp.c_fc.weight"
    (row,) = (line for line in out.splitlines() if line.startswith(made))
    assert ("a new layer" if method == "msg" else "transformer.h.1.mlp.c_fc.weight") in row


REFUSALS = {
    "an absent layer": (("lemon", "--order", "0,1,5"), "order: expected layers from 0 to 2, got 5; name"),
    "an order that is too short": (
        ("stack", "--order", "0,1,1,2", "--num-layers", 5),
        "got 4, 0,1,1,2; leave",
    ),
    "an order of words": (("solar", "--order", "a,b"), "order: expected layer numbers such as 0,1,1,2"),
    "an order below zero": (("mslt", "--order", "0,-1"), "order: expected layer numbers such as 0,1,1,2"),
    "a cut model": (
        ("gstack", "--num-layers", 7),
        "multiple of the source's 3, got 7; choose 9, or method stack",
    ),
    "other times": (("gstack", "--num-layers", 6, "--times", 3), "expected 3 times the source's 3, got 6"),
    "no times": (("gstack", "--times", 0), "times: expected at least 1, got 0"),
    "an odd overlap": (("solar", "--num-layers", 5), "expected an even number from 4 to 6"),
    "more than two copies": (("solar", "--num-layers", 8), "got 8; choose 6, or method stack"),
    "two stages at once": (
        ("mslt", "--num-layers", 7),
        "expected at most 6, for a stage copies each layer once",
    ),
    "a position beyond": (("llama-pro", "--insert", "3"), "insert: expected layers from 0 to 2, got 3"),
    "positions that are no numbers": (("llama-pro", "--insert", "last"), "insert: expected layer numbers"),
    "positions and another number": (
        ("llama-pro", "--insert", "1,2", "--num-layers", 7),
        "insert: expected a position for each of 4 layers, got 2, 1,2; leave num-layers out",
    ),
    "positions and an order": (("llama-pro", "--insert", "1", "--order", "0,1,1,2"), "insert: expected none"),
    "nothing to copy": (
        ("interpolate", "--num-layers", 5, "--skip-first", 2, "--skip-last", 1),
        "skip-first, skip-last: expected fewer than the source's 3 layers, got 2 and 1",
    ),
    "less than no noise": (("interpolate", "--copy-noise", -1), "copy-noise: expected at least 0.0"),
    "neither once nor twice": (
        ("staged", "--num-layers", 5),
        "num-layers: expected the source's 3, or twice",
    ),
    "a width that is not doubled": (
        ("staged", "--hidden-size", 80),
        "expected 128, twice the source's 64, got 80",
    ),
    "one size that is not doubled": (
        ("staged", "--hidden-size", 128, "--ffn-size", 96),
        "staged: ffn: expected 192, twice the source's 96, got 96",
    ),
    "a place of nobody": (("staged", "--num-layers", 6, "--place", "top"), "place: expected one of append"),
    "positions of another method": (
        ("gstack", "--insert", "1"),
        "insert: expected none, for gstack has no use",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_is_one_line_exit_code_2_and_nothing_written(
    source, tmp_path, monkeypatch, capsys, name
):
    (method, *words), message = REFUSALS[name]
    folder = source("llama")[0]
    code, out, err = command.run(
        monkeypatch, capsys, "grow", folder, tmp_path / "out", "--method", method, *words
    )
    assert code == 2 and not out and len(err.splitlines()) == 1 and message in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [GStack(times=2), Mslt(), LlamaPro(), Staged()], ids=title)
def test_stacks_of_other_depths_grow_in_width_alone(tmp_path, method):
    folder = ALL["t5"](tmp_path / "src", num_decoder_layers=2)
    with pytest.raises(
        Refusal, match="num-layers: expected stacks of as many layers, got 3 and 2; change the width"
    ):
        growth.grow(folder, tmp_path / "out", Sizes(layers=6), method)


@pytest.mark.parametrize("parameters, tokens, when", [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9)])
def test_when_to_grow_is_as_the_paper_reckons(parameters, tokens, when):
    found = growth_timing(parameters, 6 * parameters * tokens)
    assert abs(found - when) < 0.005e9


@pytest.mark.parametrize(
    "parameters, flops", [(0, 1e22), (7e9, 1), (float("nan"), 1e22), (7e9, float("inf"))]
)
def test_when_to_grow_asks_for_numbers_that_can_be(parameters, flops):
    with pytest.raises(Refusal, match="expected a finite number above 1"):
        growth_timing(parameters, flops)
