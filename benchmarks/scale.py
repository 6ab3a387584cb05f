"""Growing 7B to 13B and transferring 8B, and training what that gives on GPUs, on paper: into SCALE.md.

    python -m benchmarks.scale >benchmarks/SCALE.md

The checkpoints have the shapes of such models and no numbers: files that take no room on the disk.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, PreTrainedConfig

import growth
from benchmarks.markdown import grid
from growth.costs.aligning import Aligned
from growth.costs.machines import H100, H200, TOGETHER, UTILISATION, Machine
from growth.costs.told import GPUS, Costs, gb
from growth.costs.training import Steps, Training, training_of
from growth.families import family_of
from growth.learned.fit import LENGTH
from growth.plan import Row
from growth.training.data import Windows
from growth.transferring.align import Alignment
from growth.transferring.fitted import ALIGN
from growth.transferring.restoration import HELD_OUT
from growth.writing import WEIGHTS, layout

T, TOKENS = 4096, 1e9  # of a window; trained on
DAY = 86400
# Assumed, in bytes and numbers a second; one core makes the numbers.
SERVER = Machine(
    read=2e9,
    hashed=2e9,
    cached=1e9,
    written=1e9,
    room=0,
    copied=5e9,
    expanded=2e9,
    drawn=3e8,
    products=1e12,
)
LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=T,
    dtype="bfloat16",
)
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=2 * T,
    dtype="bfloat16",
)
WIDER = dict(hidden_size=5120, num_layers=40, num_heads=40, num_kv_heads=40, ffn_size=13824)
KEPT = (7, 15, 23, 31)  # layers of a hybrid that stay attention
USED = Alignment().batches * Alignment().batch_size  # windows that it reads by default
TEXT = Windows(torch.zeros((USED + HELD_OUT) * LENGTH, dtype=torch.long), LENGTH)

MAKING = "job", "read", "written", "peak memory", "time"
ALIGNING = "job", "layers fitted", "FLOP", "peak memory", "disk", f"time on one {H200.name}"
TRAINING = "model", "GPUs", "fits", "GB a GPU", "seconds a step", f"GPU-days, {TOKENS / 1e9:.0f} B tokens"
ASSUMED_OF_MAKING = (
    f"* Assumed: a disk that reads {gb(SERVER.read)} a second and writes {gb(SERVER.written)}; one core that",
    f"  copies {SERVER.copied:.0e} numbers a second, expands {SERVER.expanded:.0e} and draws",
    f"  {SERVER.drawn:.0e} at random; one after the other, once the plan is made.",
    "* Read: each tensor once for the source's fingerprint, once for each tensor made of it.",
    "* Peak memory is besides what the process has after its imports.",
    "* Transfers are without data here: nothing is aligned, fitted or learned.",
)
ASSUMED_OF_ALIGNING = (
    f"* The defaults: {ALIGN} steps a layer on {USED} windows of {LENGTH} tokens, a layer at a time, in one",
    "  process and float32. Where data choose layers, all are fitted, and scored on"
    f" {HELD_OUT} windows more.",
    "* Disk: the fitted mixers in float32, which lie beside the result until it is whole.",
    f"* Assumed: products at {UTILISATION:.0%} of {H200.single / 1e12:.0f} TFLOP/s, and nothing besides.",
)
ASSUMED_OF_TRAINING = (
    f"* Assumed: a window of {T} tokens on each GPU, forward and backward in bfloat16; weights,",
    "  gradients and AdamW's moments in float32, shared out by FSDP2 where there are several GPUs. Layers",
    "  are computed again in the backward where a step does not fit else.",
    f"* Assumed: an H100 holds {gb(H100.memory)}, an H200 {gb(H200.memory)}, all of it for tensors; both",
    f"  reach {UTILISATION:.0%} of {H100.flops / 1e12:.0f} TFLOP/s.",
    f"* Assumed: a GPU receives {gb(H100.link)} a second from the {TOGETHER} of its machine,",
    f"  {gb(H100.network)} where there are more, while it computes: a step takes the longer of the two.",
    "* Attention is counted as flash attention, all else as torch computes it on a CPU.",
)
CHECKED = (
    "## What is checked",
    "",
    "`tests/growth/test_costs.py` compares this model with what runs on a CPU: operations of a step (equal)",
    "and what it holds in tensors (2 %), in float32 and with copies in 16 bits, and in a process, in float32",
    "(10 %); of growing, the bytes read and written and the numbers drawn (equal) and the memory (10 %); of",
    "learning by LiGO, Mango and FINE and of aligning, the operations (equal) and what they hold in tensors",
    "(10 %). `test_distributed.py` counts each process's own weights, gradients and moments, of two that",
    "share them by FSDP2 and of two that do not, and the bytes that one receives in a step of FSDP2 (10 %).",
    "",
    "Not checked, for nothing here measures it: the memory of transfers without data, what a GPU reaches of",
    "its peak and what its memory loses in pieces, the rates that are assumed. Not counted: loading data,",
    "checkpoints of the training.",
)


def hollow(folder: Path, config: PreTrainedConfig) -> Path:
    """A checkpoint of that shape in bfloat16 whose numbers are a hole in its file."""
    config.save_pretrained(folder)
    model = family_of(config, str(folder)).model(config)
    shapes = {name: entry.shape(model.architecture) for name, (entry, _) in model.table().items()}
    rows = [Row(name, shape, "bfloat16", "initialised") for name, shape in shapes.items()]
    head, _ = layout(rows)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(row.bytes for row in rows))
    return folder


def jobs() -> Iterator[tuple[str, Costs]]:
    with tempfile.TemporaryDirectory() as scratch:
        small, large = hollow(Path(scratch, "7B"), LLAMA_7B), hollow(Path(scratch, "8B"), LLAMA_8B)
        made = {
            "7B grown to {} (LEMON)": growth.grow(small, method="lemon", dry_run=True, **WIDER),
            "8B transferred to a RetNet of {}": growth.transfer(large, dry_run=True),
            f"8B transferred to a hybrid of {{}}, {len(KEPT)} layers attention": growth.transfer(
                large, keep_attention=KEPT, dry_run=True
            ),
        }
        for name, report in made.items():
            yield name.format(f"{report.parameters[1] / 1e9:.1f}B"), report.costs


def alignments() -> Iterator[tuple[str, Aligned]]:
    K = len(KEPT)
    kept = {
        "a RetNet": (),
        f"a hybrid, {K} layers attention": KEPT,
        f"a hybrid, {K} layers that data choose": f"auto:{K}",
    }
    with tempfile.TemporaryDirectory() as scratch:
        large = hollow(Path(scratch), LLAMA_8B)
        for name, keep in kept.items():
            told = growth.transfer(large, keep_attention=keep, data=TEXT, dry_run=True)
            yield f"8B to {name}", told.costs.lesson


def job_cells(name: str, costs: Costs) -> list[str]:
    job = costs.job
    return [name, gb(job.reads), gb(job.writes), gb(job.memory), f"{job.seconds(SERVER):.0f} s"]


def aligning_cells(name: str, of: Aligned) -> list[str]:
    seconds = of.flops / (H200.single * UTILISATION)
    return [name, str(of.layers), f"{of.flops:.3g}", gb(of.memory), gb(of.disk), f"{seconds:.0f} s"]


def training_cells(name: str, x: Training, gpu: str) -> list[str]:
    days = TOKENS / x.tokens * x.seconds * x.gpus / DAY
    fits = ("yes, layers computed again" if x.checkpointing else "yes") if x.fits else "no"
    figures = [f"{x.seconds:.2f}", f"{days:.1f}"] if x.fits else ["", ""]
    return [name, f"{x.gpus} {gpu}", fits, f"{x.memory / 1e9:.1f}", *figures]


def lines() -> Iterator[str]:
    """SCALE.md."""
    made = dict(jobs())
    steps = {name: Steps(costs.target, 1, T) for name, costs in made.items()}
    rows = [
        training_cells(name, training_of(of, gpu, number), gpu.name)
        for name, of in steps.items()
        for gpu in (H100, H200)
        for number in GPUS
    ]
    yield from (
        "# Scale on paper",
        "",
        "Generated by `python -m benchmarks.scale`; none of it was run.",
    )
    yield from ("", "## Making them", "")
    yield from grid(MAKING, [job_cells(*of) for of in made.items()])
    yield from ("", *ASSUMED_OF_MAKING, "", "## Aligning them", "")
    yield from grid(ALIGNING, [aligning_cells(*of) for of in alignments()])
    yield from ("", *ASSUMED_OF_ALIGNING, "", "## Training them", "")
    yield from grid(TRAINING, rows)
    yield from ("", *ASSUMED_OF_TRAINING, "", *CHECKED)


if __name__ == "__main__":
    print(*lines(), sep="\n")
