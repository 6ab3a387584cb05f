"""Commands of other tools, and of ours that take long, read as their own parsers read them; nothing runs."""

import argparse
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from documents import ROOT
from torch.distributed.run import get_args_parser
from typer import BadParameter
from typer.main import get_command

from growth.cli.app import app

VERBS = get_command(app).commands
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARSERS = {"torchrun": get_args_parser(), "accelerate": launch_command_parser()}
WRONG = AssertionError, SystemExit, BadParameter.__base__  # typer has click's exceptions, and names few


def parsed(words: list[str]) -> None:
    """As the command line reads it; raises where there is no such verb or option."""
    VERBS[words[0]].make_context(words[0], words[1:])


def launched(words: list[str]) -> list[str]:
    """What torchrun or accelerate is told to start: the words after `-m growth`."""
    given = PARSERS[words[0]].parse_args(words[1:] if words[0] == "torchrun" else words[2:])
    assert (given.module, given.training_script) == (True, "growth")
    return given.training_script_args


class Parsed(Exception):
    """Raised in the place of what would run."""


def parsed_alone(module: str, words: list[str]) -> None:
    """What a module's own argparse makes of the words; one that has none takes none, and is not run."""
    if "argparse" not in Path(find_spec(module).origin).read_text():
        assert not words, f"{module} takes no options, got {words}"
        return

    def stopped(self, *given):
        self.allow_abbrev = False
        parse(self, *given)
        raise Parsed

    parse = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(sys, "argv", [module, *words])
        patch.setattr(argparse.ArgumentParser, "parse_args", stopped)
        runpy.run_module(module, run_name="__main__")


def check_make(target: str, variables: list[str]) -> None:
    """Is there such a target, and does each variable change what it does?"""
    assert target in targets(), f"make: no target {target}"
    for variable in variables:
        name, _, value = variable.partition("=")
        command = ("make", "--dry-run", "--always-make", "-C", ROOT, target, f"{name}=canary")
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert value and "canary" in shown, f"make {target} does not look at {name}"


def check_lm_eval(words: list[str]) -> None:
    from lm_eval._cli import HarnessCLI

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        HarnessCLI().parse_args()


def check_pip(words: list[str]) -> None:
    """Are they extras and libraries of this project?"""
    assert words[1] == "install", words
    needed = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    for word in (x for x in words[2:] if not x.startswith("-")):
        name, _, extras = word.rstrip("]").partition("[")
        known = {re.match(r"\w+", x)[0] for x in needed} | {".", "lcikernels"}
        assert name in known or re.match(r"dist/lcikernels-", name), word
        assert set(filter(None, extras.split(","))) <= {*PROJECT["project"]["optional-dependencies"]}, word


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
