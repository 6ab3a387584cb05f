"""The command line on a bad day: killed, stopped, or on a disk that fails, at a call that changes files.

`Warm` is a process that has imported what the verbs do and forks itself for every command, so that one costs
what it computes. The calls that count are those that Python's audit events name: opening to write, renaming,
making, removing. In between, nothing on a disk changes but files that are being written, by Python or by
native code; there the limit on a file's size takes over, at whose byte the process dies ("cut") or writing
fails ("full"). Faults are thus numbered, and every window between two calls is hit.
"""

import ctypes
import errno
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest
from train_ranks import SERVER, forkserver

SECONDS = 300  # then a command that hangs is killed
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Fault(NamedTuple):
    """What happens before the call number `at`.

    kind: "kill" | "stop", which SIGCONT ends | "terminate" | "interrupt" | "cut" and "full": no file grows
    beyond `size` bytes from there on | the name of an error, which the first call from there on raises that
    opens, makes or renames; `lasting`, all that open or make do.
    """

    kind: str
    at: int
    size: int = 0
    lasting: bool = False


SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM}
SIGNALS["interrupt"] = signal.SIGINT


class Job(NamedTuple):
    """A command. before: called in the process first, such as to give up another user's rights."""

    words: tuple[str, ...]
    fault: Fault | None = None
    before: Callable[[], None] | None = None


class Ended(NamedTuple):
    """code: of the exit, below 0 that of the signal, None where it is stopped. calls: those that counted."""

    code: int | None
    out: str
    err: str
    calls: int

    @property
    def died(self) -> bool:
        return self.code in (-signal.SIGKILL, -signal.SIGXFSZ)


class Warm:
    """Commands in processes of their own. A context manager."""

    def __init__(self, prepare: Callable[[], None]):
        """prepare: called once, in the process that is forked; importable."""
        with pytest.MonkeyPatch.context() as patch:  # the server has no other way to learn where modules are
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()
            self._here, there = SERVER.Pipe()
            self._process = SERVER.Process(target=_serve, args=(there, prepare), daemon=True)
            self._process.start()
        there.close()
        self.root = Path(f"/proc/{self._process.pid}/root")  # what it sees: also what it has mounted

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *exception) -> None:
        self._here.close()
        self._process.join(SECONDS)

    def begin(self, words, fault: Fault | None = None, before: Callable[[], None] | None = None) -> int:
        """The number of a process that runs `growth *words`."""
        self._here.send(Job(tuple(map(str, words)), fault, before))
        return self._here.recv()

    def end(self, pid: int) -> Ended:
        """Waits until it ends, or stops."""
        self._here.send(pid)
        return self._here.recv()

    def run(self, words, fault: Fault | None = None, before: Callable[[], None] | None = None) -> Ended:
        return self.end(self.begin(words, fault, before))


def _serve(connection: Connection, prepare: Callable[[], None]) -> None:
    prepare()
    pipes: dict[int, tuple[int, ...]] = {}
    try:
        while True:
            asked = connection.recv()
            if isinstance(asked, Job):
                pid, pipes_of = _forked(asked)
                pipes[pid] = pipes_of
                connection.send(pid)
            else:
                connection.send(_ended(asked, pipes))
    except EOFError:
        for pid in pipes:
            os.kill(pid, signal.SIGKILL)


def _forked(job: Job) -> tuple[int, tuple[int, ...]]:
    ends = [os.pipe() for _ in range(3)]
    if pid := os.fork():
        for _, write in ends:
            os.close(write)
        return pid, tuple(read for read, _ in ends)
    code = 70
    try:
        for (_, write), descriptor in zip(ends, (1, 2)):
            os.dup2(write, descriptor)
        code = _commanded(job, ends[2][1])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(pid: int, pipes: dict[int, tuple[int, ...]]) -> Ended:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return Ended(None, "", "", 0)
    texts = []
    for descriptor in pipes.pop(pid):
        with open(descriptor, "rb") as file:
            texts.append(file.read())
    return Ended(os.waitstatus_to_exitcode(status), texts[0].decode(), texts[1].decode(), len(texts[2]))


def _commanded(job: Job, counter: int) -> int:
    """Runs a command in this process, which ends with it; a byte goes to `counter` for every call."""
    from growth.__main__ import main

    signal.alarm(SECONDS)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True
    if job.before:
        job.before()
    sys.argv = ["growth", *job.words]
    sys.addaudithook(_Watch(job.fault, counter))
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


class _Watch:
    """An audit hook."""

    def __init__(self, fault: Fault | None, counter: int):
        self.fault, self.counter, self.calls = fault, counter, -1

    def __call__(self, event: str, arguments: tuple) -> None:
        if not changes(event, arguments):
            return
        self.calls += 1
        os.write(self.counter, b".")
        fault = self.fault
        if fault is None or self.calls < fault.at:
            return
        if fault.kind in SIGNALS:
            self.fault = None
            os.kill(os.getpid(), SIGNALS[fault.kind])
        elif fault.kind in ("cut", "full"):
            self.fault = None
            if fault.kind == "cut":
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, hard))
        elif event in ("open", "os.mkdir") or event == "os.rename" and not fault.lasting:
            self.fault = fault if fault.lasting else None
            number = getattr(errno, fault.kind)
            raise OSError(number, os.strerror(number), str(arguments[0]))


def changes(event: str, arguments: tuple) -> bool:
    """Does an audit event change what is on a disk?"""
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & WRITING
        return bool(writes) and not isinstance(path, int) and not str(path).startswith("/dev/")
    return event in CHANGES


def obey_modes() -> None:
    """Root gives up the rights that pass over the modes of files; whoever else calls it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, held) == 0
    for kind in (0, 1):  # effective; permitted, by which access() goes
        held[kind] &= ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    assert libc.capset(header, held) == 0


def mount_small(folder: Path, size: int) -> bool:
    """A disk of `size` bytes in `folder`, for this process and its children; False where none may be."""
    libc, private, new = ctypes.CDLL(None, use_errno=True), 1 << 18 | 1 << 14, 0x20000  # MS_PRIVATE | MS_REC
    if libc.unshare(new) or libc.mount(b"none", b"/", None, private, None):
        return False
    return libc.mount(b"none", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) == 0


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, by its path."""
    return {str(x.relative_to(folder)): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}
