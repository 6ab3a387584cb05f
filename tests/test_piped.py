"""What is printed into a pipe that nobody reads any more: `python -m lcikernels | head -1`."""

import signal
import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGPIPE")
@pytest.mark.parametrize("command", ["lcikernels", "lcikernels.compat.transformers", "growth"])
def test_a_reader_that_leaves_is_no_traceback(command):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", command], **pipes) as told:
        told.stdout.close()  # before it has imported anything
        assert told.stderr.read() == b""
    assert told.returncode in (-signal.SIGPIPE, 1), "1 is rich's and typer's"
