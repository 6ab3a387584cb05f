"""What a file, a function and a kernel may hold at most, so that each can be read at once."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sorted((ROOT / "lcikernels" / "ops").rglob("*.py"))
CPP = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
FILE, FUNCTION = 400, 60  # lines that are too many
LINE = 120  # characters of C++; ruff counts those of Python
PARAMETERS, FLAGS = 16, 2


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def name_of(path: Path, function: str) -> str:
    return f"{path.relative_to(ROOT)} {function}"


def kernels() -> dict[str, ast.FunctionDef]:
    """What is launched: by the name, for `triton.jit` is also what kernels call."""
    return {
        name_of(path, f.name): f
        for path in sorted((ROOT / "lcikernels").rglob("*.py"))
        for f in functions(path)
        if f.name.endswith("_kernel") and any("triton.jit" in ast.unparse(d) for d in f.decorator_list)
    }


def flags(kernel: ast.FunctionDef) -> set[str]:
    """Its compile-time parameters, or fields of one, that are asked alone: `if SILU`, not `if W > 1`."""
    constants = {a.arg for a in kernel.args.args if a.annotation and "constexpr" in ast.unparse(a.annotation)}
    asked = [node.test for node in ast.walk(kernel) if isinstance(node, (ast.If, ast.IfExp))]
    words = {ast.unparse(node) for test in asked for node in bare(test)}
    return {word for word in words if word.split(".")[0] in constants}


def bare(test: ast.expr) -> list[ast.expr]:
    if isinstance(test, ast.UnaryOp):
        return bare(test.operand)
    if isinstance(test, ast.BoolOp):
        return [node for value in test.values for node in bare(value)]
    return [test] if isinstance(test, (ast.Name, ast.Attribute)) else []


def fields() -> dict[str, list[str]]:
    """The flags of each NamedTuple that a kernel is compiled for."""
    classes = {name_of(p, x.name): x for p in PYTHON for x in ast.parse(p.read_text()).body if is_class(x)}
    return {name: [x.target.id for x in node.body if is_flag(x)] for name, node in classes.items()}


def is_class(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef)


def is_flag(field: ast.stmt) -> bool:
    """Of what launchers alone know, the names are lower case."""
    return (
        isinstance(field, ast.AnnAssign)
        and ast.unparse(field.annotation) == "bool"
        and field.target.id.isupper()
    )


def cpp_functions(path: Path) -> dict[str, int]:
    """Lines of each, from the last line before that is indented as little as its closing brace."""
    found, lines = {}, path.read_text().splitlines()
    for indent in ("", "  "):
        begin = None
        for i, line in enumerate(lines):
            if re.match(rf"{indent}[A-Za-z~_]", line):
                begin = i
            elif line == f"{indent}}}" and begin is not None:
                if "(" in lines[begin] and not re.match(r"\s*(namespace|struct|STABLE_TORCH)", lines[begin]):
                    found[name_of(path, f"{begin + 1} {lines[begin].strip()}")] = i - begin + 1
                begin = None
    return found


def test_the_counting_finds_what_there_is():
    assert len(kernels()) > 20
    code = "def f(W: tl.constexpr, fixed: tl.constexpr, p):\n if fixed.A and not W or W > 1: p if p else W"
    assert flags(ast.parse(code).body[0]) == {"W", "fixed.A"}
    assert fields()["lcikernels/ops/selective_scan/line.py Fixed"] == ["SOFTPLUS"]
    assert sum(len(cpp_functions(path)) for path in CPP) > 200


def test_kernels_have_few_parameters_and_flags():
    found = kernels()
    assert not {name: len(f.args.args) for name, f in found.items() if len(f.args.args) > PARAMETERS}
    assert not {name: flags(f) for name, f in found.items() if len(flags(f)) > FLAGS}
    assert not {name: words for name, words in fields().items() if len(words) > FLAGS}


@pytest.mark.parametrize("files", [PYTHON, CPP], ids=["lcikernels/ops", "csrc"])
def test_files_are_short(files):
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: lines for name, lines in lengths.items() if lines >= FILE}


def test_functions_are_short():
    lengths = {name_of(p, f.name): f.end_lineno - f.lineno + 1 for p in PYTHON for f in functions(p)}
    for path in CPP:
        lengths |= cpp_functions(path) if path.parent.name != "cuda" else {}
    assert not {name: lines for name, lines in lengths.items() if lines >= FUNCTION}


def test_lines_of_csrc_are_short():
    long = {
        f"{path.relative_to(ROOT)}:{i + 1}": len(line)
        for path in CPP
        for i, line in enumerate(path.read_text().splitlines())
        if len(line) > LINE
    }
    assert not long
