"""The arrow goes one way: csrc -> lcikernels.ops -> lcikernels.layers -> lcikernels.models -> growth."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import from its own floor and from those below.
FLOORS = {
    "lcikernels.extension": 0,
    "lcikernels.backends": 1,
    "lcikernels.ops": 2,
    "lcikernels.context_parallel": 3,
    "lcikernels": 3,  # the package's face: the names it offers are ops
    "lcikernels.__main__": 3,
    "lcikernels.layers": 4,
    "lcikernels.models": 5,
    "lcikernels.compat": 6,
    "growth": 7,
}
UNIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
# Inside growth: what a module, or a folder of them, may import besides itself.
KNOWN = {
    "growth.architecture": (),
    "growth.maps": ("growth.architecture",),
    "growth.depth": ("growth.maps",),
    "growth.apply": ("growth.maps",),
    "growth.fresh": ("growth.architecture", "growth.maps", "growth.apply"),
    "growth.mixtures": ("growth.architecture", "growth.maps"),
    "growth.added": ("growth.architecture", "growth.maps"),
    "growth.lossless": (
        "growth.added",
        "growth.architecture",
        "growth.maps",
        "growth.apply",
        "growth.fresh",
        "growth.mixtures",
    ),
    "growth.families": ("growth.architecture", "growth.maps", "growth.errors", "lcikernels.layers"),
    "growth.methods": (  # training, learned, plan, growing: for annotations, and where learning runs
        "growth.architecture",
        "growth.maps",
        "growth.depth",
        "growth.errors",
        "growth.plan",
        "growth.growing",
        "growth.learned",
        "growth.training",
    ),
}
FILES = sorted(path for package in ("lcikernels", "growth") for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES}


def floor(module: str) -> int:
    package, *rest = module.split(".")
    name = f"{package}.{rest[0]}" if package == "lcikernels" and rest else package
    assert name in FLOORS, f"{name} has no floor: enter it in FLOORS"
    return FLOORS[name]


def imports(path: Path) -> list[str]:
    """The modules of this repository that a file imports, wherever in the file the import stands."""
    found, module = [], name_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, (*up, node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
            found += [name if name in MODULES else base for name in names]
    return [name for name in found if name.split(".")[0] in ("lcikernels", "growth")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_import_goes_up(path):
    here = floor(name_of(path))
    up = [name for name in imports(path) if floor(name) > here]
    assert not up, f"{name_of(path)} imports {up} from a floor above its own"


def within(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize("module", KNOWN)
def test_wires_know_no_files_families_no_methods_and_methods_no_families(module):
    files = [path for path in FILES if within(name_of(path), [module])]
    beyond = {
        f"{name_of(path)} imports {name}"
        for path in files
        for name in imports(path)
        if not within(name, [module, *KNOWN[module]])
    }
    assert files and not beyond


def imported(path: Path) -> set[str]:
    """The packages of others that a file imports."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def test_what_is_below_the_models_needs_torch_alone():
    """And Triton, which comes with a torch for GPUs."""
    known = {*sys.stdlib_module_names, "torch", "triton", "lcikernels"}
    below = [path for path in FILES if floor(name_of(path)) < FLOORS["lcikernels.models"]]
    others = {name_of(path): names for path in below if (names := imported(path) - known)}
    assert below and not others


def needed(path: Path) -> set[str]:
    """The packages that a file cannot be imported without."""
    body = ast.parse(path.read_text()).body
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in body if isinstance(node, ast.ImportFrom)}


def test_what_unix_alone_has_is_asked_for_and_not_needed():
    assert all(UNIX.isdisjoint(needed(path)) for path in FILES)
    assert any(UNIX & imported(path) for path in FILES)


def test_layers_run_where_transformers_is_not_installed():
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('transformers', 'huggingface_hub', 'safetensors', 'einops'))\n"
        "import torch\n"
        "from lcikernels import layers\n"
        "made = layers.Mamba(8), layers.Mamba2(32), layers.Retention(8, 2), layers.LightningAttention(8, 2)\n"
        "print([tuple(x(torch.randn(1, 3, x.hidden_size)).shape) for x in made])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[(1, 3, 8), (1, 3, 32), (1, 3, 8), (1, 3, 8)]\n", done.stderr


def test_every_import_leads_to_a_module_of_the_repository():
    """Else a misspelt or relative import would be judged by the wrong name."""
    assert all(name in MODULES for path in FILES for name in imports(path))


@pytest.mark.parametrize(
    "line, module",
    {
        "from ..layers import mlp": "lcikernels.layers.mlp",
        "from ..layers.mlp import gated": "lcikernels.layers.mlp",
        "from lcikernels import models": "lcikernels.models",
        "import growth.plan": "growth.plan",
        "def f():\n    from growth import maps": "growth.maps",
    }.items(),
)
def test_an_import_that_goes_up_would_be_seen(line, module, tmp_path, monkeypatch):
    planted = tmp_path / "lcikernels/ops/planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    here, modules = sys.modules[__name__], {"lcikernels.layers.mlp", "lcikernels.models", "growth.maps"}
    monkeypatch.setattr(here, "ROOT", tmp_path)
    monkeypatch.setattr(here, "MODULES", modules)
    assert imports(planted) == [module]
    assert floor(module) > floor("lcikernels.ops.planted")


def test_importing_lcikernels_touches_no_gpu_and_none_of_the_heavy_packages():
    heavy = ("triton", "transformers", "growth", "matplotlib", "pandas")
    code = (  # flop_counter, where the ops' formulas go, imports Triton by itself
        "import sys, torch, torch.utils.flop_counter\n"
        "before = set(sys.modules)\n"
        "import lcikernels\n"
        f"print([x for x in {heavy} if x in sys.modules and x not in before], torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"
