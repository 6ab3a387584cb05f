"""Where results go: a folder appears at once and whole, or not at all; nothing is overwritten or lost."""

import contextlib
import itertools
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from growth.errors import Refusal, reason, refuse


class Taken(Refusal, FileExistsError):
    """A result that is finished, and is not where it was to go, but in `place`."""

    def __init__(self, dst: Path, place: Path, why: str):
        got = f"one that {why}; the result is in {place}"
        super().__init__(refuse(str(dst), "a free place", got, "move it where you want it"))
        self.place = place


def named_folder(path: str | Path, what: str) -> Path:
    """`path` as it is, or a refusal where it is empty, no path at all, or not UTF-8."""
    try:
        fits = isinstance(path, str | os.PathLike) and str(path).encode() and "\0" not in str(path)
    except UnicodeEncodeError:  # bytes that are no UTF-8: json and a card could not name it
        fits = False
    if not fits:
        raise refuse(what, "the name of a folder", repr(str(path)), "name one")
    return Path(path)


def refuse_outside(folder: Path, *files: Path) -> None:
    """Raises Refusal where one of a folder's files leads out of it, so that somebody's own would be
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
    above = nearest(dst)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise refuse(
            str(dst), "a folder to write it in", f"{above}, where nothing can be written", "name another"
        )


def refuse_too_large(dst: str | Path, size: int) -> None:
    """A result of `size` bytes has room where it goes; found before the work that makes it."""
    free = shutil.disk_usage(nearest(Path(dst))).free
    if size > free:
        refuse_no_place(dst)
        raise refuse(
            str(dst),
            f"room for {size / 1e9:,.3g} GB",
            f"{free / 1e9:,.3g} GB that are free",
            "choose smaller sizes, or another disk",
        )


def refuse_no_place(dst: str | Path) -> None:
    """Raises Refusal where no folder can be made for `dst`: /proc tells of no room, and has none to make."""
    with beside(dst):
        pass


def nearest(dst: Path) -> Path:
    """The nearest folder above that is there already."""
    # Not Path.exists, which raises where a folder may not be entered.
    return next(folder for folder in dst.absolute().parents if os.path.exists(folder))


def of_disk(error: BaseException) -> bool:
    """Is it what a disk that is full or fails makes of a write?

    torch's archives and the libraries in Rust know no OSError; these name a file of theirs, the others the
    system's number.
    """
    told = ("inline_container", "(os error ")
    known = isinstance(error, OSError | SafetensorError) or any(text in str(error) for text in told)
    return known and not isinstance(error, Refusal)


@contextlib.contextmanager
def hidden_in(place: Path) -> Iterator[Path]:
    """A new folder in `place`, its owner's alone, gone after the block. A process that is killed leaves it; a
    result that cannot be moved out of it stays in it."""
    folder = place / f".growth-{secrets.token_hex(4)}"
    try:
        folder.mkdir(0o700)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)  # inside, for it may be stopped too
    except BaseException as error:
        if not (isinstance(error, Taken) and error.place.is_relative_to(folder)):
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def beside(dst: str | Path) -> Iterator[Path]:
    """A temporary folder on the disk of `dst`, gone after the block. Raises Refusal where the disk fails."""
    try:
        with hidden_in(nearest(Path(dst))) as folder:
            yield folder
    except Exception as error:
        if of_disk(error):
            raise _unwritten(dst, error) from error
        raise


@contextlib.contextmanager
def folders_above(dst: Path) -> Iterator[None]:
    """Makes the folders that `dst` is to be in; where the block fails, none of them is left empty."""
    new = [above for above in dst.absolute().parents if not os.path.exists(above)]  # the deepest first
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for above in new:
            with contextlib.suppress(OSError):
                above.rmdir()
        raise


def publish(folder: Path, dst: Path) -> None:
    """Rename a finished folder to `dst`. Where that was taken meanwhile, it becomes dst-2, dst-3, ...

    Raises Taken then, which names the place. Nothing finished is deleted, nothing is overwritten.
    """
    with contextlib.suppress(OSError):  # some mounts have no permissions to change
        for file in folder.rglob("*"):  # safetensors writes for the owner alone, whatever the umask
            if file.is_file():
                file.chmod(folder.stat().st_mode & 0o666)
    # A disk may fail once; a place that is free is asked for twice.
    names = itertools.chain([dst, dst], (dst.with_name(f"{dst.name}-{i}") for i in range(2, 100)))
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
        raise Taken(dst, place, why if place == folder else "was taken meanwhile")


@contextlib.contextmanager
def staged(dst: str | Path) -> Iterator[Path]:
    """A temporary folder beside `dst` that becomes `dst` when the block ends well; else nothing is left.

    Raises Refusal where `dst` exists, and where it cannot be written.
    """
    dst = Path(dst)
    refuse_existing(dst)
    try:
        with folders_above(dst), hidden_in(dst.parent) as hidden:
            folder = hidden / "whole"  # of its own, whose mode follows the umask
            folder.mkdir()
            yield folder
            publish(folder, dst)
    except Exception as error:
        if of_disk(error):
            raise _unwritten(dst, error) from error
        raise


def _unwritten(dst: str | Path, error: Exception) -> Refusal:
    why = getattr(error, "strerror", None) or reason(error)
    return refuse(str(dst), "a folder to write", why, "make room, or name another")
