"""What docstrings and documents say of rows of benchmarks/REUSE.md is what benchmarks/results/reuse has.

Where this fails the results were measured anew: the sentence has to change, or the default that it justifies.
"""

import inspect
import re
from collections.abc import Iterator
from functools import cache

import pytest
from documents import DOCUMENTS, ROOT

from benchmarks import savings
from growth.demo.arms import ARMS
from growth.demo.summary import Arm, ranked, summaries
from growth.demo.words import saved
from growth.growing import grow

NAME = r'["`][a-z0-9-]+(?:, [a-z]+)?["`]'
LIST = rf"{NAME}(?:(?:, | and ){NAME})*"
ROWS = re.compile(rf"\brows? ({LIST})")
MORE = re.compile(rf"({NAME}) of \S+, which on (\w+) saves more than ({LIST})")
BESIDE = re.compile(rf"({NAME}) of \S+ beside ({LIST})")
MOST = re.compile(
    rf"({NAME}), (?:which|of a source trained at a constant rate,) saves most( of those with several seeds)?"
)
CITING = [path for path in sorted((ROOT / "growth").rglob("*.py")) if "REUSE.md" in path.read_text()]
CITING += [ROOT / file for file in DOCUMENTS]


@cache
def arms(family: str) -> dict[str, Arm]:
    """Of a family's results, by their names; the one that saved most first."""
    (of,) = (x for report in savings.read() for x in report["families"] if x["name"] == family)
    return {arm.name: arm for arm in ranked(summaries(of))}


def names(listed: str) -> list[str]:
    return [name[1:-1] for name in re.findall(NAME, listed)]


def less(family: str, best: str, others: list[str]) -> Iterator[str]:
    """Those that do not save less than the best."""
    shares = {name: arm.flops.median for name, arm in arms(family).items()}
    for name in others:
        if shares[best] is None or (shares[name] is not None and shares[name] >= shares[best]):
            yield f"on {family}, {best} saves {shares[best]}, {name} {shares[name]}"


def wrong(text: str) -> list[str]:
    """What it says of rows that is not so: names, figures, and which of them saves more."""
    text, found = re.sub(r"[\s#]+", " ", text), []
    for cited in ROWS.finditer(text):
        rows, sentence = names(cited[1]), text[text.rfind(". ", 0, cited.start()) + 1 :].split(". ")[0]
        known = [arms(family)[row] for family in savings.FAMILIES for row in rows if row in arms(family)]
        found += [f"no row {row}" for row in rows if row not in {arm.name for arm in known}]
        shares = " ".join(saved(arm, cost) for arm in known for cost in ("flops", "seconds"))
        found += [
            f"{rows}: no {x}" for x in re.findall(r"[\d.]+(?: to [\d.]+)? %", sentence) if x not in shares
        ]
    for best, family, others in MORE.findall(text):
        found += less(family, best[1:-1], names(others))
    for best, others in BESIDE.findall(text):
        found += less("text", best[1:-1], names(others))
    for quoted, several in MOST.findall(text):
        best = quoted[1:-1]
        others = {name: arm for name, arm in arms("text").items() if arm.group == ARMS[best].group}
        found += less(
            "text", best, [x for x, arm in others.items() if x != best and (arm.seeds > 1 or not several)]
        )
    return found


@pytest.mark.parametrize("path", CITING, ids=lambda path: path.name)
def test_what_is_said_of_rows_is_what_was_measured(path):
    assert not wrong(path.read_text())


def test_every_kind_of_claim_is_found_and_a_wrong_one_is_told():
    said = " ".join(path.read_text() for path in CITING)
    said = re.sub(r"[\s#]+", " ", said)
    assert all(kind.search(said) for kind in (ROWS, MORE, BESIDE, MOST))
    best, *others = [arm.name for arm in arms("text").values() if arm.group == "growth"]
    assert not wrong(
        f'row "{best}" of REUSE.md, which on text saves more than "{others[0]}" and "{others[1]}"'
    )
    assert wrong(f'row "{others[0]}" of REUSE.md, which on text saves more than "{best}"')
    assert wrong(f'row "{others[0]}" of REUSE.md beside "{best}"') and wrong(
        f'"{others[0]}", which saves most'
    )
    assert wrong('The row "lemonade" of REUSE.md') and wrong(f"The rows `{best}` and `bogus`")
    share = saved(arms("text")[best])
    assert not wrong(f'The row "{best}" saves {share}.') and wrong(f'The row "{best}" saves 12.5 %.')


def test_the_default_is_the_row_that_is_said_to_be():
    (row,) = re.findall(rf"The default is the row ({NAME})", re.sub(r"\s+", " ", grow.__doc__))
    arm, default = ARMS[row[1:-1]], inspect.signature(grow).parameters["method"].default
    assert (default, {}) == (arm.method, arm.options)
    told, row = re.search(
        rf"Lemon\(([^()]+)\), that is the row ({NAME})", re.sub(r"\s+", " ", grow.__doc__)
    ).groups()
    arm = ARMS[row[1:-1]]
    assert told == ", ".join(f"{name}={value}" for name, value in arm.options.items())
    assert arm.method == "lemon" and arm.early and arm.carries
