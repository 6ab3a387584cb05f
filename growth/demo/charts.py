"""The report's curves as SVG that stands in a page: validation loss against FLOPs.

Colours are classes of the page's style (`c1` ...), so that one drawing serves light and dark; sizes are those
of a phone, on which a unit is a pixel.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from growth.demo.words import PREFIXES

WIDTH, HEIGHT = 360, 256
LEFT, RIGHT, TOP, BOTTOM = 40, 352, 22, 220  # of the frame in which curves are drawn
Point = tuple[float, float, float, float]  # FLOPs; the loss: mean over seeds, least, most


@dataclass(frozen=True)
class Line:
    """A curve. kind: the classes that it is drawn with: a colour, `dashed` for a baseline."""

    points: list[Point]
    kind: str


@dataclass(frozen=True)
class Frame:
    """From FLOPs and losses to the picture's coordinates; what is above `high` is cut off."""

    most: float
    low: float
    high: float

    def x(self, flops: float) -> float:
        return LEFT + (RIGHT - LEFT) * flops / self.most

    def y(self, loss: float) -> float:
        return TOP + (BOTTOM - TOP) * (self.high - loss) / (self.high - self.low)


def points(runs: Iterable[dict]) -> list[Point]:
    """The runs of one arm, a seed each, over the steps at which all were measured; their start's cost too."""
    runs = list(runs)
    steps = [{point["step"]: point for point in run["curve"]} for run in runs]
    out = []
    for step in sorted(set.intersection(*(set(of) for of in steps))):
        losses = [of[step]["loss"] for of in steps]
        flops = sum(run["start"]["flops"] + of[step]["flops"] for run, of in zip(runs, steps)) / len(runs)
        out.append((flops, sum(losses) / len(losses), min(losses), max(losses)))
    return out


def chart(
    lines: list[Line], source: float | None, unit: str, title: str, said: str, crossing: tuple | None = None
) -> str:
    """The curves, the source's loss dotted. title, said: read aloud where the picture is not seen.

    crossing: FLOPs at which an arm arrived, its baseline's FLOPs and last loss; what lies between was saved.
    """
    frame = _frame(lines, source)
    parts = [*_grid(frame, unit), f"<svg class='plot' {_box(LEFT, TOP, RIGHT, BOTTOM)}>"]
    if source is not None:
        parts.append(f"<path class='source' d='M{LEFT} {frame.y(source):.1f}H{RIGHT}'/>")
    for line in lines:
        parts += _curve(frame, line)
    if crossing:
        arrived, whole, loss = crossing
        x, y = frame.x(arrived), frame.y(loss)
        parts += [
            f"<path class='saved' d='M{x:.1f} {y:.1f}H{frame.x(whole):.1f}'/>",
            f"<circle class='arrived' cx='{x:.1f}' cy='{y:.1f}' r='3.5'/>",
        ]
    head = f"<svg class='chart' viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>"
    told = f"<title>{escape(title)}</title><desc>{escape(said)}</desc>"
    return f"{head}{told}{''.join(parts)}</svg></svg>"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high, some `about` of them."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(x for x in (1, 2, 5, 10) if x * step * about >= high - low)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _frame(lines: list[Line], source: float | None) -> Frame:
    """The first losses, of 5 nats and more, would press all that matters into a tenth of the picture."""
    ends = [line.points[-1][1] for line in lines] + [source] * (source is not None)
    low = min([least for line in lines for _, _, least, _ in line.points] + ends)
    high = low + 3 * (max(ends) - low) + 0.05
    first = max(most for line in lines for *_, most in line.points)
    low, high = low - 0.04 * (high - low), max(min(high, first), max(ends) + 0.01)
    return Frame(max(line.points[-1][0] for line in lines) * 1.01 or 1.0, low, high)


def _grid(frame: Frame, unit: str) -> list[str]:
    """The ticks with their numbers, and what the axes are."""
    out, losses = [], ticks(frame.low, frame.high)
    digits = max(0, -math.floor(math.log10(losses[1] - losses[0]) + 1e-9)) if len(losses) > 1 else 2
    for loss in losses:
        y = frame.y(loss)
        out.append(f"<path class='rule' d='M{LEFT} {y:.1f}H{RIGHT}'/>")
        out.append(f"<text class='end' x='{LEFT - 5}' y='{y + 4:.1f}'>{loss:.{digits}f}</text>")
    power = max(0, min(len(PREFIXES) - 1, math.floor(math.log10(frame.most) / 3 + 1e-9)))
    for flops in ticks(0, frame.most):
        said = f"{flops / 1000**power:.3g}"
        out.append(f"<text class='middle' x='{frame.x(flops):.1f}' y='{BOTTOM + 15}'>{said}</text>")
    out.append(f"<path class='axis' d='M{LEFT} {BOTTOM}H{RIGHT}'/>")
    out.append(f"<text class='end' x='{RIGHT}' y='{HEIGHT - 6}'>{PREFIXES[power]}FLOPs</text>")
    out.append(f"<text x='4' y='11'>{escape(unit)}</text>")
    return out


def _curve(frame: Frame, line: Line) -> list[str]:
    """The mean, on a band from the least to the most where seeds differ."""
    at = [frame.x(flops) for flops, *_ in line.points]
    out = []
    if any(low < high for *_, low, high in line.points):
        upper = [f"{x:.1f} {frame.y(high):.1f}" for x, (*_, high) in zip(at, line.points)]
        lower = [f"{x:.1f} {frame.y(low):.1f}" for x, (*_, low, _) in zip(at, line.points)]
        out.append(f"<path class='band {line.kind}' d='M{'L'.join(upper + lower[::-1])}Z'/>")
    mean = [f"{x:.1f} {frame.y(loss):.1f}" for x, (_, loss, *_) in zip(at, line.points)]
    return [*out, f"<path class='line {line.kind}' d='M{'L'.join(mean)}'/>"]


def _box(left: float, top: float, right: float, bottom: float) -> str:
    """A picture in the picture, which cuts off what is outside and keeps the coordinates."""
    width, height = right - left, bottom - top
    return f"x='{left}' y='{top}' width='{width}' height='{height}' viewBox='{left} {top} {width} {height}'"
