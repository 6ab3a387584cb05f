"""The command line, as a person calls it, in this process."""

import sys

import pytest

from growth.__main__ import main


def run(monkeypatch, capsys, *words):
    """(exit code, standard output, standard error) of `growth WORDS`."""
    monkeypatch.setattr(sys, "argv", ["growth", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err
