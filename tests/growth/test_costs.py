"""What growing and training take on paper is what they take: operations, kept bytes, files, memory."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import costs_measured
import large_checkpoint
import pytest
import torch
from checkpoints import ALL, LCI, pico
from command import run
from memory import Memory
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, ViTConfig, ViTForImageClassification

import growth
from benchmarks import scale
from growth.checkpoint import Checkpoint
from growth.costs.job import job_of
from growth.costs.machines import H200, Gpu, Machine
from growth.costs.paper import examples, of_each_kind, step_of, undropped
from growth.costs.tape import Tape
from growth.costs.training import Steps, most, state, training_of
from growth.engine import made
from growth.families import FAMILIES, model_of
from growth.learned.fit import step_flops
from growth.loading import load_model, quiet
from growth.methods.fine import Fine
from growth.methods.ligo import Ligo
from growth.methods.mango import Mango
from growth.plan import Source
from growth.training.data import Windows
from growth.training.flops import count_flops
from growth.transferring.align import Alignment
from growth.transferring.fitted import Fitting
from lcikernels.models import LCIConfig, LCIForCausalLM

B, T = 2, 24
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
IMAGES = {"image_size": 12, "patch_size": 4, "num_channels": 3, "num_labels": 5}
DEEP = {
    "gpt_neox, 7 layers": lambda folder: ALL["gpt_neox"](folder, num_hidden_layers=7),
    "vit": pico(ViTForImageClassification, ViTConfig, **SIZES | IMAGES),
    "lci, every mixer twice": pico(
        LCIForCausalLM, LCIConfig, **LCI | {"num_hidden_layers": 8}, pattern="SRMARSMA"
    ),
}
ROOT = Path(__file__).parents[2]
STEPS = "gpt_neox tied, gpt2, llama, qwen3_moe, gemma2, granitemoehybrid, bert, t5".split(", ")
STEPS += ["lci around RWA", "lci inside WRS", "lci learned ARM"]


def llama(vocabulary, width, neurons, layers, heads, kv_heads=None):
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )


def seen(folder):
    checkpoint = Checkpoint(folder)
    return model_of(checkpoint.config, checkpoint.names)


def a_step(name, folder, checkpointing, precision):
    """On paper; of one that is taken bytes between forward and backward, the most bytes, operations."""
    with quiet():
        (DEEP | ALL)[name](folder)
        network = load_model(folder).train()
    model = seen(folder)
    if checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    network.config.use_cache = False
    batch = examples(model, B, T)  # windows of zeros might be padding
    batch |= {key: torch.randint(3, 50, x.shape) for key, x in batch.items() if x.dim() == 2}
    gpu = precision == "autocast"
    with Tape([*network.parameters(), *network.buffers(), *batch.values()]) as tape:
        with undropped() if gpu else nullcontext():
            with torch.autocast("cpu", torch.bfloat16) if gpu else nullcontext():
                loss = network(**batch).loss
            kept = tape.live
            loss.backward()
    always = sum(x.nbytes for x in (*network.buffers(), *batch.values()))
    step = step_of(model, B, T, checkpointing=checkpointing, precision=precision)
    assert sum(x.parameters for x in step.segments) >= sum(x.numel() for x in network.parameters())
    if not checkpointing and not gpu:
        assert step.flops == count_flops(network, batch)
    return step, kept, tape.most + always, tape.flops


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("name", [*STEPS, *DEEP])
def test_a_step_on_paper_is_the_step_that_the_model_takes(name, checkpointing, tmp_path):
    step, kept, most_bytes, flops = a_step(name, tmp_path / "model", checkpointing, "float32")
    assert step.flops == flops
    assert step.kept == pytest.approx(kept, rel=0.01)
    assert step.most(4) == pytest.approx(most_bytes, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3_moe", *DEEP])
def test_a_step_in_16_bits_is_on_paper_too(name, checkpointing, tmp_path):
    """Copies that autocast has made are there until the forward ends."""
    step, _, most_bytes, flops = a_step(name, tmp_path / "model", checkpointing, "autocast")
    assert step.flops == flops
    assert step.most(4) == pytest.approx(most_bytes, rel=0.02)


def test_a_hundred_layers_are_run_as_one():
    config = llama(64, 32, 64, 100, 2)
    fewer, alike = of_each_kind(FAMILIES["llama"].model(config))
    assert fewer.architecture.layers == 1 and alike == [0] * 100


def measured(*words):
    """Bytes."""
    command = [sys.executable, costs_measured.__file__, *map(str, words)]
    where = {**os.environ, "PYTHONPATH": str(ROOT)}  # benchmarks are not installed
    run = subprocess.run(command, capture_output=True, text=True, env=where)
    assert run.returncode == 0, run.stderr
    return [1e6 * float(x) for x in run.stdout.split()]


def test_a_process_that_trains_holds_what_is_told(tmp_path):
    config = llama(4096, 384, 1024, 6, 6, 2)
    config.save_pretrained(tmp_path)
    model = FAMILIES["llama"].model(config)
    got = measured("train", tmp_path)
    steps = [step_of(model, costs_measured.B, costs_measured.T, checkpointing=x) for x in (False, True)]
    told = [most(step, model.architecture.parameters, 1) for step in steps]
    assert told == pytest.approx(got, rel=0.1)
    assert got[1] < 0.9 * got[0]


def test_growth_reads_writes_and_holds_what_is_told(tmp_path):
    src, warm, dst = (tmp_path / name for name in ("src", "warm", "dst"))
    large_checkpoint.write(src, large_checkpoint.sized(0.25, 768, 64000))
    with quiet():
        ALL["llama"](warm)
    (got,), source = measured("grow", src, warm, dst, 1024), Source(Checkpoint(src))
    job = job_of(source, growth.grow(src, hidden_size=1024, dry_run=True).plan)
    assert job.writes == sum(file.stat().st_size for file in dst.glob("*.safetensors"))
    assert job.memory == pytest.approx(got, rel=0.1)
    assert job.reads == 4 * source.parameters  # the fingerprint, then each tensor once; two bytes a number


COUNTED = {  # a family of each layout: fused, tied, transposed; with tensors that are read twice
    "deeper": ("gpt_neox tied", "grow", {"num_layers": 5}),
    "wider and deeper": ("gpt2", "grow", {"hidden_size": 96, "num_layers": 5}),
    "masked": ("llama", "grow", {"hidden_size": 96, "num_layers": 5, "method": "msg"}),
    "mixed": ("olmo2", "grow", {"num_layers": 6, "allow_lossy": True}),
    "smaller": ("llama with biases, tied", "shrink", {"num_layers": 2, "ffn_size": 16}),
    "smaller mixtures": ("qwen2_moe", "shrink", {"hidden_size": 32}),
    "transferred": ("phi3", "transfer", {"start": "attention"}),
    "fused, then apart": ("gpt_neox", "transfer", {"mixers": "mamba"}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_every_byte_and_every_number_is_counted(name, tmp_path, monkeypatch):
    family, verb, options = COUNTED[name]
    with quiet():
        ALL[family](tmp_path / "src")
    read, sizes = Checkpoint.read, []

    def counted(self, *given):
        sizes.append((x := read(self, *given)).nbytes)
        return x

    monkeypatch.setattr(Checkpoint, "read", counted)
    told = getattr(growth, verb)(tmp_path / "src", dry_run=True, **options)
    job, planned = told.costs.job, sum(sizes)
    sizes.clear()
    getattr(growth, verb)(tmp_path / "src", tmp_path / "dst", **options)
    assert job.read_to_plan == planned and job.reads == sum(sizes)
    assert job.writes == sum(file.stat().st_size for file in (tmp_path / "dst").glob("*.safetensors"))
    if verb == "grow":  # a transfer's fresh mixers are drawn whole, also where one part of them is fresh
        with Draws() as draws:
            for _, blocks in made(told.plan, Source(Checkpoint(tmp_path / "src"))):
                assert sum(x.numel() for x in blocks)
        assert job.drawn == draws.count


class Draws(TorchDispatchMode):
    """Counts the numbers that are drawn at random."""

    OPS = torch.ops.aten.randn, torch.ops.aten.normal_, torch.ops.aten.uniform_
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **named or {})
        self.count += out.numel() if function._overloadpacket in self.OPS else 0
        return out


def test_shrinking_by_magnitude_holds_no_more_than_the_plan_tells(tmp_path):
    """The largest tensor is most of the model: 16 MB, in float64 twice that."""
    with quiet():
        ALL["llama"](tmp_path / "src", vocab_size=2**16, hidden_size=64, head_dim=16)
    with Memory() as memory:
        report = growth.shrink(tmp_path / "src", tmp_path / "dst", hidden_size=32)
    source = Source(Checkpoint(tmp_path / "src"))
    scores = 8 * sum(source.checkpoint.shape(name)[0] for name in source.on_disk.values())
    told = report.plan.memory + 2 * scores
    assert 2**24 < memory.most <= told


def test_gpus_share_the_state_and_not_what_a_step_makes():
    model = FAMILIES["llama"].model(llama(1000, 64, 96, 5, 4))
    P, gpu = model.architecture.parameters, Gpu("small", 1e9, 1e12, 1e11, 1e9, 1e8)
    steps, long = Steps(model, 1, 64), Steps(model, 8, 64)
    one, two, many = (training_of(steps, gpu, gpus) for gpus in (1, 2, 16))
    assert state(P, 2) == 6 * P and two.weights + two.moments + two.gradients == 8 * P
    assert one.fits and one.communicated == 0 and many.tokens == 16 * 64
    assert two.memory > many.memory > steps.step(False, "autocast").kept
    assert two.communicated < many.communicated < 12 * P
    assert many.seconds == pytest.approx(many.communicated / 1e8)  # slower than the products
    tight = Gpu("tight", 16.5 * P, 1e12, 1e11, 1e9, 1e8)
    assert training_of(long, tight, 1).checkpointing
    assert not training_of(long, Gpu("tiny", 12 * P, 1e12, 1e11, 1e9, 1e8), 1).fits


def test_time_is_bytes_and_numbers_over_rates(source):
    plan = growth.grow(source, hidden_size=168, dry_run=True).plan
    job = job_of(Source(Checkpoint(source)), plan)
    rates = {"read": 10.0, "hashed": 20.0, "cached": 30.0, "written": 40.0, "room": 100.0}
    machine = Machine(**rates, copied=50.0, expanded=60.0, drawn=70.0, products=80.0)
    numbers = job.copied / 50 + job.expanded / 60 + job.drawn / 70
    moved = job.used / 10 + job.hashed / 20 + 100 / 30 + (job.writes - 100) / 40
    assert job.seconds(machine) == pytest.approx(moved + numbers)
    assert job.copied + job.expanded == plan.parameters


@pytest.mark.parametrize("words", [("grow", "--num-layers", 4), ("transfer",), ("shrink", "--num-layers", 2)])
def test_a_dry_run_tells_costs(words, source, monkeypatch, capsys):
    verb, *rest = words
    _, out, _ = run(monkeypatch, capsys, verb, source, *rest, "--dry-run", "--json")
    told = json.loads(out)["costs"]
    assert told["seconds"] > told["planning"] > 0
    assert [x["gpus"] for x in told["training"]] == [1, 8, 64] and told["gpu"]["name"] == H200.name
    assert told["training"][0]["fits"]
    _, out, _ = run(monkeypatch, capsys, verb, source, *rest, "--dry-run")
    assert "costs: reads" in out and "on 64 GPUs" in out


def test_what_has_no_head_that_learns_is_not_trained(tmp_path):
    with quiet():
        ALL["bert headless"](tmp_path / "src")
    costs = growth.grow(tmp_path / "src", num_layers=4, dry_run=True).costs
    assert not costs.trainings and len([*costs.lines()]) == 1


def test_what_learning_takes_is_not_in_it_and_is_said_so(source):
    windows = Windows(torch.randint(3, 50, (512,)), 8)
    plain = growth.grow(source, num_layers=4, dry_run=True)
    learnt = growth.grow(source, num_layers=4, method="ligo", dry_run=True)
    aligned = growth.transfer(source, align=2, data=windows, dry_run=True)
    said = [next(report.costs.lines()) for report in (plain, learnt, aligned)]
    assert "not in it" not in said[0]
    assert said[1].endswith("; learning by ligo is not in it")
    assert said[2].endswith("; what mixers learn from data is not in it")
    long = growth.grow(source, num_layers=4, method=Ligo(sequence_length=9999), dry_run=True).costs
    with pytest.raises(growth.Refusal, match="sequence length: expected at most .* the model's positions"):
        assert long.lesson


@pytest.mark.parametrize("remake", ["never", "always"])
@pytest.mark.parametrize("method, family", [(Ligo, "gpt_neox"), (Mango, "bert"), (Fine, "llama")])
def test_a_lesson_on_paper_is_the_one_that_is_learned(method, family, remake, tmp_path):
    with quiet():
        ALL[family](tmp_path / "src", intermediate_size=128)
    ids = torch.randint(3, 50, (400,))
    method = method(data=Windows(ids, T), steps=3, batch_size=B, remake=remake)
    told = growth.grow(tmp_path / "src", num_layers=4, method=method, dry_run=True)
    found, lesson = told.costs.learns.__self__, told.costs.lesson
    learner = found.method.learner(found)
    learned = learner.lesson if method.name == "fine" else learner
    expansion = learned.expansion
    expansion.remakes = remake == "always"
    batch = examples(found.target, B, T)
    held = [*expansion.parameters(), *expansion.buffers(), *expansion.large[0].buffers(), *batch.values()]
    optimizer = torch.optim.AdamW(expansion.parameters())
    with Tape(held) as tape:
        for _ in range(2):
            expansion(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert lesson.flops == 3 * tape.flops // 2 == 3 * step_flops(expansion, learned.examples, B, ids.device)
    assert lesson.memory == pytest.approx(tape.most + sum(x.nbytes for x in held), rel=0.1)
    assert f"{lesson.flops:.3g} FLOP in 3 steps of {B} windows of {T} tokens" in [*told.costs.lines()][1]


ALIGNED = {
    "steps": ("llama", {"align": 5}),
    "two steps": ("gpt_neox", {"align": Alignment(2, batches=3, batch_size=2)}),
    "solved for": ("llama", {"mixers": "mamba2", "align": 0}),
    "several kinds": ("llama with biases, tied", {"pattern": "RMA", "align": 4}),
    "data choose": ("llama", {"keep_attention": "auto:1", "align": 3}),
    "data choose, windows": ("gemma2", {"mixers": "mamba", "keep_attention": "auto:1", "align": 3}),
    "data choose among many": (
        "llama",
        {"keep_attention": "auto:2", "align": Alignment(1, batches=2, batch_size=4)},
    ),
    "a mixer of its own": ("lci, every mixer twice", {"align": 1}),
    "fused, few windows": ("phi3", {"align": Alignment(2, batches=1, batch_size=2)}),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_an_alignment_on_paper_is_the_one_that_is_done(name, tmp_path, monkeypatch):
    family, options = ALIGNED[name]
    with quiet():
        deep = {"num_hidden_layers": 14} if "many" in name else {}
        (DEEP | ALL)[family](tmp_path / "src", **{} if family in DEEP else {"intermediate_size": 128} | deep)
    options |= {"data": Windows(torch.randint(3, 50, (40 * T,)), T)}
    told = growth.transfer(tmp_path / "src", dry_run=True, **options).costs
    run, tapes = Fitting.run, []

    def taped(self, starting, folder):
        with Tape() as tape:
            tapes.append(tape)
            return run(self, starting, folder)

    monkeypatch.setattr(Fitting, "run", taped)
    done = growth.transfer(tmp_path / "src", tmp_path / "dst", **options)
    assert told.lesson.flops == done.flops > 0
    assert told.lesson.memory == pytest.approx(tapes[0].most, rel=0.1)
    line = [*told.lines()][1]
    assert line.startswith(f"what mixers learn from data: {done.flops:.3g} FLOP")


def test_the_committed_scale_is_what_is_told():
    committed = Path(scale.__file__).with_name("SCALE.md").read_text()
    assert committed.splitlines() == [*scale.lines()]
