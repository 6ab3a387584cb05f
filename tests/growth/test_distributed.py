"""Several processes train as one does: the same steps, the same losses, killed and resumed on any number."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from checkpoints import LCI, bert, pico
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.utils.data import BatchSampler
from train_ranks import Held, Received, started
from transformers import AutoModelForCausalLM

from growth.costs.machines import H200
from growth.costs.training import Steps, training_of
from growth.demo.corpus import byte_tokenizer
from growth.errors import Refusal
from growth.families import model_of
from growth.training.callbacks import LayerDropping
from growth.training.corpus import tokens
from growth.training.curve import evaluate
from growth.training.data import Windows
from growth.training.division import Division, Order
from growth.training.run import damage
from growth.training.trainer import train
from lcikernels.models import LCIConfig, LCIForCausalLM

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo")

TEXT = "".join(chr(97 + i * i % 23) + ("\n" if i % 31 == 30 else "") for i in range(3000))
G = 8  # windows a step
STEPS = {"steps": 8, "learning_rate": 1e-3, "eval_every": 2, "save_every": 3}
UNFREEZING = {"freeze": "transferred", "unfreeze": "plateau", "window": 2, "threshold": 9.0, "warmup": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of all mixers, its head tied, with its tokenizer, a text, a record of what stays frozen."""
    root = tmp_path_factory.mktemp("distributed")
    (root / "text.txt").write_text(TEXT)
    sizes = {"vocab_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 32, "pattern": "SMRA"}
    pico(LCIForCausalLM, LCIConfig, **LCI | sizes, tie_word_embeddings=True)(root / "model")
    rows = [
        {"name": n, "sources": [], "freeze": "mixer." not in n} for n in load_file(weights(root / "model"))
    ]
    record = {"verb": "transfer", "method": "xatl", "lossless": True, "fingerprint": "", "lineage": []}
    (root / "model/growth.json").write_text(json.dumps(record | {"tensors": rows}))
    shutil.copytree(root / "model", root / "rounded")
    moved = {
        n: torch.nextafter(x, x + torch.randn_like(x)) for n, x in load_file(weights(root / "model")).items()
    }
    save_file(moved, weights(root / "rounded"), {"format": "pt"})
    return root


def weights(folder):
    return folder / "model.safetensors"


def settings(folder, out, processes=1, model="model", **more):
    paths = {"model": folder / model, "data": folder / "text.txt", "out": out}
    return paths | {"batch_size": G // processes} | STEPS | UNFREEZING | more


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    """What one process gives, and how far its losses move when each weight moves by its last bit."""
    out = tmp_path_factory.mktemp("one")
    report = train(**settings(folder, out / "one"))
    rounded = train(**settings(folder, out / "rounded", model="rounded"))
    return report, max(abs(a.loss - b.loss) for a, b in zip(report.curve, rounded.curve))


def curve(out):
    found = json.loads((out / "training.json").read_text())
    return [(p["step"], p["flops"], p["loss"]) for p in found["curve"]], found["unfrozen_at"]


def assert_as_one(out, one, moves=8):
    """The same steps at the same cost, and losses as near as those of weights that differ in the last bit."""
    (report, moved), (points, unfrozen_at) = one, curve(out)
    assert [p[:2] for p in points] == [(p.step, p.flops) for p in report.curve]
    assert max(abs(p[2] - q.loss) for p, q in zip(points, report.curve)) <= moves * moved
    assert unfrozen_at == report.unfrozen_at == 4
    assert load_file(weights(out)).keys() == load_file(weights(report.out)).keys()


def assert_alike(out, other):
    assert curve(out) == curve(other)
    got, want = load_file(weights(out)), load_file(weights(other))
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def test_several_processes_skip_the_layers_that_one_skips(folder, tmp_path):
    how = {"freeze": None, "unfreeze": None, "callbacks": [LayerDropping(0.6)]}
    report = train(**settings(folder, tmp_path / "one", **how))
    ended = started(2, tmp_path / "told", settings(folder, tmp_path / "two", 2, **how))
    assert ended.codes == [0, 0], ended.err
    points, _ = curve(tmp_path / "two")
    assert [p[:2] for p in points] == [(p.step, p.flops) for p in report.curve]
    assert points[-1][1] < 8 * report.step_flops
    assert [p[2] for p in points] == pytest.approx([p.loss for p in report.curve], abs=1e-4)


# ---- the division of a step


def test_every_division_of_a_step_has_the_same_examples_in_the_same_order():
    order = list(Order(21, 6 * 12, seed=3))
    assert sorted(order[:21]) == sorted(order[21:42]) == list(range(21)) and order[:21] != order[21:42]
    assert order != list(Order(21, 6 * 12, seed=4))
    for processes, size, accumulation in ((1, 12, 1), (2, 6, 1), (3, 2, 2), (1, 3, 4), (4, 1, 3)):
        division = Division(processes, size, accumulation)
        assert division.examples == 12
        batches = BatchSampler(Order(21, 6 * 12, seed=3), size, drop_last=True)
        shards = [BatchSamplerShard(batches, processes, process) for process in range(processes)]
        assert [i for turn in zip(*shards, strict=True) for batch in turn for i in batch] == order


@pytest.mark.parametrize("processes", range(1, 14))
def test_a_step_is_shared_out_among_other_processes_in_batches_no_larger(processes):
    division = Division(2, 6, 1)
    again = division.among(processes)
    assert (again is None) == (12 % processes != 0)
    if again:
        assert again.processes == processes and again.examples == 12 and again.batch_size <= 6
        assert 12 // processes > 6 or again.gradient_accumulation == 1


# ---- whole runs


@pytest.fixture(scope="module", params=[False, True], ids=["DDP", "FSDP"])
def two(request, folder, tmp_path_factory):
    """What two processes leave and say, whether they were sharded, and the run's folder after a power cut
    took the second after its fifth step."""
    root = tmp_path_factory.mktemp("two")
    common = {"processes": 2, "fsdp": request.param}
    ended = started(2, root / "io", settings(folder, root / "two", **common))
    cut = started(2, root / "cut", settings(folder, root / "run", **common, killed=(1, 5)))
    return root, ended, request.param, cut


def test_two_processes_have_the_losses_of_one(two, one):
    root, ended, _, _ = two
    assert ended.codes == [0, 0]
    assert_as_one(root / "two", one)


def test_only_the_first_process_speaks(two):
    root, ended, _, _ = two
    assert ended.out[0].count("8 steps, validation loss") == 1 and ended.out[1] == ""
    steps = [line.split(",")[0] for line in ended.err[0].splitlines()]
    assert steps == [f"{root / 'two'}: step {n} of 8" for n in (0, 2, 4, 6, 8)] and ended.err[1] == ""


def test_what_two_processes_save_is_whole_and_loads_strictly(two, folder):
    root = two[0]
    model, info = AutoModelForCausalLM.from_pretrained(root / "two", output_loading_info=True)
    assert not any(info.values())
    held_out = Windows(tokens([TEXT], byte_tokenizer()), 32).hold_out(5)[1].windows
    assert evaluate(model, held_out) == pytest.approx(curve(root / "two")[0][-1][2], rel=1e-6)


def test_where_one_process_is_killed_the_other_ends_and_both_go_on_as_if_it_had_not_been(
    two, folder, tmp_path
):
    root, _, fsdp, cut = two
    assert cut.codes == [2, -9]
    said = cut.err[0].splitlines()[-1]
    assert said == (
        "growth: processes: expected all 2 to the end, got one that is gone; "
        "pass --resume to go on from checkpoint-3"
    )
    shutil.copytree(root / "run.unfinished", tmp_path / "out.unfinished")
    again = settings(folder, tmp_path / "out", 2, fsdp=fsdp, resume=True)
    assert started(2, tmp_path / "io", again).codes == [0, 0]
    assert_alike(tmp_path / "out", root / "two")


@pytest.mark.parametrize("batch_size", [G // 2, G])
def test_one_process_goes_on_from_what_two_have_left(two, folder, one, tmp_path, batch_size):
    shutil.copytree(two[0] / "run.unfinished", tmp_path / "out.unfinished")
    report = train(**settings(folder, tmp_path / "out", resume=True) | {"batch_size": batch_size})
    assert_as_one(tmp_path / "out", one)
    asked = [report.settings[name] for name in ("processes", "batch_size", "gradient_accumulation")]
    assert asked == [1, batch_size, G // batch_size]


def test_two_sharded_processes_go_on_from_what_one_has_left(folder, one, tmp_path):
    assert started(1, tmp_path / "cut", settings(folder, tmp_path / "out", killed=(0, 7))).codes == [-9]
    again = settings(folder, tmp_path / "out", 2, fsdp=True, resume=True)
    assert started(2, tmp_path / "io", again).codes == [0, 0]
    assert_as_one(tmp_path / "out", one)


def test_a_checkpoint_of_two_is_whole_with_the_files_of_both(two, tmp_path):
    (checkpoint,) = (two[0] / "run.unfinished").glob("checkpoint-*")
    assert damage(checkpoint) == ""
    shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3/rng_state_1.pth").unlink()
    assert damage(tmp_path / "checkpoint-3") == "rng_state_1.pth is missing"


def test_masks_are_those_of_one_process_and_each_counts_alike(folder, tmp_path):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert(tmp_path / "bert", hidden_size=32, num_hidden_layers=1, intermediate_size=64, **still)
    run = {"model": tmp_path / "bert", "data": folder / "text.txt"} | STEPS | {"learning_rate": 1e-2}
    alone = train(**run, out=tmp_path / "one", batch_size=G)
    ended = started(2, tmp_path / "io", run | {"out": tmp_path / "two", "batch_size": G // 2})
    assert ended.codes == [0, 0]
    assert [p[2] for p in curve(tmp_path / "two")[0]] == pytest.approx(
        [p.loss for p in alone.curve], rel=2e-6
    )


def test_sixteen_bits_are_as_exact_in_pieces_as_whole(folder, tmp_path):
    """FSDP's own way would put rates, steps and the sums of gradients into bfloat16."""
    for fsdp in (False, True):
        run = settings(folder, tmp_path / f"{fsdp}", 2, bf16=True, fsdp=fsdp, save_every=0) | {"steps": 3}
        assert started(2, tmp_path / f"io{fsdp}", run | {"warmup": 0}).codes == [0, 0]
    assert curve(tmp_path / "True")[0] == curve(tmp_path / "False")[0]


@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP"])
def test_a_process_holds_the_share_of_the_state_that_costs_tell(fsdp, folder, tmp_path):
    run = {"model": folder / "model", "data": folder / "text.txt", "out": tmp_path / "out", "fsdp": fsdp}
    run |= {"batch_size": 1, "steps": 1, "eval_every": 1, "save_every": 0, "callbacks": [Held(tmp_path)]}
    ended = started(2, tmp_path / "io", run)
    assert ended.codes == [0, 0], ended.err
    model = model_of(LCIConfig.from_pretrained(folder / "model"), [*load_file(weights(folder / "model"))])
    told = training_of(Steps(model, 1, 32), H200, 2 if fsdp else 1)
    for rank in range(2):
        got = [int(x) for x in (tmp_path / f"held{rank}").read_text().split()]
        assert got == pytest.approx([told.weights, told.gradients, told.moments], rel=0.1)


def test_a_process_receives_what_costs_tell(folder, tmp_path):
    """Weights and gradients in float32, though products are of 16 bits."""
    run = {"model": folder / "model", "data": folder / "text.txt", "out": tmp_path / "out", "fsdp": True}
    run |= {"batch_size": 1, "steps": 2, "eval_every": 2, "save_every": 0, "callbacks": [Received(tmp_path)]}
    ended = started(2, tmp_path / "io", run | {"bf16": True})
    assert ended.codes == [0, 0], ended.err
    model = model_of(LCIConfig.from_pretrained(folder / "model"), [*load_file(weights(folder / "model"))])
    told = training_of(Steps(model, 1, 32), H200, 2).communicated
    for rank in range(2):
        assert int((tmp_path / f"received{rank}").read_text()) == pytest.approx(told, rel=0.1)


# ---- what is refused


@pytest.mark.parametrize(
    "said, more",
    [
        ("nowhere: expected a checkpoint folder with config.json", {"model": "nowhere"}),
        ("process 1 of 2: data .*absent: expected a file or a folder", {"of": {1: {"data": "/absent"}}}),
        ("batch size: expected at least 1, got 0", {"batch_size": 0, "of": {1: {"data": "/absent"}}}),
        ("resume: expected an interrupted run in .*, got none", {"resume": True}),
        ("step 2: expected a finite loss", {"learning_rate": 1e30, "save_every": 0}),
    ],
)
def test_a_refusal_is_one_line_of_the_first_process_and_ends_all(folder, tmp_path, said, more):
    ended = started(2, tmp_path / "io", settings(folder, tmp_path / "new/out", 2) | more)
    assert ended.codes == [2, 2] and ended.out == ["", ""] and ended.err[1] == ""
    lines = [line for line in ended.err[0].splitlines() if line.startswith("growth: ")]
    assert len(lines) == 1 and re.search(f"^growth: .*{said}.*; ", lines[0])
    assert "Traceback" not in ended.err[0]
    assert [path.name for path in tmp_path.iterdir()] == ["io"]


def test_a_model_that_cannot_be_sharded_is_refused(tmp_path, folder):
    bert(tmp_path / "bert", hidden_size=32, num_hidden_layers=1, intermediate_size=64)
    run = {"model": tmp_path / "bert", "data": folder / "text.txt", "out": tmp_path / "out"} | STEPS
    ended = started(2, tmp_path / "io", run | {"batch_size": 2, "fsdp": True})
    assert ended.codes == [2, 2]
    assert "fsdp: expected one owner for each tensor but the embedding, got cls.predictions." in ended.err[0]
    assert not list(tmp_path.glob("out*"))


def test_a_run_goes_on_with_the_steps_it_had_or_not_at_all(two, folder, tmp_path):
    shutil.copytree(two[0] / "run.unfinished", tmp_path / "out.unfinished")
    again = settings(folder, tmp_path / "out", resume=True)
    for more in ({"batch_size": 3}, {"batch_size": 16}):
        with pytest.raises(
            Refusal, match=f"resume: expected 8 examples a step.*got {more['batch_size']} examp"
        ):
            train(**again | more)
    with pytest.raises(Refusal, match="resume: expected learning_rate 0.001, got learning_rate 0.1"):
        train(**again | {"learning_rate": 0.1})
    record = tmp_path / "out.unfinished/settings.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"processes": 6, "batch_size": 3}))
    with pytest.raises(Refusal, match="resume: expected 18 examples a step.*got 8 examples"):
        train(**again)
    ended = started(5, tmp_path / "io", again | {"batch_size": 3})
    assert ended.codes == [2] * 5
    said = "expected a number of processes that divides a step's 18 examples, got 5; start 6, as before"
    assert said in ended.err[0]


# ---- as it is started


def test_torchrun_starts_it(folder, one, tmp_path):
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "growth",
    ]
    line += ["train", folder / "model", "--data", folder / "text.txt", "--out", tmp_path / "out", "--fsdp"]
    line += ["--steps=2", "--batch-size=4", "--learning-rate=1e-3", "--eval-every=2", "--save-every=0"]
    done = subprocess.run(
        list(map(str, line)),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps, validation loss") == 1
    assert curve(tmp_path / "out")[0][0][2] == one[0].curve[0].loss
