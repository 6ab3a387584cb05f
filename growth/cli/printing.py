"""What verbs print: lines, and what a report has."""

import json
from typing import Any

from rich.console import Console

from growth.errors import first_process

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
        for name, why in report.plan.dropped.items():
            say(f"dropped {name}: {why}")
    for line in report.lines:
        say(line)
    for note in report.notes:
        say(f"note: {note}")
    if dry_run:
        for line in report.costs.lines():
            say(line)
    say(str(report))
