"""The wheel where users have it: built from the source distribution, installed beside other libraries alone.

`make wheels` installs them with pip, for other Pythons and releases of torch; here they are links to those of
this environment, so that nothing is downloaded, and objects that `make setup` compiled are not made again.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build/_C.so"
LARGEST = 20_000_000  # bytes
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python")


def run(*command: object, cwd: Path, **env: str) -> str:
    """What it printed; it must not fail, and sees nothing of the checkout."""
    env = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | env
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of files")
    return {*run("git", "ls-files", cwd=ROOT).splitlines()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution of a copy of this checkout, unpacked."""
    tmp_path = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns(".[!c]*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    run(sys.executable, "setup.py", "-q", "sdist", cwd=tmp_path / "checkout")
    with tarfile.open(*(tmp_path / "checkout/dist").iterdir()) as archive:
        archive.extractall(tmp_path, filter="data")
        return tmp_path / archive.getnames()[0]


@pytest.fixture(scope="module")
def wheel(source):
    """Of it: with compiled kernels or without, by `kernels`; each built once."""

    def built(kernels: str) -> Path:
        dist = source / "dist" / kernels
        if kernels == "compiled" and not BUILT.exists():
            pytest.skip("not compiled")
        if not dist.exists():
            stale = source / "build/lib/lcikernels/gone.py"
            stale.parent.mkdir(parents=True, exist_ok=True)
            stale.touch()
            if kernels == "compiled":
                shutil.copytree(BUILT.parent, source / "build", dirs_exist_ok=True)
            mode = {"LCIKERNELS_BUILD": "none"} if kernels == "pure" else {}
            command = ("setup.py", "-q", "bdist_wheel", "--dist-dir", dist)
            run(sys.executable, *command, cwd=source, **mode)
        (path,) = dist.iterdir()
        return path

    return built


def libraries(extra: str) -> set[str]:
    """What lcikernels asks for with this extra, what that asks for, and so on."""
    found, left = set(), [("lcikernels", extra)]
    while left:
        name, extra = left.pop()
        for line in distribution(name).requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                left += [(needed.name, extra) for extra in ("", *needed.extras) if needed.name not in found]
                found.add(needed.name)
    return found


@pytest.fixture
def environment(tmp_path):
    """A Python with these libraries and no other, not even pip, in a folder whose name has a blank."""

    def made(extra: str) -> Path:
        folder = tmp_path / "an environment"
        venv.create(folder, symlinks=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        for name in libraries(extra):
            there = distribution(name)
            for top in {file.parts[0] for file in there.files} - {"..", "__pycache__"}:
                if not (packages / top).exists():  # namespaces are shared
                    (packages / top).symlink_to(there.locate_file(top).resolve())
        return folder / "bin/python"

    return made


def test_the_source_distribution_has_every_file_that_is_tracked(source):
    there = {str(path.relative_to(source)) for path in source.rglob("*")}
    assert tracked() - there == {".ci/run", ".gitignore"}


@pytest.mark.parametrize("kernels", ["pure", "compiled"])
def test_a_wheel_has_every_module_and_nothing_older(wheel, kernels):
    path = wheel(kernels)
    with zipfile.ZipFile(path) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    library = {"lcikernels/_C.so"} if kernels == "compiled" else set()
    assert files == library | {name for name in tracked() if name.startswith(("lcikernels/", "growth/"))}
    platform = "any" if kernels == "pure" else r"(many)?linux_\w+"
    assert re.fullmatch(rf"lcikernels-[\d.]+-py3-none-{platform}\.whl", path.name)
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize(
    "extra, kernels",
    [
        ("", "pure"),
        ("growth", "compiled"),
        pytest.param("growth", "pure", marks=pytest.mark.everything),
    ],
)
def test_an_installed_wheel_works(wheel, environment, tmp_path, extra, kernels):
    python, folder = environment(extra), tmp_path / "elsewhere"
    folder.mkdir()
    what = f"{wheel(kernels)}[{extra}]" if extra else wheel(kernels)
    run(*PIP, python, "install", "--no-index", what, cwd=folder)
    run(*PIP, python, "check", cwd=folder)
    said = run(python, "-W", "ignore", ROOT / "tests/wheel_user.py", extra or "torch", kernels, cwd=folder)
    assert said.endswith(f"{kernels} kernels: it works\n")
