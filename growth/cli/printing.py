"""What verbs print: lines, and what a report has."""

import json
from itertools import groupby
from typing import Any

from rich.console import Console

from growth.errors import first_process

FEW = 4  # names of what is dropped; a dry run has all
out = Console()


def say(line: str) -> None:
    """A line as it is, once: names may hold brackets, and what reads a pipe wants no breaks."""
    if first_process():
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def print_report(report: Any, dry_run: bool, as_json: bool) -> None:
    """A report, behind its plan in a dry run."""
    if as_json:
        say(json.dumps(report.json()))
        return
    if dry_run:
        wide = max(len(row.name) for row in report.plan.rows)
        for row in report.plan.rows:
            sources = ", ".join(row.sources) or row.note
            say(f"{row.name:{wide}}  {'x'.join(map(str, row.shape)):12} {row.origin:11} {sources}")
    for why, of in groupby(report.plan.dropped, report.plan.dropped.get):
        names = list(of)
        shown = names if dry_run else names[:FEW]
        more = f" and {len(names) - len(shown)} more" * (len(shown) < len(names))
        say(f"dropped {', '.join(shown)}{more}: {why}")
    for line in report.lines:
        say(line)
    for note in report.notes:
        say(f"note: {note}")
    if dry_run:
        for line in report.costs.lines():
            say(line)
    say(str(report))
