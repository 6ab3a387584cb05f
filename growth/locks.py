"""A folder in which one process works at a time: a second one is told, and touches nothing."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from growth.errors import Refusal, refuse
from growth.folders import folders_above, hidden_in

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "lock"  # held by the process that works in the folder, and by none once that is gone, however it went


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` inside. Raises Refusal where another process does.

    Where the system or the disk knows no locks, nobody is kept out.
    """
    if fcntl is None:
        yield
        return
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            file = held.enter_context((folder / LOCK).open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _busy(folder) from error
        yield


def refuse_busy(folder: Path) -> None:
    """Raises Refusal where a process works in `folder`."""
    if os.path.exists(folder / LOCK):
        with alone_in(folder):
            pass


def appear(folder: Path, files: Mapping[str, str], held: contextlib.ExitStack) -> None:
    """Make `folder` with these texts in it, all at once, and locked until `held` is closed.

    Raises Refusal where it cannot be made, or another process has made one meanwhile.
    """
    try:
        with folders_above(folder), hidden_in(folder.parent) as hidden:
            whole = hidden / "whole"
            whole.mkdir()
            for name, text in files.items():
                (whole / name).write_text(text)
            held.enter_context(alone_in(whole))
            try:
                os.rename(whole, folder)
            except BaseException:
                if not whole.exists():  # renamed, and stopped at once
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        refuse_busy(folder)
        raise refuse(str(folder), "a folder that can be made", error.strerror, "name another") from error


def _busy(folder: Path) -> Refusal:
    got, remedy = "one that is still going on", "wait for its end, or name another output"
    return refuse(str(folder), "a run that was interrupted", got, remedy)
