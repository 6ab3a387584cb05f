"""Machine code of NVIDIA's GPUs as nvdisasm prints it: instructions, loops, counts, and what is forbidden."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

Line = tuple[str, int]  # a source file's name, a line of it
FP64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|F2F\.F64")
WAITS = re.compile(
    r"WARPGROUP\.DEPBAR|DEPBAR\.LE|SYNCS\.PHASECHK"
)  # of products, of cp.async, of an mbarrier
NO_RESULT = re.compile(r"(WARPSYNC|RET|BRX|NANOSLEEP|BMOV|R2B|ST|RED\b|CCTL|BAR)")
TWICE = re.compile(r"\.WIDE|^D(ADD|MUL|FMA)|^CS2R$|F2F\.F64|I2F\.F64")
WIDTHS = {".64": 2, ".128": 4, ".M88.2": 2, ".M88.4": 4, ".MT88.2": 2, ".MT88.4": 4}
ACROSS, MEMORY = re.compile(r"SHFL|ATOM|MATCH"), re.compile(r"LDG(?!DEP)|STG|HGMMA|HMMA|SHFL|RED|ATOM|MUFU")
LABEL, SOURCE = re.compile(r"\s*(\.L_x_\d+):"), re.compile(r'//## File "[^"]*?([^/"]+)", line (\d+)')
CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?(?:U?P\w+)\s+)?([A-Z][\w.]*)(.*?);")


class Instruction(NamedTuple):
    name: str
    operands: list[str]
    line: Line | None


class Loop(NamedTuple):
    """Instructions `start` to `end` of the code; own: those in no loop inside it."""

    start: int
    end: int
    own: list[Instruction]

    @property
    def lines(self) -> Counter:
        return Counter(x.line for x in self.own)


class Counts(NamedTuple):
    """Of a warp: instructions, special functions of a lane, FLOPs of tensor cores; how many of the rest."""

    slots: float = 0
    special: float = 0
    flops: float = 0
    waits: float = 0
    barriers: float = 0
    fp64: float = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self, other)))

    def times(self, n: float) -> "Counts":
        return Counts(*(n * a for a in self))


def function(text: str, name: str = "") -> str:
    """The part of nvdisasm's print that is of the function in whose (mangled) name `name` is found."""
    for part in re.split(r"\n//-+ \.text\.", text)[1:]:
        if re.search(name, part[: part.index(" ")]):
            return part
    raise ValueError(f"no function {name!r}")


def parse(text: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """The instructions of a function, NOPs apart, and from where to where its loops go, largest first.

    A loop: from a label to the last branch back to it. Behind the last EXIT, or back from there, is what
    warps do that had to wait, and a branch to itself; one that asks an mbarrier again is a wait: no loops.
    """
    code, labels, ends, line, exit = [], {}, {}, None, -1
    for row in text.splitlines():
        if source := SOURCE.search(row):
            line = source[1], int(source[2])
        elif label := LABEL.match(row):
            labels[label[1]] = len(code)
        elif found := CODE.search(row):
            name, rest = found[1], found[2]
            if name != "NOP":
                code.append(Instruction(name, [x.strip() for x in rest.split(",")], line))
            target = re.search(r"\.L_x_\d+", rest)
            start = labels.get(target[0], len(code)) if target and name.startswith("BRA") else len(code)
            if name == "EXIT" and "@" not in row:
                exit = len(code)
            asks = len(code) - start < 4 and any(x.name.startswith("SYNCS") for x in code[start:])
            if exit <= start < len(code) - 1 and not asks:
                ends[start] = len(code)
    return code, nested(ends)


def nested(ends: dict[int, int]) -> list[tuple[int, int]]:
    """Loops from `start` to ends[start], largest first, without those that only overlap one: code that lies
    behind a loop and jumps back into it."""
    kept: list[tuple[int, int]] = []
    for a, b in sorted(ends.items(), key=lambda x: x[0] - x[1]):
        if all(b <= start or end <= a or (start <= a and b <= end) for start, end in kept):
            kept.append((a, b))
    return kept


def loops(code: list[Instruction], spans: list[tuple[int, int]]) -> tuple[list[Instruction], list[Loop]]:
    """What is in no loop, and the loops with what is in none inside them."""
    of: list[int | None] = [None] * len(code)
    for i, (start, end) in enumerate(spans):  # the inner ones are later
        of[start:end] = [i] * (end - start)
    own = [[] for _ in spans]
    for i, instruction in zip(of, code):
        if i is not None:
            own[i].append(instruction)
    rest = [x for i, x in zip(of, code) if i is None]
    return rest, [Loop(*span, part) for span, part in zip(spans, own)]


def counts(code: list[Instruction]) -> Counts:
    def of(pattern: str | re.Pattern) -> int:
        return sum(bool(re.match(pattern, x.name)) for x in code)

    flops = sum(products(x.name) for x in code)
    return Counts(len(code), of("MUFU"), flops, of(WAITS), of(r"BAR\."), of(FP64))


def products(name: str) -> float:
    """A warp's FLOPs in an instruction of the tensor cores; tf32's count twice: they take twice as long."""
    twice = 2 if "TF32" in name else 1
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):  # by a group of 4 warps
        M, N, K = map(int, found.groups())
        return twice * 2 * M * N * K / 4
    if found := re.match(r"HMMA\.(16)(8)(16|8|4)", name):
        M, N, K = map(int, found.groups())
        return twice * 2 * M * N * K
    return 0


def anchors(code: list[Instruction]) -> int:
    """What no compiler makes more or less of, unless it unrolls a loop."""
    return sum(bool(MEMORY.match(x.name)) for x in code)


def in_flight(code: list[Instruction], spans: list[tuple[int, int]]) -> list[str]:
    """Where a register is written, or a sum read, while a product of tensor cores (wgmma) may still use it.

    The sums of a wgmma, and its first factor where that is in registers, are its own from its issue until a
    wait that its group has ended by: `DEPBAR.LE gsb0, n` leaves at most n groups. Each loop is gone through
    twice, so that what is left running at its end meets its beginning. Wgmmas on the same sums keep order.
    """
    said = []
    groups: list[list[tuple[set[int], set[int]]]] = [[]]  # sums and factors of each; the last one is open
    for x in twice(code, spans):
        if x.name.startswith("WARPGROUP.DEPBAR"):
            left = int(x.operands[-1], 16)
            done, groups = groups[:-1], groups[-1:]
            groups = (done[-left:] if left else []) + groups
            continue
        product = x.name.startswith("HGMMA")
        writes, reads = (sums_of(x), factor_of(x)) if product else (written(x), registers(x) - written(x))
        for sums, factor in (one for group in groups for one in group):
            same = product and writes == sums
            if writes & factor or (not same and (writes | reads) & sums):
                said.append(f"{x.name} {', '.join(x.operands)} at {x.line}")
                break
        if product:
            groups[-1].append((writes, reads))
            if "gsb0" in x.operands:
                groups.append([])
    return sorted(set(said))


def twice(code: list[Instruction], spans: list[tuple[int, int]]) -> Iterator[Instruction]:
    """The code in order, each innermost loop once more after itself."""
    inner = [x for x in spans if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in spans)]
    again = {end: start for start, end in inner}
    for i, x in enumerate(code, 1):
        yield x
        if i in again:
            yield from code[again[i] : i]


def span(first: int, count: int) -> set[int]:
    return set(range(first, first + count))


def number(operand: str) -> int | None:
    found = re.match(r"[-|~!]*R(\d+)", operand)
    return int(found[1]) if found else None


def sums_of(x: Instruction) -> set[int]:
    """A thread's of a wgmma: 64 N of them are shared by 128 threads."""
    N = int(re.match(r"HGMMA\.64x(\d+)", x.name)[1])
    return span(number(x.operands[0]), N // 2 if ".F32" in x.name else N // 4)


def factor_of(x: Instruction) -> set[int]:
    first = number(x.operands[1])
    return set() if first is None else span(first, 4)


def width(name: str) -> int:
    """Registers of a thread that hold its result."""
    if name.startswith("HMMA"):
        return 4 if ".F32" in name else 2
    if TWICE.search(name):
        return 2
    return next((n for end, n in WIDTHS.items() if re.search(re.escape(end) + r"(?![\dx])", name)), 1)


def written(x: Instruction) -> set[int]:
    """The registers that an instruction sets: its first operand, where that is one."""
    if NO_RESULT.match(x.name):
        return set()
    operands = x.operands[1:] if ACROSS.match(x.name) and re.match(r"!?U?P", x.operands[0]) else x.operands
    first = number(operands[0]) if operands else None
    return set() if first is None else span(first, width(x.name))


def registers(x: Instruction) -> set[int]:
    """All that it names, with those that follow where an operand is wide."""
    wide, named = width(x.name), set()
    for operand in x.operands:
        for found in re.finditer(r"(?<![\w])R(\d+)(\.64)?", operand):
            named |= span(int(found[1]), 2 if found[2] else 1 if operand.strip().startswith("[") else wide)
    return named
