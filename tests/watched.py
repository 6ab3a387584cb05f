"""Every verb once, in a process that records what it writes: `python watched.py FOLDER`, for test_outside.py.

FOLDER holds src, text.txt and recipe.yaml; results go to FOLDER/work. Prints a JSON list of the paths that
were opened for writing, made, renamed, linked or removed, and of the hosts that were asked for.
"""

import json
import os
import sys
from pathlib import Path

import growth
from growth.cli.app import app
from growth.training import corpus, session, trainer  # noqa: F401  imports write nothing, but may be slow

# Events -> where their arguments have paths, and the folders that these are relative to.
WRITING = {"os.mkdir": [(0, 2)], "os.remove": [(0, 1)], "os.rmdir": [(0, 1)], "os.truncate": [(0, None)]}
WRITING |= {"os.rename": [(0, 2), (1, 3)], "os.link": [(1, 3)], "os.symlink": [(1, 2)], "os.chmod": [(0, 2)]}
ELSEWHERE = ("socket.connect", "subprocess.Popen", "os.system", "os.exec")
seen = []


def watch(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) and path is not None:
            seen.append(place(path, None))
    elif event in WRITING:
        for path, folder in WRITING[event]:
            seen.append(place(arguments[path], folder and arguments[folder]))
    elif event in ELSEWHERE:
        seen.append(f"/{event} {arguments}")


def place(path, folder):
    """Of a path that may be relative to an open folder, or be an open file."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    base = os.readlink(f"/proc/self/fd/{folder}") if folder not in (None, -1) else os.getcwd()
    return os.path.normpath(os.path.join(base, os.fsdecode(path)))


def run(*words):
    """A verb as the command line has it."""
    app([*map(str, words)], "growth", standalone_mode=False)


def main(folder):
    src, text, work, cache = (folder / name for name in ("src", "text.txt", "work", "cache"))
    few = "--batch-size", 2, "--sequence-length", 16
    seeing = "--data", text, "--windows", 2, "--sequence-length", 16, "--cache", cache
    ligo = "--method", "ligo", "--data", text, "--steps", 1
    two = "--data", text, "--steps", 2, *few
    corpus.HELD = 100  # so that the tokens go to the disk
    sys.addaudithook(watch)
    run("inspect", src)
    run("inspect", src, "--redundancy", *seeing)
    run("train", src, "--out", work / "trained", *two, "--schedule", "constant")
    run("grow", work / "trained", work / "grown", "--num-layers", 3, "--optimizer", work / "trained")
    run("grow", src, work / "learned", "--num-layers", 3, *ligo, *few)
    run("shrink", src, work / "shrunk", "--num-layers", 1, "--ffn-size", 80, *seeing)
    run("transfer", src, work / "moved", "--align", 1, "--data", text)
    run("check", work / "trained", work / "grown", "--generate")
    run("grow", src, work / "made", "--recipe", folder / "recipe.yaml")
    save, session.save = session.save, None  # the run ends there, with its checkpoints
    try:
        run("train", work / "grown", "--out", work / "cut", *two)
    except TypeError:
        session.save = save
    run("train", work / "grown", "--out", work / "cut", *two, "--resume")
    growth.grow(src, work / "nowhere" / "deep", method="stack", num_layers=4)
    return seen


if __name__ == "__main__":
    wrote = main(Path(sys.argv[1]))
    sys.stdout.write("\n" + json.dumps(wrote))
