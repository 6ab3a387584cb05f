"""Where results go: a folder appears at once and whole, or not at all; nothing is overwritten or lost."""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from growth.errors import Refusal, reason, refuse


class Taken(Refusal, FileExistsError):
    """A result that is finished, and is not where it was to go: the message says where it is."""


def named_folder(path: str | Path, what: str) -> Path:
    """`path` as it is, or a refusal where it is empty, no path at all, or not UTF-8."""
    try:
        fits = str(path).encode() and "\0" not in str(path)
    except UnicodeEncodeError:  # bytes that are no UTF-8: json and a card could not name it
        fits = False
    if not fits:
        raise refuse(what, "the name of a folder", repr(str(path)), "name one")
    return Path(path)


def refuse_outside(folder: Path, *files: Path) -> None:
    """Raises Refusal where one of a folder's files leads out of it, so that somebody's own would be read and
    copied; the Hub's cache is left as it is, whose snapshots link to files beside them."""
    inside = real = Path(os.path.realpath(folder))
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        inside = real.parent.parent
    for file in files:
        if not (leads := Path(os.path.realpath(file))).is_relative_to(inside):
            raise refuse(str(file), "a file in its folder", f"a link to {leads}", "copy that file there")


def refuse_odd_output(dst: str | Path | None, dry_run: bool) -> None:
    """A result has a place, and one that is free; a dry run needs none."""
    if dry_run:
        return
    if dst is None:
        raise refuse("output folder", "the name of a new folder", "none", "name one, or ask for a dry run")
    refuse_existing(dst)


def refuse_existing(dst: str | Path) -> None:
    """Nothing is overwritten, and long work does not begin where its result has no place."""
    dst = named_folder(dst, "output folder")
    try:
        os.lstat(dst)
        exists = True
    except (FileNotFoundError, NotADirectoryError):
        exists = False
    except OSError as error:  # a name that is too long, a loop of links, a folder that may not be entered
        raise refuse(str(dst), "a folder that can be made", error.strerror, "name another") from error
    if exists:
        raise refuse(
            str(dst),
            "an output folder that does not exist yet",
            "one that does",
            "name another, or remove it first",
        )
    above = _above(dst)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise refuse(
            str(dst), "a folder to write it in", f"{above}, where nothing can be written", "name another"
        )


def refuse_too_large(dst: str | Path, size: int) -> None:
    """A result of `size` bytes has room where it goes; found before the work that makes it."""
    free = shutil.disk_usage(_above(Path(dst))).free
    if size > free:
        raise refuse(
            str(dst),
            f"room for {size / 1e9:,.3g} GB",
            f"{free / 1e9:,.3g} GB that are free",
            "choose smaller sizes, or another disk",
        )


def _above(dst: Path) -> Path:
    """The nearest folder above that is there already."""
    return next(folder for folder in dst.absolute().parents if folder.exists())


@contextlib.contextmanager
def beside(dst: str | Path) -> Iterator[Path]:
    """A temporary folder on the disk of `dst`, gone after the block."""
    with tempfile.TemporaryDirectory(prefix=".growth-", dir=_above(Path(dst))) as folder:
        yield Path(folder)


def publish(folder: Path, dst: Path) -> None:
    """Rename a finished folder to `dst`. Where that was taken meanwhile, it becomes dst-2, dst-3, ...

    Raises Taken then, which names the place. Nothing finished is deleted, nothing is overwritten.
    """
    for file in folder.rglob("*"):  # safetensors writes for the owner alone, whatever the umask
        if file.is_file():
            with contextlib.suppress(OSError):  # some mounts have no permissions to change
                file.chmod(folder.stat().st_mode & 0o666)
    names = itertools.chain([dst], (dst.with_name(f"{dst.name}-{i}") for i in range(2, 100)))
    place, why = folder, "cannot be made"
    for name in names:
        try:
            if not os.path.lexists(name):
                os.rename(folder, name)
                place = name
                break
        except OSError as error:  # taken between these two lines, or no longer a place to write
            why = error.strerror or why
    if place != dst:
        got = f"one that {why if place == folder else 'was taken meanwhile'}; the result is in {place}"
        raise Taken(refuse(str(dst), "a free place", got, "move it where you want it"))


@contextlib.contextmanager
def staged(dst: str | Path) -> Iterator[Path]:
    """A temporary folder beside `dst` that becomes `dst` when the block ends well; else nothing is left.

    Raises Refusal where `dst` exists, and where it cannot be written.
    """
    dst = Path(dst)
    refuse_existing(dst)
    new = [above for above in dst.absolute().parents if not above.exists()]  # the deepest first
    hidden = None
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=".growth-", dir=dst.parent))  # its owner's, whatever the umask
        folder = hidden / "whole"
        folder.mkdir()
        yield folder
    except BaseException as error:
        if hidden:
            shutil.rmtree(hidden, ignore_errors=True)
        for above in new:
            with contextlib.suppress(OSError):
                above.rmdir()
        if isinstance(error, OSError | SafetensorError):
            why = getattr(error, "strerror", None) or reason(error)
            raise refuse(str(dst), "a folder to write", why, "make room, or name another") from error
        raise
    try:
        publish(folder, dst)
    finally:
        with contextlib.suppress(OSError):
            hidden.rmdir()  # empty, unless the result had to stay in it
