"""Every block and command of README.md, CONTRIBUTING.md and docs/ runs, in the order of the document.

python   runs as it is written, or is the file that its first line names; in CONTRIBUTING.md one block goes on
         with the names of those before
sh       `growth` runs on random models of the shape that the documents speak of, an eighth as wide: so sizes
         of 256 and more are divided by 8, and steps by 500. As they are written the options are parsed.
         `growth demo`, which takes minutes, what torchrun and accelerate start, `python -m benchmarks.*` and
         lm_eval are parsed alone, by the parsers that they have. `python -m` runs where a module of the
         package answers at once. `make` needs its target, and variables that change what that does; pip the
         extras and the libraries of pyproject.toml; LEFT are the words of other people's tools
yaml     a recipe, with numbers as above, written to the file that its first line names
console  the command after "$" is refused with exactly the line below it, or what that begins with
pycon    the line after ">>>" raises exactly what stands below it, or what that begins with
text     words of setup.py; behind "growth: " all that is raised where disks fail or runs meet, "..." for what
         differs
"""

import contextlib
import errno
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import command
import pytest
import torch
import yaml
from checkpoints import ALL, neox
from documents import DOCUMENTS, ROOT, blocks, commands, prose, spans, text_of
from parsing import (
    PARSERS,
    VERBS,
    WRONG,
    check_lm_eval,
    check_make,
    check_pip,
    launched,
    parsed,
    parsed_alone,
)
from tolerance import assert_agrees

import lcikernels
from growth.errors import Refusal
from growth.families import FAMILIES
from growth.folders import publish, refuse_existing, refuse_too_large, staged
from growth.locks import alone_in, refuse_busy
from growth.methods import METHODS
from growth.training.run import _stopped, refuse_full
from lcikernels.backends import TABLES
from lcikernels.compat.transformers import unpatch

LANGUAGES = {"python", "sh", "yaml", "console", "pycon", "text", ""}
LEFT = {"source", "git"}
WIDTHS, STEPS = ("hidden-size", "ffn-size"), ("steps", "align")
SET = r"[A-Z]+=(?:'[^']*'|[^\s'\`,:;.]+(?:\.\d+)*)"  # a variable and its value, in text


def fewer(name: str, value):
    """The value of an option for a model an eighth as wide, and for a few steps."""
    if name in WIDTHS and int(value) >= 256:
        return int(value) // 8
    return max(2, int(value) // 500) if name in STEPS else value


def scaled(words: list[str]) -> list[str]:
    """A command with such values."""
    return [str(fewer(before.removeprefix("--"), word)) for before, word in zip(["", *words], words)]


def sources(folder: Path) -> None:
    """What the documents take as given."""
    for name in ("small", "EleutherAI/pythia-70m"):
        neox(folder / name, hidden_size=64, num_hidden_layers=6, num_attention_heads=8, intermediate_size=256)
    ALL["llama"](folder / "llama", num_hidden_layers=6)
    (folder / "text").mkdir()
    (folder / "text/a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)


def damaged(folder: Path) -> None:
    """What troubleshooting takes as given: copies of `small` with a fault, files that are no data."""
    small = folder / "small"

    def copy(name: str, **fields) -> Path:
        shutil.copytree(small, folder / name)
        config = json.loads((small / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | fields))
        return folder / name

    copy("opt", model_type="opt")
    copy("quantized", quantization_config={"quant_method": "gptq", "bits": 4})
    copy("custom", model_type="my_model")
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    weights = copy("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for file in copy("bare").glob("token*"):
        file.unlink()
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    ALL["bert"](folder / "bert")
    (folder / "short.txt").write_text("a few words")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")


def as_told(said: str, got: str) -> bool:
    """Is that what was said? Words that end in " ..." are a beginning."""
    return got == said or (said.endswith(" ...") and got.startswith(said.removesuffix(" ...")))


def last_of(printed: str) -> str:
    return (printed.splitlines() or [""])[-1]


class Runner:
    """Runs the blocks of one document, in the current folder."""

    def __init__(self, monkeypatch, capsys, shared: bool):
        self.monkeypatch, self.capsys, self.names = monkeypatch, capsys, {} if shared else None
        self.wrong: list[str] = []

    def growth(self, words: list[str]) -> tuple[int, str, str]:
        return command.run(self.monkeypatch, self.capsys, *words)

    def python(self, block) -> None:
        if named := re.match(r"# (\w+\.py)\n", block.text):
            Path(named[1]).write_text(block.text)
            return
        exec(compile(block.text, block.where, "exec"), {} if self.names is None else self.names)

    def yaml(self, block) -> None:
        file, recipe = re.match(r"# (\S+)\n", block.text)[1], yaml.safe_load(block.text)
        for step in recipe["steps"]:
            for options in step.values():
                options |= {name: fewer(name, value) for name, value in options.items()}
        Path(file).write_text(yaml.safe_dump(recipe))

    def sh(self, block) -> None:
        for words in commands(block):
            self.line(block.where, words)

    def line(self, where: str, words: list[str]) -> None:
        tool, rest = words[0], words[1:]
        if tool == "growth":
            parsed(rest)
            if rest[0] != "demo":
                code, _, err = self.growth(scaled(rest))
                if code:
                    self.wrong.append(f"{where}: {' '.join(words)}: {last_of(err)}")
        elif tool in PARSERS:
            parsed(launched(words))
        elif tool == "make":
            check_make(rest[0], rest[1:])
        elif tool == "lm_eval":
            check_lm_eval(words)
        elif tool == "pip":
            check_pip(words)
        elif words[:2] == ["python", "-m"]:
            assert find_spec(rest[1]), where
            if rest[1].startswith("lcikernels"):
                self.module(rest[1])
            else:
                parsed_alone(rest[1], rest[2:])
        else:
            assert tool in LEFT, f"{where}: no rule for {tool}"

    def module(self, name: str) -> None:
        """As `python -m` runs it, but in this process, which has it already."""
        self.monkeypatch.setattr(sys, "argv", [name])
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(SystemExit):
            runpy.run_module(name, run_name="__main__")

    def console(self, block) -> None:
        for line, said in re.findall(r"^\$ growth (.*)\n(.*)\n", block.text, re.M):
            code, _, err = self.growth(shlex.split(line))
            if code != 2 or not as_told(said, last_of(err)):
                self.wrong.append(f"{block.where}: {line}: {last_of(err)}")

    def pycon(self, block) -> None:
        for line, said in re.findall(r"^>>> (.*)\n(.*)\n", block.text, re.M):
            with pytest.raises((ValueError, RuntimeError)) as got:
                exec(line, tensors())
            assert as_told(said, f"{type(got.value).__name__}: {got.value}"), (block.where, got.value)

    def text(self, block) -> None:
        setup = (ROOT / "setup.py").read_text()
        for line in block.text.splitlines():
            said = ".+".join(map(re.escape, line.removeprefix("growth: ").split("...")))
            known = (
                any(re.fullmatch(said, x) for x in met()) if line.startswith("growth: ") else line in setup
            )
            assert known, f"{block.where}: {line}"


def met() -> list[str]:
    """What is said where a disk is full or may not be written, and where two runs meet."""

    def staging(error: OSError) -> None:
        with staged("large"):
            raise error

    def renaming() -> None:
        Path("whole").mkdir()
        Path("large").mkdir()
        try:
            publish(Path("whole"), Path("large"))
        finally:
            Path("large").rmdir()
            Path("large-2").rmdir()

    run, full = Path("run.unfinished"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    run.mkdir(exist_ok=True)
    calls = [partial(staging, full), partial(staging, OSError(errno.EROFS, os.strerror(errno.EROFS)))]
    calls += [renaming, partial(refuse_too_large, "large", 1 << 60), partial(refuse_busy, run)]
    calls += [partial(refuse_full, run, 1 << 60, 1 << 60, 2)]
    with alone_in(run):
        found = [refusal_of(call) for call in calls]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda *given: False)
        found.append(refusal_of(partial(refuse_existing, "large")))
    return [*found, str(_stopped(full, run, []))]


def refusal_of(call: Callable) -> str:
    with pytest.raises(Refusal) as got:
        call()
    return str(got.value)


def tensors() -> dict:
    """The names that troubleshooting's lines have: retention's arguments, and a state."""
    q, k, v = torch.randn(3, 1, 8, 2, 16)
    names = {"q": q, "k": k, "v": v, "log_decay": -torch.rand(2), "state": torch.zeros(1, 2, 16, 16)}
    return {
        "torch": torch,
        "lcikernels": lcikernels,
        **{x: getattr(lcikernels, x) for x in lcikernels.__all__},
    } | names


@pytest.mark.parametrize("file", DOCUMENTS)
def test_what_a_document_shows_runs(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sources(tmp_path)
    if file == "docs/troubleshooting.md":
        damaged(tmp_path)
    torch.set_num_threads(1)
    runner = Runner(monkeypatch, capsys, shared=file == "CONTRIBUTING.md")
    tables = [(table, table.copy()) for table in (FAMILIES, METHODS, TABLES)]
    try:
        for block in blocks(file):
            if block.language:
                getattr(runner, block.language)(block)
        assert not runner.wrong, "\n".join(runner.wrong)
    finally:
        unpatch()
        for table, before in tables:
            table.clear()
            table.update(before)


def test_no_document_shows_code_or_a_command_that_is_not_run():
    """Fences have a language with a rule; a line of an indented block is no command."""
    for file in DOCUMENTS:
        assert {block.language for block in blocks(file)} <= LANGUAGES, file
        typed = re.findall(
            r"^    (?:growth|python|make|pip|torchrun|accelerate|import|from) .*", prose(file), re.M
        )
        assert not typed, f"{file}: {typed}"
        drawn = [block.text for block in blocks(file) if not block.language]
        assert all("README.md" == file for _ in drawn) and len(drawn) <= 1, file  # the tree


def test_commands_in_prose_have_the_verbs_options_and_targets_that_there_are():
    options = {
        verb: {flag for x in it.params for flag in (*x.opts, *x.secondary_opts)} for verb, it in VERBS.items()
    }
    for file in DOCUMENTS:
        for span in spans(file):
            verb = re.match(r"growth ([a-z]+)(?: |$)", span)
            if verb:
                assert set(re.findall(r"--[\w-]+", span)) <= options[verb[1]] | {"--help"}, f"{file}: {span}"
            if target := re.match(r"make ([a-z-]+)", span):
                check_make(target[1], shlex.split(span)[2:])
            if module := re.match(r"python -m (benchmarks\.\w+)", span):
                parsed_alone(module[1], shlex.split(span)[3:])
        for target, said in re.findall(rf"make ([a-z-]+)((?: {SET})+)", text_of(file)):
            check_make(target, shlex.split(said))


@pytest.mark.parametrize(
    "line",
    [
        "make fuzz CALL=3",
        "make fuzzy",
        "make demo CALLS=3",
        "python -m benchmarks.resources --predict",
        "python -m benchmarks.reuse --families text",
        "python -m benchmarks.report --all",
        "lm_eval --model hf --tasks lambada_openai --modle_args x",
        "torchrun --nproc-per-node 2 -m growth train a --data b --out c --step 3",
        "torchrun --processes 2 -m growth train a --data b --out c --steps 3",
    ],
)
def test_a_wrong_word_of_what_is_parsed_alone_is_found(line, monkeypatch, capsys):
    with pytest.raises(WRONG):
        Runner(monkeypatch, capsys, shared=False).line("here", shlex.split(line))


@pytest.mark.parametrize("file", DOCUMENTS)
def test_blocks_have_12_lines_and_prose_120_columns(file):
    for block in blocks(file):
        if block.language in ("python", "sh", "yaml"):
            assert len(block.text.strip().splitlines()) <= 12, block.where
    wide = [line for line in prose(file).splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not wide, f"{file}: {wide}"


@pytest.mark.parametrize("file", DOCUMENTS)
def test_links_lead_to_files_that_there_are(file):
    for to in re.findall(r"\]\(([^)#]+)[^)]*\)", prose(file)):
        assert to.startswith("http") or ((ROOT / file).parent / to).exists(), f"{file}: {to}"


def leaf(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes).requires_grad_()


def falling(*sizes: int) -> torch.Tensor:
    return -torch.rand(*sizes).requires_grad_()


def scanned(*lead: int, D: int = 6, N: int = 4) -> dict[str, torch.Tensor]:
    """Arguments of the scan for tokens [*lead, D]."""
    names = {
        "x": leaf(*lead, D),
        "dt": leaf(*lead, D),
        "a": falling(D, N),
        "b": leaf(*lead, N),
        "c": leaf(*lead, N),
    }
    return names | {"d": leaf(D), "z": leaf(*lead, D), "dt_bias": leaf(D)}


def attended(*lead: int) -> dict[str, torch.Tensor]:
    """Arguments of retention for tokens [*lead], 3 heads of 8 x 5, a rate for each token."""
    rates = falling(*lead, 3)
    return {"q": leaf(*lead, 3, 8), "k": leaf(*lead, 3, 8), "v": leaf(*lead, 3, 5), "log_decay": rates}


def frozen(inputs: dict) -> dict:
    """Of a step, which has no gradient."""
    return {name: x.detach() for name, x in inputs.items()}


def without(inputs: dict, *names: str) -> dict:
    return {name: x for name, x in inputs.items() if name not in names}


# Of each op with an "Equivalent to": what the op is told, and the arguments of both.
SHARED = {
    "retention": ({}, lambda: attended(2, 7)),
    "retention_step": ({}, lambda: frozen(attended(2) | {"state": leaf(2, 3, 8, 5)})),
    "retention_segment": ({}, lambda: without(attended(2, 7), "q")),
    "selective_scan": ({"dt_softplus": True}, lambda: scanned(2, 7)),
    "selective_scan_step": ({"dt_softplus": True}, lambda: frozen(scanned(2) | {"state": leaf(2, 6, 4)})),
    "selective_scan_segment": (
        {},
        lambda: (
            without(scanned(2, 7), "c", "d", "z", "dt_bias") | {"dt": torch.rand(2, 7, 6).requires_grad_()}
        ),
    ),
    "causal_conv1d": (
        {"activation": "silu"},
        lambda: {"x": leaf(2, 7, 6), "weight": leaf(6, 4), "bias": leaf(6)},
    ),
    "causal_conv1d_step": (
        {"activation": "silu"},
        lambda: frozen({"x": leaf(2, 6), "weight": leaf(6, 4), "bias": leaf(6), "state": leaf(2, 6, 3)}),
    ),
    "gated_rms_norm": ({}, lambda: {"x": leaf(2, 7, 6), "gate": leaf(2, 7, 6), "weight": leaf(6)}),
    "kronecker_expand": (
        {},
        lambda: {"weight": leaf(3, 4, 5), "write": leaf(6, 4), "read": leaf(7, 5), "depth": leaf(4, 3)},
    ),
}


def equivalent(op: str) -> Callable:
    """The function of that name which docs/ops.md defines."""
    (block,) = (x for x in blocks("docs/ops.md") if re.search(rf"^def {op}\(", x.text, re.M))
    names: dict = {}
    exec(compile(block.text, block.where, "exec"), names)
    return names[op]


def with_state(function: Callable) -> Callable:
    """A step's result and the state that it leaves; the one that it was given stays."""

    def run(**inputs):
        inputs = {name: x.clone() for name, x in inputs.items()}
        return (function(**inputs), inputs["state"]) if "state" in inputs else function(**inputs)

    return run


@pytest.mark.parametrize("op", [name for name in lcikernels.__all__ if name != "checked"])
def test_each_op_computes_what_stands_under_equivalent_to(op):
    options, inputs = SHARED[op]
    ours, theirs = partial(getattr(lcikernels, op), **options), equivalent(op)
    assert_agrees(with_state(ours), with_state(theirs), **inputs())
