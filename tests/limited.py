"""A call in a forked process that may take so much more memory and time than there is now, and no more."""

import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOM = 2**30  # bytes of address space beyond what the process has: imports and threads take some
SECONDS = 60  # of processor time


class Outcome(NamedTuple):
    """kind: the name of what was raised, "" for nothing, "killed" where the process ended; said: its
    message."""

    kind: str
    said: str


def limited(call: Callable[[], object], room: int = ROOM, seconds: int = SECONDS) -> Outcome:
    """What becomes of a call that may take `room` bytes and `seconds` more than this process has."""
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        os.close(ours)
        try:
            found = _called(call, room, seconds)
        finally:
            with os.fdopen(theirs, "wb") as pipe:
                pickle.dump(found, pipe)
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    return pickle.loads(sent) if sent else Outcome("killed", signal.Signals(os.WTERMSIG(status)).name)


def _called(call: Callable[[], object], room: int, seconds: int) -> Outcome:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent) + seconds, int(spent) + seconds + 1))
    try:
        call()
    except BaseException as error:  # whatever it is, it is told
        return Outcome(type(error).__name__, str(error))
    finally:
        sys.stdout.flush()
    return Outcome("", "")
