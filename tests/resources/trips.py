"""How often a Triton kernel goes through its loops: its IR, walked with the integers of a launch.

Scalars are computed, tensors are not. A `for` counts as often as its bounds say; what is inside is walked
once, in the middle iteration. A `while` is walked. What only data decides counts as one iteration.
"""

import re
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import PurePath
from typing import NamedTuple

from .code import Line


class Pointer(NamedTuple):
    """The argument that an address comes from."""

    argument: str


class Trips(NamedTuple):
    """A loop of the IR: the source lines of its own operations, and how often a program goes through it."""

    lines: Counter
    times: float


class Walked(NamedTuple):
    loops: list[Trips]
    read: dict[str, float]  # bytes that the program asks for, by argument
    written: dict[str, float]


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def unsigned(a: int) -> int:
    return a & 0xFFFFFFFF if a < 0 else a


COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
INTEGERS: dict[str, Callable[..., int]] = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": quotient,
    "divui": lambda a, b: unsigned(a) // unsigned(b),
    "remsi": lambda a, b: a - b * quotient(a, b),
    "remui": lambda a, b: unsigned(a) % unsigned(b),
    "ceildivsi": lambda a, b: -(-a // b),
    "minsi": min,
    "maxsi": max,
    "minui": min,
    "maxui": max,
    "andi": lambda a, b: a & b,
    "ori": lambda a, b: a | b,
    "xori": lambda a, b: a ^ b,
    "shli": lambda a, b: a << b,
    "shrsi": lambda a, b: a >> b,
    "extsi": lambda a: a,
    "extui": lambda a: a,
    "trunci": lambda a: a,
    "index_cast": lambda a: a,
}
FOR = re.compile(r"scf\.for (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+?)(?: iter_args\((.*?)\))? ")
RESULT, VALUE = re.compile(r"(%[\w.$-]+)(?::\d+)? = (.*)"), re.compile(r"%[\w.$-]+(?:#\d+)?")


class Walk:
    """Of the program in the middle of a grid. arguments: integers and Pointers by name."""

    def __init__(self, ir: str, arguments: dict[str, object], grid: tuple[int, int, int]):
        self.rows = [re.match(r"\s*(.*?)(?: loc\((#loc\d*)\))?$", row).groups() for row in ir.splitlines()]
        self.places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ir, re.M))
        self.value: dict[str, object] = {f"%{name}": x for name, x in arguments.items()}
        self.grid = dict(zip("xyz", grid))
        self.lines: dict[int, Counter] = {}  # of a loop's own operations, by the row where it begins
        self.times = Counter()
        self.read, self.written = Counter(), Counter()
        self.seen: set[int] = set()
        start = next(i for i, (row, _) in enumerate(self.rows) if row.startswith("tt.func public"))
        self.block(start + 1, 1.0, Counter())

    def line(self, place: str | None) -> Line | None:
        """The innermost source line of a place."""
        while place and place in self.places:
            text = self.places[place]
            if found := re.match(r'"([^"]*)":(\d+):', text):
                return PurePath(found[1]).name, int(found[2])
            place = next(iter(re.findall(r"#loc\d*", text)), None)
        return None

    def block(self, i: int, times: float, lines: Counter) -> tuple[int, list]:
        """Walks from row i to the end of its region; gives that row and what is yielded."""
        yielded = []
        while not self.rows[i][0].startswith("}"):
            row, place = self.rows[i]
            result, operation = match.groups() if (match := RESULT.match(row)) else (None, row)
            lines[self.line(place)] += i not in self.seen
            self.seen.add(i)
            if walk := next((walk for name, walk in REGIONS.items() if operation.startswith(name)), None):
                i, values = walk(self, operation, i, times, lines)
                self.value |= {f"{result}#{k}": x for k, x in enumerate(values)}
                self.value[result] = values[0] if values else None
            elif operation.startswith(("scf.yield", "scf.condition")):
                yielded = [self.value.get(x) for x in VALUE.findall(operation.partition(" : ")[0])]
            elif row.endswith("{"):  # of a reduction
                i, _ = self.block(i + 1, times, lines)
            else:
                self.value[result] = self.computed(operation, times)
            i += 1
        return i, yielded

    def enter(self, i: int, times: float) -> Counter:
        self.times[i] += times
        return self.lines.setdefault(i, Counter())

    def repeat(self, operation: str, i: int, times: float, _: Counter) -> tuple[int, list]:
        variable, *bounds, carried = FOR.match(operation + " ").groups()
        first, last, step = (self.value.get(x) for x in bounds)
        known = None not in (first, last, step)
        count = max(0, -(-(last - first) // step)) if known else 1
        for name, start in re.findall(r"(%\S+) = (%[^,\s]+)", carried or ""):
            x = self.value.get(start)
            self.value[name] = x if isinstance(x, Pointer) else None
        self.value[variable] = first + step * (count // 2) if known else None
        end, values = self.block(i + 1, times * count, self.enter(i, times * count))
        return end, [x if isinstance(x, Pointer) else None for x in values]

    def go_on(self, operation: str, i: int, times: float, _: Counter) -> tuple[int, list]:
        """A `while`: walked as often as its condition holds, once where that is unknown."""
        carried = re.findall(r"(%\S+) = (%[^,\s)]+)", operation.partition(") : ")[0])
        values = [self.value.get(start) for _, start in carried]
        for _ in range(MOST):
            self.value |= {name: x for (name, _), x in zip(carried, values)}
            do, (more, *values) = self.block(i + 1, times, self.enter(i, 0))
            taken = times if more or more is None else 0.0
            names = re.findall(r"(%[\w.$-]+):", self.rows[do + 1][0])
            self.value |= dict(zip(names, values))
            end, after = self.block(do + 2, taken, self.enter(i, taken))
            if not more:
                break
            values = after
        return end, values

    def branch(self, operation: str, i: int, times: float, lines: Counter) -> tuple[int, list]:
        """The side that is taken; both where that is unknown, for a thread may wait in either."""
        taken = self.value.get(VALUE.search(operation)[0])
        end, values = self.block(i + 1, times if taken in (None, True, 1) else 0.0, lines)
        if self.rows[end][0].startswith("} else"):
            end, others = self.block(end + 1, 0.0 if taken in (True, 1) else times, lines)
            values = values if taken else others
        return end, values

    def computed(self, operation: str, times: float) -> object:
        name, text = operation.partition(" ")[::2]
        operands = [self.value.get(x) for x in VALUE.findall(text.partition(" : ")[0])]
        dialect, _, short = name.partition(".")
        pointers = [x for x in operands if isinstance(x, Pointer)]
        if pointers:
            if "load" in short or "atomic" in short:
                self.read[pointers[0].argument] += times * bytes_of(text)
            if "store" in short or "atomic" in short:
                self.written[pointers[0].argument] += times * bytes_of(text)
            return None if "load" in short else pointers[0]
        if name == "arith.constant":
            found = re.match(r"(-?\d+) : [iu]|(true|false)", text)
            return found and (int(found[1]) if found[1] else found[2] == "true")
        if name == "tt.get_program_id":
            return self.grid[text[0]] // 2
        if name == "tt.get_num_programs":
            return self.grid[text[0]]
        if name == "arith.cmpi" and None not in operands:
            return COMPARE[text[1:3] if text[:2] not in COMPARE else text[:2]](*operands)
        if name == "arith.select" and operands[0] is not None:
            return operands[1] if operands[0] else operands[2]
        if dialect == "arith" and short in INTEGERS and None not in operands:
            return INTEGERS[short](*operands)
        return None


REGIONS = {"scf.for": Walk.repeat, "scf.while": Walk.go_on, "scf.if": Walk.branch}
MOST = 1 << 16  # iterations of a `while`


def bytes_of(text: str) -> int:
    """Of what an operation's type says that it loads or stores."""
    shape, bits = re.search(r"((?:\d+x)*)!?(?:tt\.ptr<)?[a-z]+(\d+)[>,]?", text.rpartition(" : ")[2]).groups()
    return prod(int(n) for n in shape.split("x") if n) * int(bits) // 8


def walked(ir: str, arguments: dict[str, object], grid: tuple[int, int, int]) -> Walked:
    walk = Walk(ir, arguments, grid)
    loops = [Trips(lines, walk.times[i]) for i, lines in sorted(walk.lines.items())]
    return Walked(loops, walk.read, walk.written)
