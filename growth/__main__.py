"""The command line: what `growth` runs, and its exit codes."""

import signal
import sys
from typing import Any

from growth.errors import Alone, Refusal, explained, first_process, reason, refuse

REMEDY = "make room, or look at the disk and at its permissions"
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
SAID = {INTERRUPTED: "interrupted", TERMINATED: "terminated"}


class Terminated(SystemExit):
    """By SIGTERM."""


def main() -> None:
    """Run the command line. A refusal is one line and exit code 2; what is stopped leaves nothing behind."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        code = _run(sys.argv[1:] or ["--help"])
    except Refusal as refusal:
        if first_process() or isinstance(refusal, Alone):
            print(f"growth: {refusal}", file=sys.stderr)
        code = 2
    except ImportError as error:
        if "pip install" not in (told := reason(explained(error))):  # a fault of ours
            raise
        if first_process():
            print(f"growth: {told}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Terminated:
        code = TERMINATED
    except Exception as error:
        from growth.folders import of_disk  # and safetensors, which is there by now

        if not of_disk(error):
            raise
        what = getattr(error, "filename", None) or "a file"  # where no verb knows what it was for
        refusal = refuse(what, "one that can be read and written", reason(error), REMEDY)
        print(f"growth: {refusal}", file=sys.stderr)
        code = 2
    if code in SAID and first_process():  # some typers return INTERRUPTED by themselves
        print(f"growth: {SAID[code]}", file=sys.stderr)
    sys.exit(code)


def _run(words: list[str]) -> int:
    """The exit code of one verb."""
    import typer  # here, for what is not installed is a line too

    from growth.cli.app import app

    usage = typer.BadParameter.__base__  # typer has click's exceptions, of its own or click's, and names few
    try:
        return _code(app(words, "growth", standalone_mode=False))
    except usage as error:  # an unknown option, a missing argument, a number that is none
        what, where = error.format_message(), error.ctx.command_path if error.ctx else "growth"
        if first_process():
            print(f"growth: {' '.join(what.split()).rstrip('.')}; see {where} --help", file=sys.stderr)
        return 2
    except typer.Abort:
        return INTERRUPTED


def _code(done: Any) -> int:
    """0, but where an equality that was promised does not hold, or typer says otherwise."""
    return done if isinstance(done, int) else int(not getattr(done, "kept", True))


def _stop(number: int, frame) -> None:
    """SIGTERM unwinds as SIGINT does, so that what cleans up does so; a second one is not waited for."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated(TERMINATED)


if __name__ == "__main__":
    main()
