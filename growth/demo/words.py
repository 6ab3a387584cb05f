"""How the report's figures are written, the same on the page, in the terminal and in the README."""

import re

from growth.demo.summary import Arm, Spread

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
NAMES = {
    "bert2bert": "bert2BERT",
    "fine": "FINE",
    "gstack": "G-stack",
    "gradmax": "GradMax",
    "hypercloning": "HyperCloning",
    "lemon": "LEMON",
    "ligo": "LiGO",
    "mamba": "Mamba",
    "mamba2": "Mamba-2",
    "mango": "Mango",
    "msg": "MSG",
    "mslt": "MSLT",
    "net2net": "Net2Net",
    "retnet": "RetNet",
    "solar": "SOLAR",
}


def spoken(arm: str) -> str:
    """An arm's name in a sentence: the paper's name for the method, the rest as it is."""
    return re.sub(r"\w+", lambda word: NAMES.get(word[0], word[0]), arm)


def capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def percent(x: float) -> str:
    return f"{_minus(f'{100 * x:.0f}')} %"


def percents(spread: Spread) -> str:
    """The least and the most, where they differ."""
    least, most = map(percent, spread.ends)
    return "" if least == most else f"{least[:-2]} to {most}"


def signed(x: float, digits: int = 3) -> str:
    """With its sign; what rounds to nothing has none."""
    text = f"{x:+.{digits}f}"
    return text[1:] if float(text) == 0 else _minus(text)


def saved(arm: Arm, cost: str = "flops") -> str:
    """The median, the least and the most, and the seeds that never arrived."""
    spread: Spread = getattr(arm, cost)
    if not spread.values:
        return f"not reached{_short(arm)}"
    lost = f"not reached in {spread.missing} of {arm.seeds}{_short(arm)}" if spread.missing else ""
    if spread.median is None:
        return (
            f"{lost}; {', '.join(map(percent, sorted(spread.values)))} in the other{'s' * (len(spread) > 1)}"
        )
    said = "; ".join(filter(None, (percents(spread), lost)))
    return percent(spread.median) + (f" ({said})" if said else "")


def difference(arm: Arm) -> str:
    """At equal compute, the last loss less the baseline's: the mean, its standard error, the spread."""
    if not arm.ended.values:
        return "not run"
    error = "" if arm.error is None else f" ± {arm.error:.3f}"
    fewer = f", {seeds_of(len(arm.ended))}" if len(arm.ended) < arm.seeds else ""
    return f"{signed(arm.ended.mean)}{error}{between(arm.ended)}{fewer}"


def between(spread: Spread) -> str:
    """The least and the most in brackets, where they differ."""
    least, most = map(signed, spread.ends)
    return "" if least == most else f" ({least} to {most})"


def scaled(x: float) -> str:
    """To three digits, with a prefix: 16.9 M."""
    power = min(max(0, (len(f"{x:.0f}") - 1) // 3), len(PREFIXES) - 1)
    if float(f"{x / 1000**power:.3g}") >= 1000:
        power += 1
    return f"{x / 1000**power:.3g} {PREFIXES[power]}".strip()


def duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def seeds_of(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def listed(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _short(arm: Arm) -> str:
    """How far above the baseline's last loss those ended that never arrived."""
    return f", ended {arm.above.mean:.3f} above" if arm.above.values else ""


def _minus(text: str) -> str:
    return ("−" + text[1:] if float(text) else text[1:]) if text.startswith("-") else text
