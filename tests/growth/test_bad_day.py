"""Killed at any call, on a disk that is full, fails or may not be written, two in one place: nothing is lost.

`make test` has a sample of the faults of every verb, `make kill` many more of them (--kills).
"""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from faults import Ended, Fault, Warm, contents, mount_small, obey_modes

KILLED = r"\.growth-\w+"  # what a verb that was killed leaves beside its output
GIVEN = "--data {text} --batch-size 2 --sequence-length 16"
TRAIN = f"train {{src}} --out {{dst}} {GIVEN} --learning-rate 0.01"
VERBS = {
    "grow": "grow {run} {dst} --method lemon --hidden-size 32 --num-layers 3 --optimizer {run} "
    "--shard-size 2e-5",
    "learn": f"grow {{src}} {{dst}} --method ligo --hidden-size 32 --steps 1 --shard-size 2e-5 {GIVEN}",
    "transfer": "transfer {src} {dst} --align 1 --data {text}",
    "shrink": "shrink {src} {dst} --num-layers 1 --ffn-size 16 --score activation --data {text} --windows 2 "
    "--sequence-length 16 --cache {cache} --shard-size 1e-5",
    "train": f"{TRAIN} --steps 4 --save-every 2 --keep-optimizer",
    "recipe": "grow {src} {dst} --recipe {recipe}",
}
# What is left of a verb that goes on where it was stopped.
LONG = {"train": r"|out\.unfinished|out\.tokens", "recipe": r"|out\.recipe"}


def prepare(root: Path) -> None:
    """What the commands read, and each of them once: what they import is there when the process is forked."""
    import torch
    from checkpoints import neox
    from transformers import AutoModelForCausalLM

    from growth.cli.app import app
    from growth.training import corpus

    torch.set_num_threads(1)
    corpus.HELD = 1000  # more tokens are in a file, as those of a large corpus are
    whole = neox(
        root / "whole", hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2
    )
    shutil.copytree(whole, root / "src", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(root / "src", max_shard_size="12KB")
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    steps = [
        {"grow": {"method": "stack", "num-layers": 3}},
        {"train": {"data": str(root / "text.txt"), "steps": 2, "save-every": 1, "batch-size": 2}},
        {"shrink": {"num-layers": 2}},
    ]
    steps[1]["train"]["sequence-length"] = 16
    (root / "recipe.yaml").write_text(json.dumps({"steps": steps}))
    made = f"{TRAIN} --steps 2 --save-every 0 --keep-optimizer".format(
        src=root / "src", dst=root / "run", text=root / "text.txt"
    )
    scratch, small = root / "scratch", root / "small"
    scratch.mkdir(), small.mkdir()
    mount_small(small, 2**23)
    for words in (made.split(), *(words_of(verb, root, scratch, verb) for verb in VERBS)):
        app(words, "growth", standalone_mode=False)
    shutil.rmtree(scratch)


def words_of(verb: str, root: Path, folder: Path, dst: str = "out") -> list[str]:
    """The command of a verb that reads `root` and writes `folder`/dst."""
    read = {name: root / name for name in ("src", "run")}
    files = {"text": root / "text.txt", "recipe": root / "recipe.yaml", "cache": folder / "cache"}
    return [word.format(dst=folder / dst, **read, **files) for word in VERBS[verb].split()]


class Unbroken(NamedTuple):
    """What a verb leaves: its files, those among them that are the same each time, its calls."""

    names: set[str]
    same: dict[str, bytes]
    calls: int


class Bench:
    """A verb's runs, and what must hold of every one."""

    def __init__(self, root: Path, warm: Warm):
        self.root, self.warm = root, warm
        self.read = {name: contents(root / name) for name in ("src", "run")}
        self._unbroken: dict[str, Unbroken] = {}

    def unbroken(self, verb: str) -> Unbroken:
        if verb not in self._unbroken:
            found = []
            for again in ("first", "second"):
                folder = self.root / verb / again
                folder.mkdir(parents=True)
                ended = self.run(verb, folder)
                assert ended.code == 0, ended.err
                found.append(contents(folder / "out"))
            same = {name: x for name, x in found[0].items() if found[1].get(name) == x}
            assert found[0].keys() == found[1].keys() and any("safetensors" in name for name in same)
            assert all(name in same for name in found[0] if name.endswith(".safetensors"))
            self._unbroken[verb] = Unbroken(set(found[0]), same, ended.calls)
        return self._unbroken[verb]

    def run(self, verb: str, folder: Path, *more: str, **how) -> Ended:
        return self.warm.run([*words_of(verb, self.root, folder), *more], **how)

    def check(self, verb: str, folder: Path, left: str = "") -> bool:
        """Is the result there? Then it is whole. left: a pattern of what may lie beside it."""
        assert self.read == {name: contents(self.root / name) for name in self.read}
        beside = {x.name for x in folder.iterdir()} - {"out", "cache"}
        odd = {name for name in beside if not (left and re.fullmatch(left, name))}
        assert not odd, f"{odd} beside the result"
        if not (folder / "out").exists():
            return False
        self.same(verb, folder / "out")
        return True

    def same(self, verb: str, out: Path) -> None:
        expected, found = self.unbroken(verb), contents(out)
        assert found.keys() == expected.names
        wrong = [name for name, x in expected.same.items() if found[name] != x]
        assert not wrong, f"{wrong} are not as an unbroken run leaves them"

    def goes_on(self, verb: str, folder: Path, left: str = "") -> None:
        """The same call ends as an unbroken one does."""
        resumed = ["--resume"] * (folder / "out.unfinished").exists()
        ended = self.run(verb, folder, *resumed)
        assert ended.code == 0, ended.err
        assert self.check(verb, folder, left)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("bench")
    with Warm(partial(prepare, root)) as warm:
        warm.run(["--help"])
        yield Bench(root, warm)


def one_line(err: str) -> str:
    """What the command line says at last; progress may be before it, a traceback may not."""
    lines = err.splitlines()
    assert lines and lines[-1].startswith("growth: "), err
    assert "Traceback" not in err and sum(line.startswith("growth: ") for line in lines) == 1, err
    return lines[-1]


def drawn(verb: str, count: int, calls: int, kinds: Callable[[random.Random, int], Fault]) -> Iterator[Fault]:
    """`count` faults of a verb and more, one in each part of its calls; the same ones each time."""
    draw = random.Random(f"{verb} {count}")
    for i in itertools.count():
        yield kinds(draw, int((i % count + draw.random()) * calls / count))


def killed(draw: random.Random, at: int) -> Fault:
    """Before a call, or within the first write that goes beyond some bytes."""
    return draw.choice([Fault("kill", at), Fault("cut", at, draw.choice([0, 1, 50, 900, 5000, 20000]))])


def failing(draw: random.Random, at: int) -> Fault:
    """A disk, or the share of it that one may have, is full, or fails once; or no file more may be open."""
    full = Fault("full", at, draw.choice([0, 1, 50, 900, 5000, 20000]))
    lasting = Fault(draw.choice(["ENOSPC", "EDQUOT"]), at, lasting=True)
    return draw.choice([full, lasting, Fault(draw.choice(["EIO", "EMFILE"]), at)])


def share(request, part: float = 1, least: int = 1) -> int:
    """How often a verb meets a fault, so that all of them do so --kills times, or a part of that."""
    return max(least, math.ceil(request.config.getoption("--kills") * part / len(VERBS)))


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_killed_at_any_call_has_lost_nothing_and_goes_on(bench, request, tmp_path, verb):
    count = share(request)
    died, calls = 0, bench.unbroken(verb).calls
    for i, fault in enumerate(drawn(verb, count, calls, killed)):
        folder = tmp_path / str(i)
        folder.mkdir()
        ended = bench.run(verb, folder, fault=fault)
        assert ended.died or fault.kind == "cut" and ended.code == 0, (fault, ended.err)
        if not bench.check(verb, folder, KILLED + LONG.get(verb, "")):
            bench.goes_on(verb, folder, KILLED)
        shutil.rmtree(folder)
        died += ended.died
        if died == count:
            break


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_is_full_or_fails_is_one_line_and_leaves_nothing_half_there(
    bench, request, tmp_path, verb
):
    count = share(request, least=2)
    faults = drawn(verb, count, bench.unbroken(verb).calls, failing)
    for i, fault in enumerate(itertools.islice(faults, count)):
        folder = tmp_path / str(i)
        folder.mkdir()
        ended = bench.run(verb, folder, fault=fault)
        refused_or_whole(bench, verb, folder, ended, fault)
        shutil.rmtree(folder)


def refused_or_whole(bench: Bench, verb: str, folder: Path, ended: Ended, fault: object) -> None:
    """What the disk did was no harm, or is one line with a remedy; with room again the same call goes on."""
    assert ended.code in (0, 2), (fault, ended.err)
    if ended.code:
        remedy = one_line(ended.err).partition("; ")[2]
        assert re.search("room|disk|name another|move it|start again|resume", remedy), (fault, ended.err)
    if "the result is in" in ended.err:
        place = Path(re.search(r"the result is in (\S+);", ended.err)[1])
        bench.same(verb, place)
        shutil.rmtree(place)
    if not bench.check(verb, folder, LONG.get(verb, "")):
        assert ended.code == 2
        bench.goes_on(verb, folder)


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_stopped_at_any_call_cleans_up_and_goes_on(bench, request, tmp_path, verb):
    count = share(request, 1 / 2)
    kinds = {"terminate": 128 + signal.SIGTERM, "interrupt": 128 + signal.SIGINT}
    faults = drawn(verb, count, bench.unbroken(verb).calls, lambda draw, at: Fault(draw.choice([*kinds]), at))
    for i, fault in enumerate(itertools.islice(faults, count)):
        folder = tmp_path / str(i)
        folder.mkdir()
        ended = bench.run(verb, folder, fault=fault)
        assert ended.code == kinds[fault.kind] and one_line(ended.err), (fault, ended.err)
        if not bench.check(verb, folder, LONG.get(verb, "")):
            bench.goes_on(verb, folder)
        shutil.rmtree(folder)


PAIRS = [("grow", ""), ("shrink", ""), ("train", ""), ("train", "--resume"), ("recipe", "")]


@pytest.mark.parametrize(
    "verb, more", PAIRS, ids=[f"{verb} and {verb} {more}".strip() for verb, more in PAIRS]
)
def test_of_two_runs_into_one_folder_one_wins_and_the_other_says_so(bench, request, tmp_path, verb, more):
    """The first is held before some call while the second runs to its end."""
    count, calls = share(request, 1 / 2, least=2), bench.unbroken(verb).calls
    faults = drawn(verb, count, calls, lambda draw, at: Fault("stop", at))
    faults = [Fault("stop", calls // 2), *itertools.islice(faults, count - 1)]  # the first: amid its work
    for i, fault in enumerate(faults):
        folder = tmp_path / str(i)
        folder.mkdir()
        first = bench.warm.begin(words_of(verb, bench.root, folder), fault)
        assert bench.warm.end(first).code is None
        second = bench.run(verb, folder, *more.split())
        os.kill(first, signal.SIGCONT)
        both = [bench.warm.end(first), second]
        assert sorted(ended.code for ended in both) == [0, 2], (fault, both)
        said = next(one_line(ended.err) for ended in both if ended.code)
        if i == 0 and verb in LONG:
            assert second.code == 2 and "still going on" in said, both
        if "the result is in" in said:
            bench.same(verb, folder / "out-2")
            shutil.rmtree(folder / "out-2")
        assert bench.check(verb, folder)
        shutil.rmtree(folder)


@pytest.fixture
def read_only(bench, tmp_path) -> Iterator[Callable[[Path], None]]:
    """Makes everything below a folder read-only, until the test ends."""
    changed = []

    def close(folder: Path) -> None:
        for path in (folder, *folder.rglob("*")):
            changed.append((path, path.stat().st_mode))
            path.chmod(path.stat().st_mode & ~0o222)

    yield close
    for path, mode in reversed(changed):
        path.chmod(mode)


@pytest.mark.parametrize("verb", VERBS)
def test_a_source_needs_no_more_than_to_be_read_and_a_place_that_does_is_refused(
    bench, tmp_path, read_only, verb
):
    for name in bench.read:
        read_only(bench.root / name)
    open_, closed = tmp_path / "open", tmp_path / "closed"
    open_.mkdir(), closed.mkdir()
    read_only(closed)
    ended = bench.run(verb, open_, before=obey_modes)
    assert ended.code == 0 and bench.check(verb, open_), ended.err
    ended = bench.run(verb, closed, before=obey_modes)
    assert ended.code == 2 and "where nothing can be written; name another" in one_line(ended.err)
    assert not [*closed.iterdir()]


def test_a_cache_that_may_not_be_entered_or_written_is_named(bench, tmp_path, read_only):
    for mode in (0o000, 0o555):
        folder = tmp_path / oct(mode)
        (folder / "cache").mkdir(parents=True)
        (folder / "cache").chmod(mode)
        ended = bench.run("shrink", folder, before=obey_modes)
        (folder / "cache").chmod(0o755)
        assert ended.code == 2 and "cache: expected a folder for the cache" in one_line(ended.err)
        assert not bench.check("shrink", folder)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "learn"])
def test_a_disk_with_no_more_room_than_so_is_one_line_too(bench, request, verb):
    """A disk of its own, filled up to some bytes: native code meets it as Python does."""
    small = bench.warm.root / str(bench.root)[1:] / "small"
    if not os.path.ismount(small):
        pytest.skip("no disk may be mounted here")
    count = share(request, 1 / 4)
    takes = sum(map(len, bench.unbroken(verb).same.values()))
    draw = random.Random(verb)
    for i in range(count):
        free = os.statvfs(small)
        room = int(takes * (i + draw.random()) / count)
        (small / "others").write_bytes(bytes(free.f_bavail * free.f_frsize - room))
        (small / "in").mkdir()
        ended = bench.run(verb, small / "in")
        (small / "others").unlink()
        refused_or_whole(bench, verb, small / "in", ended, room)
        shutil.rmtree(small / "in")
