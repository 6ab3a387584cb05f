"""Where results go: whole or not at all, nothing overwritten, nothing finished lost, nothing left behind."""

import contextlib
import errno
import os
import runpy
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoints import neox
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig

import growth
from growth import folders, writing
from growth.checkpoint import Checkpoint
from growth.errors import Refusal
from growth.folders import staged
from growth.jsonfile import read_object, rewrite
from growth.methods import Ligo
from growth.plan import Row
from growth.record import enter_recipe
from growth.sizes import Sizes
from growth.writing import Writer, write_checkpoint

TAKEN = {
    "a folder": lambda dst: dst.mkdir(),
    "a folder with a file": lambda dst: (dst.mkdir(), (dst / "theirs").touch()),
    "a file": lambda dst: dst.write_text("theirs"),
    "a link": lambda dst: dst.symlink_to("/"),
    "a dangling link": lambda dst: dst.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_a_result_whose_place_was_taken_stays_beside_it_and_is_named(tmp_path, kind):
    (tmp_path / "out-2").touch()
    with pytest.raises(Refusal, match="the result is in .*out-3"), staged(tmp_path / "out") as folder:
        (folder / "ours").touch()
        TAKEN[kind](tmp_path / "out")
    assert (tmp_path / "out-3" / "ours").exists() and not (tmp_path / "out" / "ours").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out-2", "out-3"}


def test_what_was_fitted_beside_such_a_result_is_removed(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Refusal, match="out-2"), folders.beside(out) as fitted, staged(out):
        (fitted / "weights").touch()
        out.mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out-2"}


def test_a_disk_that_fails_once_takes_the_result_all_the_same(tmp_path, monkeypatch):
    rename, fails = os.rename, iter([True])

    def failing(src, dst):
        if next(fails, False):
            raise OSError(errno.EIO, "Input/output error")
        rename(src, dst)

    monkeypatch.setattr(folders.os, "rename", failing)
    with staged(tmp_path / "out") as folder:
        (folder / "ours").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "ours").exists()


def test_a_recipes_result_whose_place_was_taken_stays(source, tmp_path, monkeypatch):
    publish = folders.publish

    def taken(folder, dst):
        dst.mkdir(exist_ok=True)
        publish(folder, dst)

    monkeypatch.setattr(folders, "publish", taken)
    recipe = {"steps": [{"grow": {"method": "stack", "num-layers": 4}}]}
    with pytest.raises(Refusal, match=r"step 1, grow: .*out\.recipe/1-2; move it where you want it"):
        growth.run_recipe(recipe, tmp_path / "out", source)
    assert (tmp_path / "out.recipe" / "1-2" / "model.safetensors").exists()


def test_a_result_that_cannot_be_moved_stays_where_it_is_and_is_named(tmp_path, monkeypatch):
    def gone(src, dst):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folders.os, "rename", gone)
    with (
        pytest.raises(Refusal, match="Input/output error; the result is in") as refusal,
        staged(tmp_path / "out") as folder,
    ):
        (folder / "ours").touch()
    assert str(folder) in str(refusal.value) and (folder / "ours").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(source, tmp_path, monkeypatch, error):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(Writer, "add", full)
    with pytest.raises(Refusal, match="got No space.*; make room"):
        growth.grow(source, tmp_path / "new" / "deep" / "out", method="lemon", num_layers=4)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_found_before_the_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    monkeypatch.setattr(writing, "Writer", None)
    for make in (
        lambda: growth.grow(source, tmp_path / "out", method="lemon", hidden_size=192),
        lambda: growth.transfer(source, tmp_path / "out"),
    ):
        with pytest.raises(Refusal, match=r"expected room for 0\.00\d+ GB, got 0\.001 GB that are free"):
            make()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="has no /proc")
def test_a_place_that_takes_no_files_is_said_to_be_one(source):
    for verb, options in ((growth.grow, {"num_layers": 4}), (growth.transfer, {})):
        with pytest.raises(Refusal, match="/proc/out: expected a folder to write.*name another"):
            verb(source, "/proc/out", **options)


ODD = {"": "the name of a folder, got ''", "a\0b": "the name of a folder", "a" * 300: "File name too long"}
ODD |= dict.fromkeys(("bad\udcff", 96), "the name of a folder")


@pytest.mark.parametrize("name", ODD, ids=["empty", "NUL", "too long", "not UTF-8", "a number"])
def test_a_name_that_is_none_is_refused(source, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=ODD[name]):
        growth.grow(source, name, method="lemon", num_layers=4)
    with pytest.raises(Refusal):
        growth.grow(name, "out", method="lemon", num_layers=4)
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_there_is_can_be_written(source, tmp_path):
    growth.transfer(source, tmp_path / ("a" * 255))
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_what_is_stopped_as_it_cleans_up_leaves_its_result_alone(tmp_path, monkeypatch):
    def stopped(*of, **how):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(folders.shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as folder:
        (folder / "ours").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "ours"]


def test_where_the_system_knows_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    """Windows."""
    found = {}
    for known in (True, False):
        if not known:
            monkeypatch.setitem(sys.modules, "fcntl", None)
        locks = runpy.run_path(folders.__file__.replace("folders", "locks"))
        with contextlib.ExitStack() as held:
            held.enter_context(locks["alone_in"](tmp_path))
            try:
                locks["refuse_busy"](tmp_path)
                held.enter_context(locks["alone_in"](tmp_path))
                found[known] = "let in"
            except Refusal as refusal:
                found[known] = str(refusal)
    assert "one that is still going on" in found[True] and found[False] == "let in"


def test_a_file_that_two_processes_write_at_once_is_whole_and_none_of_a_failed_one_stays(
    tmp_path, monkeypatch
):
    path, replace = tmp_path / "a.json", os.replace

    def late(new, place):
        monkeypatch.setattr(os, "replace", replace)
        rewrite(path, {"by": "the other"})
        replace(new, place)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", late)
    rewrite(path, {"by": "one"})
    assert read_object(path) == {"by": "one"}
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        rewrite(path, {"by": "none"})
    assert read_object(path) == {"by": "one"} and list(tmp_path.iterdir()) == [path]


def test_a_recipe_is_entered_with_no_part_of_a_file_in_what_is_published(tmp_path, monkeypatch):
    """Where a process is killed before the name is taken, that part stays."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1/growth.json").write_text("{}")
    monkeypatch.setattr(os, "replace", lambda new, place: None)  # as a process that ends here
    enter_recipe(tmp_path / "1", {"steps": []})
    assert [x.name for x in (tmp_path / "1").iterdir()] == ["growth.json"]
    assert [x.name.startswith(".growth.json.") for x in tmp_path.iterdir() if x.is_file()] == [True]


def test_permissions_follow_the_umask(tmp_path):
    src = neox(tmp_path / "src")
    (src / "tokenizer.json").chmod(0o400)
    before = os.umask(0o027)
    try:
        growth.transfer(src, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750 and modes == {0o640}


def test_a_source_that_changes_while_it_is_read_leaves_no_target(tmp_path, monkeypatch):
    src, add = neox(tmp_path / "src"), Writer.add

    def touched(self, file, row, blocks):
        add(self, file, row, blocks)
        os.utime(src / "model.safetensors", ns=(1, 1))

    monkeypatch.setattr(Writer, "add", touched)
    with pytest.raises(Refusal, match="expected the file that was there at first, got another one now"):
        growth.grow(src, tmp_path / "out", method="lemon", num_layers=4)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_source_that_vanishes_while_it_is_read_leaves_no_target(tmp_path, monkeypatch):
    src, add = neox(tmp_path / "src"), Writer.add

    def removed(self, file, row, blocks):
        add(self, file, row, blocks)
        (src / "model.safetensors").unlink(missing_ok=True)

    monkeypatch.setattr(Writer, "add", removed)
    with pytest.raises(Refusal, match="model.safetensors: expected .*, got none there any more"):
        growth.grow(src, tmp_path / "out", method="lemon", num_layers=4)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


SLOW = """
import signal, sys, time
from growth import writing
from growth.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs in the background ignore it

def add(self, file, row, blocks):
    print("writing", flush=True)
    time.sleep(60)

writing.Writer.add = add
sys.argv = ["growth", "transfer", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_cleans_up_and_says_so_in_one_line(source, tmp_path, number, code):
    command = [sys.executable, "-c", SLOW, str(source), str(tmp_path / "out")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "writing\n"
    run.send_signal(number)
    _, err = run.communicate()
    assert run.returncode == code
    assert err.strip() in ("growth: terminated", "growth: interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["lemon", "stack", "net2net", "ligo"])
def test_what_is_not_finite_in_its_dtype_is_not_written(tmp_path, text, method):
    src = neox(tmp_path / "src", torch.float16)
    tensors = load_file(src / "model.safetensors")
    tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][3] = float("inf")
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    learned = Ligo(data=text, steps=1, batch_size=2, sequence_length=16)
    with pytest.raises(
        Refusal, match="expected (finite numbers in float16|one at which the loss stays finite)"
    ):
        how = learned if method == "ligo" else method
        growth.grow(src, tmp_path / "out", Sizes(hidden=120, layers=4), how)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e6])
def test_what_rounding_makes_infinite_is_not_written(source, tmp_path, number):
    rows = [Row("w", (4,), "float16", "copied")]
    made = iter([(rows[0], (torch.ones(2), torch.tensor([1.0, number])))])
    with pytest.raises(Refusal, match="w: expected finite numbers in float16, got others"):
        write_checkpoint(tmp_path / "out", GPTNeoXConfig(), made, rows, Checkpoint(source), {})
    assert list(tmp_path.iterdir()) == []


def test_a_mount_without_permissions_is_written_all_the_same(source, tmp_path, monkeypatch):
    def refused(self, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(folders.Path, "chmod", refused)
    growth.transfer(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_is_none_is_refused_by_every_verb(source, text, tmp_path, seed):
    for make in (
        lambda out: growth.grow(source, out, method="lemon", num_layers=4, seed=seed),
        lambda out: growth.transfer(source, out, seed=seed),
        lambda out: growth.train(source, text, out, steps=1, batch_size=1, seed=seed),
    ):
        with pytest.raises(Refusal, match="seed: expected 0 to 4294967295"):
            make(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
