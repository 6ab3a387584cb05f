"""Growing or transferring a checkpoint that is larger than memory should be, beside copying as many bytes:

    python tests/large_checkpoint.py SRC [--family gpt_neox]
    python -m benchmarks.large grow SRC DST [hidden_size=4096 num_layers=...] [--out FILE]
    python -m benchmarks.large transfer SRC DST [mixers=mamba2 copy=all] [--out FILE]

A Llama of 6.0 GB, 22 layers of 3072, grows to 9.9 GB, 22 layers of 4096, by LEMON. The least it could take
is the copy (SRC read in blocks of 16 MB, as many bytes written as DST has) and the numbers that are drawn:
noise of the columns that read copies or new channels, or what starts fresh (randn, a product, a rounding to
bfloat16, on all cores). Each part runs in a process of its own, finds nothing of SRC in the page cache, and
ends when its bytes are on the disk; they take turns, and the medians count, for the same copy takes 7 s or 16
on a machine that others use too. Memory is the most that was resident, less what was after the imports; pages
of SRC that are mapped count in it. In the anonymous part, which is sampled every 5 ms, they do not.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

import growth
from benchmarks.markdown import head, line
from benchmarks.measure import attempt, processor, resident

COPIED, DRAWN = 2**24, 2**24  # bytes, numbers of a block
MOST_GB, MOST_RATIO = 1.5, 2.0
COLUMNS = ("GB", "made", "s", "copy", "drawn", "ratio", "goal", "peak GB", "anonymous", "goal")
COPIERS = ("o_proj.weight", "down_proj.weight", "attention.dense.weight", "dense_4h_to_h.weight")


class Names(NamedTuple):
    """Of the tensors that are checked, and what the config calls the heads whose rows `reader` has."""

    embedding: str
    gain: str
    reader: str
    heads: str

    @classmethod
    def of(cls, embedding: str, layer: str, reader: str, heads: str) -> "Names":
        tensors = embedding, f"{layer}.input_layernorm", f"{layer}.{reader}"
        return cls(*(f"{name}.weight" for name in tensors), heads)


NAMES = {
    "llama": Names.of("model.embed_tokens", "model.layers.0", "self_attn.k_proj", "num_key_value_heads"),
    "gpt_neox": Names.of(
        "gpt_neox.embed_in", "gpt_neox.layers.0", "attention.query_key_value", "num_attention_heads"
    ),
}


class Part(NamedTuple):
    seconds: float
    gb: float = 0.0
    anonymous_gb: float = 0.0


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in weights(folder))


def on_disk(files: list[Path]) -> None:
    for file in files:
        with open(file, "rb") as written:
            os.fsync(written.fileno())


def forgotten(files: list[Path]) -> None:
    """Their pages leave the cache, which they can only once they are written."""
    on_disk(files)
    for file in files:
        with open(file, "rb") as read:
            os.posix_fadvise(read.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def alone(part: Callable, *arguments) -> Part:
    """In a process that has imported this module and done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(part, *arguments).result()


def making(verb: str, src: Path, dst: Path, how: dict[str, object]) -> Part:
    given = {"method": "lemon"} | how if verb == "grow" else how
    return measured(src, dst, partial(getattr(growth, verb), src, dst, **given))


def measured(src: Path, dst: Path, make: Callable[[], object]) -> Part:
    """What making DST of SRC took, until its bytes are on the disk."""
    done, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, resident("RssAnon"))

    def run() -> None:
        make()
        on_disk(weights(dst))

    forgotten(weights(src))
    before, watcher = resident("RssAnon"), threading.Thread(target=watch)
    watcher.start()
    try:
        _, seconds, mb = attempt(run)
    finally:
        done.set()
        watcher.join()
    return Part(seconds, mb / 1e3, (most - before) / 1e9)


def copying(src: Path, beside: Path, count: int) -> Part:
    """Reads SRC and writes `count` bytes of it, over and over, to a file that is removed again."""
    forgotten(weights(src))
    begin, block = perf_counter(), b""
    try:
        with open(beside, "wb") as out:
            for file in weights(src):
                with open(file, "rb") as read:
                    while data := read.read(COPIED):
                        block = data if len(data) == COPIED else block or data
                        out.write(data[: count - out.tell()])
            while out.tell() < count:
                out.write(block[: count - out.tell()])
            out.flush()
            os.fsync(out.fileno())
        return Part(perf_counter() - begin)
    finally:
        beside.unlink()


def drawing(count: int, cores: int) -> Part:
    """One thread's time for `count` numbers, taken from 16 blocks where there are more, over the cores."""
    torch.set_num_threads(1)
    blocks = min(16, math.ceil(count / DRAWN))
    torch.randn(DRAWN).mul_(0.02).bfloat16()
    begin = perf_counter()
    for _ in range(blocks):
        torch.randn(DRAWN).mul_(0.02).bfloat16()
    return Part((perf_counter() - begin) * count / (blocks * DRAWN) / cores)


def noisy(src: Path, dst: Path) -> int:
    """Numbers in the columns of matrices that read a unit with another copy, or with none in SRC."""
    count, old = 0, shapes(src)
    for name, shape in shapes(dst).items():
        if len(shape) == 2 and "embed_" not in name and name in old:
            (rows, T), S = shape, old[name][1]
            each = 2 if name.endswith(COPIERS) else 1  # the stream's new channels are no copies
            count += rows * (T if T >= 2 * S else each * (T - S))
    return count


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in weights(folder):
        with safe_open(file, "pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    return found


def rows(folder: Path, name: str, count: int | None = None) -> Tensor:
    """The first of a tensor, or all, in float64."""
    for file in weights(folder):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():
                return tensors.get_slice(name)[:count].double()
    raise AssertionError(f"{folder} has no {name}")


def check_grown(src: Path, dst: Path) -> None:
    """AssertionError unless sampled tensors are what LEMON's equations say, to rounding.

    Of a width of S that became T, k = T // S whole copies, the rest r:  embedding [x; ..; x; r], r = 0 for an
    RMSNorm and the mean of x for a LayerNorm; gain sqrt(k S / T) g; head h of a reader has rows of head h
    modulo the old number, whose columns' copies sum to the old column and whose other columns are noise as
    wide as a fresh matrix.
    """
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (src, dst))
    names = NAMES[old["model_type"]]
    S, T = old["hidden_size"], new["hidden_size"]
    k = T // S
    (x, wide), (gain, wide_gain), (w, wide_w) = (
        (rows(src, name, count), rows(dst, name, count))
        for name, count in ((names.embedding, 64), (names.gain, None), (names.reader, None))
    )
    eps = torch.finfo(getattr(torch, new["dtype"])).eps

    def agree(what: str, got: Tensor, want: Tensor, largest: Tensor) -> None:
        budget = eps * largest
        error = (got - want).abs().max()
        assert got.shape == want.shape and error <= budget, f"{what}: error {error:.2e}, budget {budget:.2e}"

    mean = x.mean(1, keepdim=True) * (old["model_type"] != "llama")
    wanted = torch.cat([x.repeat(1, k), mean.expand(-1, T - k * S)], 1)
    agree("embedding", wide, wanted, x.abs().max())
    agree("gain", wide_gain[: k * S], gain.repeat(k) * math.sqrt(k * S / T), gain.abs().max())
    heads = w.unflatten(0, (old[names.heads], -1))[torch.arange(new[names.heads]) % old[names.heads]]
    copies, free = wide_w[:, : k * S].unflatten(1, (k, S)), wide_w[:, k * S :]
    agree("reader", copies.sum(1), heads.flatten(0, 1), k * copies.abs().max())
    if free.numel():
        std, want = free.square().mean().sqrt(), old["initializer_range"]
        # Six standard deviations of an estimate from so many numbers.
        assert abs(std / want - 1) < 6 / math.sqrt(2 * free.numel()), f"noise: std {std:.4f}, not {want}"


def fresh(dst: Path) -> int:
    """The numbers of DST that no tensor of its source gave."""
    rows = json.loads((dst / "growth.json").read_text())["tensors"]
    return sum(torch.Size(row["shape"]).numel() for row in rows if not row["sources"])


def check_transferred(src: Path, dst: Path) -> None:
    """AssertionError unless the tensors that come from one alone of the same shape are the same numbers."""
    rows = json.loads((dst / "growth.json").read_text())["tensors"]
    pairs = [(row["name"], *row["sources"]) for row in rows if len(row["sources"]) == 1]
    old, new = (
        {name: file for file in map(str, weights(folder)) for name in safe_open(file, "pt").keys()}
        for folder in (src, dst)
    )
    same = 0
    for name, source in pairs:
        with safe_open(new[name], "pt") as got, safe_open(old[source], "pt") as given:
            x, y = got.get_slice(name), given.get_slice(source)
            if x.get_shape() == y.get_shape():
                assert torch.equal(x[:64], y[:64]), f"{name} is not {source}"
                same += 1
    assert same > len(pairs) // 2, f"{same} of {len(pairs)} tensors could be compared"


def said(option: str) -> tuple[str, object]:
    """name=value of a verb's option."""
    name, _, value = option.partition("=")
    return name, int(value) if value.isdigit() else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", choices=("grow", "transfer"))
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path, help="a new folder; the copy needs as much room beside it")
    parser.add_argument("how", type=said, nargs="*", help="the verb's options")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file of the figures")
    options = parser.parse_args()
    verb, src, dst, cores = options.verb, options.src, options.dst, len(os.sched_getaffinity(0))
    how = dict(options.how) or ({"hidden_size": 4096} if verb == "grow" else {"mixers": "retention"})
    numbers, check = (partial(noisy, src), check_grown) if verb == "grow" else (fresh, check_transferred)
    rounds: dict[str, list[Part]] = {"made": [], "copied": [], "drawn": []}
    for left in reversed(range(options.rounds)):
        rounds["made"].append(alone(making, verb, src, dst, how))
        rounds["copied"].append(alone(copying, src, dst.with_name(f"{dst.name}.copy"), size(dst)))
        rounds["drawn"].append(alone(drawing, numbers(dst), cores))
        if left:
            shutil.rmtree(dst)
    check(src, dst)
    made, copied, drawn = (
        Part(*(statistics.median(x) for x in zip(*parts, strict=True))) for parts in rounds.values()
    )
    ratio = made.seconds / (copied.seconds + drawn.seconds)
    gb = size(src) / 1e9, size(dst) / 1e9
    print(*head(COLUMNS), sep="\n")
    cells = [f"{x:.2f}" for x in gb] + [f"{part.seconds:.1f}" for part in (made, copied, drawn)]
    cells += [f"{ratio:.2f}", met(ratio, MOST_RATIO), f"{made.gb:.2f}", f"{made.anonymous_gb:.2f}"]
    print(line([*cells, met(made.gb, MOST_GB)]))
    if options.out:
        machine = f"{processor()}, {cores} cores, torch {torch.__version__}"
        parts = {name: [part._asdict() for part in parts] for name, parts in rounds.items()}
        figures = dict(verb=verb, how=how, gb=gb, machine=machine, commit=commit(), rounds=parts, ratio=ratio)
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def met(got: float, most: float) -> str:
    return f"≤ {most}" if got <= most else f"**≤ {most} missed**"


if __name__ == "__main__":
    main()
