"""Pieces of HTML: tables that scroll in a box of their own, lists, paragraphs."""

import re
from collections.abc import Iterable
from html import escape


def text(words: str) -> str:
    """In one line, escaped; a unit stays beside its number."""
    return re.sub(
        r"(?<=\d) (?=%|[kMGTPEZY]?FLOPs|[kMGTPEZY]\b)|(?<=±) ", "\u00a0", escape(" ".join(words.split()))
    )


def paragraph(words: str, kind: str = "") -> str:
    return f"<p class='{kind}'>{text(words)}</p>" if kind else f"<p>{text(words)}</p>"


def items(lines: Iterable[str]) -> str:
    inside = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul class='notes'>{inside}</ul>" if inside else ""


def table(caption: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already; the first of a row is its heading."""
    head = "".join(f"<th scope='col'>{text(name)}</th>" for name in columns)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f"<tr><th scope='row'>{first}</th>{cells}</tr>")
    return (
        f"<table><caption>{text(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def scrolling(caption: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table that may be wider than the page: its box scrolls, by the keyboard too."""
    inside = table(caption, columns, rows)
    return f"<div class='scroll' role='region' tabindex='0' aria-label='{text(caption)}'>{inside}</div>"


def details(summary: str, inside: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{inside}</details>" if inside else ""


def small(words: str) -> str:
    """A second line of a cell."""
    return f"<small>{text(words)}</small>" if words else ""
