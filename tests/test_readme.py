"""The README's first screen and its tree; what every document shows runs in test_documents.py."""

import re
import subprocess
import tomllib
from pathlib import Path

import yaml
from documents import ROOT, blocks, commands, text_of

README = text_of("README.md")


def test_the_first_screen_has_two_commands_three_lines_of_patch_and_both_tables():
    screen = README.partition("## Install")[0]
    first, second = blocks("README.md")[:2]
    assert len(commands(first)) == 2 and second.text in screen
    assert [bool(line) for line in second.text.splitlines()] == [True, False, True]
    for table in ("savings", "speeds"):
        assert re.search(f"^<!-- {table} -->\n.+^<!-- /{table} -->\n", screen, re.S | re.M), table
    assert "![" not in screen.partition("<!--")[0]


def test_what_is_installed_as_the_readme_says_runs_in_this_folder():
    """Python that is started here imports this folder, where `-e` alone puts compiled kernels."""
    (lines,) = (commands(block) for block in blocks("README.md") if "pip install" in block.text)
    assert ["python", "-m", "lcikernels"] in lines
    assert all("-e" in words for words in lines if any(word.startswith(".") for word in words))


def test_the_tree_in_the_readme_names_every_source_file():
    tree = README.partition("## The tree")[2].partition("\n## ")[0]
    command = ["git", "ls-files", "*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "docs/*.md"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    files = [Path(line) for line in tracked.stdout.splitlines() if not line.startswith("tests/")]
    assert files or not (ROOT / ".git").exists()
    missing = [str(file) for file in files if file.name not in tree and file.name != "__init__.py"]
    assert not missing


def test_the_documents_show_every_verb():
    from growth.cli.app import app

    shown = {
        words[1]
        for file in ("README.md", "docs/growth.md", "docs/training.md")
        for block in blocks(file)
        if block.language == "sh"
        for words in commands(block)
        if words[0] == "growth"
    }
    assert shown | {"demo"} == {command.callback.__name__ for command in app.registered_commands}


def test_the_citation_and_the_changelog_are_of_this_version_and_licence():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    cited = yaml.safe_load(text_of("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0" and all(author.get("name") for author in cited["authors"])
    assert (str(cited["version"]), cited["license"]) == (project["version"], project["license"])
    changes = text_of("CHANGELOG.md")
    heads = re.findall(r"^## \[(.+?)\]", changes, re.M)
    assert heads[0] == "Unreleased" and project["version"] in changes
    assert set(re.findall(r"^### (\w+)", changes, re.M)) <= {"Added", "Changed", "Fixed", "Removed", "Known"}
