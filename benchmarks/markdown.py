"""Tables in Markdown, and the numbers in them."""

from collections.abc import Iterable, Sequence


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [*head(columns), *map(line, rows)]


def head(columns: Sequence[str]) -> list[str]:
    return [line(columns), line(["---"] * len(columns))]


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(x: float) -> str:
    """To three digits, or the whole number."""
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"
