"""What the README shows is what runs."""

import re
import subprocess
from pathlib import Path

from lcikernels.compat.transformers import is_patched, unpatch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    assert len(blocks[0].split("\n\n")) == 2 and blocks[0].count("\n") == 3
    monkeypatch.chdir(tmp_path)
    try:
        for code in blocks:
            assert len(code.strip().splitlines()) <= 12
            exec(compile(code, "README.md", "exec"), {})
        assert is_patched()
    finally:
        unpatch()
    printed = capsys.readouterr().out
    assert "kept" in printed and re.search(r"tensor\(\[\[ *1, *2, *3(, *\d+){8}\]\]\)", printed), printed
    assert {path.name for path in tmp_path.iterdir()} == {"small", "large", "retnet"}


def test_the_tree_in_the_readme_names_every_source_file():
    tree = README.partition("## The tree")[2].partition("\n## ")[0]
    command = ["git", "ls-files", "*.py", "*.cpp", "*.h"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    files = [Path(line) for line in tracked.stdout.splitlines() if not line.startswith("tests/")]
    assert files or not (ROOT / ".git").exists()
    missing = [str(file) for file in files if file.name not in tree and file.name != "__init__.py"]
    assert not missing


def test_the_commands_in_the_readme_are_the_ones_there_are():
    from growth.__main__ import app

    named = {line.split()[1] for line in README.splitlines() if re.match(r"growth [a-z]+ ", line)}
    assert named == {command.callback.__name__ for command in app.registered_commands}
