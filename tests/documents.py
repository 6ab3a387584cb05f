"""What README.md, CONTRIBUTING.md and docs/ say, taken apart: fenced blocks, commands, code in prose."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


class Block(NamedTuple):
    """A fenced block: where its first line is, and what its fence calls it."""

    file: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def text_of(file: str) -> str:
    return (ROOT / file).read_text()


def blocks(file: str) -> list[Block]:
    """Those of a document, from the top."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text_of(file), re.S | re.M)
    return [Block(file, text_of(file)[: x.start()].count("\n") + 2, x[1], x[2]) for x in found]


def commands(block: Block) -> list[list[str]]:
    """The words of each line of a shell block, without comments; a line may end in a backslash."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def prose(file: str) -> str:
    """Without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(file), flags=re.S | re.M)


def spans(file: str) -> Iterator[str]:
    """Code in prose, each on one line."""
    for found in re.finditer(r"`([^`]+)`", prose(file)):
        yield " ".join(found[1].split())
