"""report.html: one page by itself, no script, nothing to load; a function of what report.json holds."""

import math
from html import escape

from growth.demo.saving import COLUMNS, remarks, rows

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # told apart by all kinds of sight
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 340, 52, 14, 14, 40

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color:
#222;
       background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
p, li { max-width: 75ch }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr.baseline td { border-top: 1px solid #999; color: #555 }
.charts { display: flex; flex-wrap: wrap; gap: 1rem } svg { max-width: 100%; height: auto }
svg text { font: 12px system-ui, sans-serif; fill: #444 }
pre { background: #f4f4f4; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0
1rem } .key { display: inline-block; margin-right: 1.2rem } .key i { display: inline-block; width: 1.6rem;
margin-right: .4rem;
       vertical-align: middle }
"""


SUMMARY = """
A GPT-NeoX of {small} learnt {what}, byte by byte, and ended at a validation loss of {loss:.3f} nats a byte.
It was then grown to {large}, and transferred at its own size to models whose cost grows linearly with the
text. Each result was trained on, beside a model of the same shape that started from nothing: the same text in
the same order, as many steps, the same peak learning rate. The question: what does it cost to reach the loss
that training from scratch ends with?
"""

COUNTING = """
Cost is read where the curve crosses the baseline's last loss, linear between measurements, and includes what
growing or transferring cost, LiGO's learning steps too. Training the source model is not counted: it is the
model that one has already.

FLOPs are counted on a real forward and backward pass, kernel by kernel, two for a multiply-add. Elementwise
work, the optimizer and measuring the loss are left out. Seconds are those of training.

Validation loss: {held_out} windows of {length} bytes, always the same, out of {measured} files that were not
trained on ({trained} were). The difference between an arm's last loss and its baseline's has a standard error
of at most {noise:.3f}.

A baseline's learning rate falls along a cosine over all its steps. An arm starts ahead: from the same peak it
falls faster, along LEMON's schedule, after a gentler warm-up. Transferred layers train alone until the loss
stops improving, then everything does (XATL).

Machine: {processor}, {threads} threads, torch {torch}, transformers {transformers}, Python {python}, {date};
{seconds:.0f} s for all.
"""


def page(report: dict) -> str:
    """The report as HTML: what was done, the table, the curves, words the models wrote, how it is counted."""
    arms, source = report["arms"], report["source"]
    last = source["curve"][-1]["loss"]
    grown = [arm for arm in arms if arm["name"] == "scratch" or arm["baseline"] == "scratch"]
    moved = [arm for arm in arms if arm not in grown]
    body = [
        "<h1>What a trained transformer saves</h1>",
        f"<p>{escape(_summary(report))}</p>",
        _table(report),
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in remarks(report)) + "</ul>",
        "<h2>Grown to a larger GPT-NeoX</h2>",
        _charts(grown, last),
        "<h2>Transferred to linear-cost layers</h2>",
        _charts(moved, last),
        "<h2>How it is counted</h2>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in _counting(report)) + "</ul>",
        "<h2>What the models write</h2>",
        *(f"<p>{escape(arm['name'])}</p><pre>{escape(arm['sample'])}</pre>" for arm in [source, *arms]),
    ]
    head = f"<meta charset='utf-8'><title>growth demo</title><style>{STYLE}</style>"
    return (
        f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _summary(report: dict) -> str:
    job = report["job"]
    small, large = (f"{job[size]['layers']} layers x {job[size]['hidden']}" for size in ("source", "target"))
    loss = report["source"]["curve"][-1]["loss"]
    return " ".join(
        SUMMARY.format(small=small, large=large, loss=loss, what=report["corpus"]["what"]).split()
    )


def _counting(report: dict) -> list[str]:
    trained, measured = report["corpus"]["files"]
    noise = max(arm["noise"] for arm in report["arms"] if arm["baseline"])
    text = COUNTING.format(
        trained=trained,
        measured=measured,
        noise=noise,
        seconds=report["seconds"],
        **report["job"],
        **report["machine"],
    )
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _table(report: dict) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    lines = []
    for arm, cells in zip(report["arms"], rows(report)):
        kind = "" if arm["baseline"] else " class='baseline'"
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"


def _charts(arms: list[dict], source: float) -> str:
    """The arms' loss against FLOPs and against seconds. Baselines are dashed, in the colour of their arm."""
    looks = _looks(arms)
    keys = ""
    for name, (colour, dash) in looks.items():
        line = f"border-top: 3px {'dashed' if dash else 'solid'} {colour}"
        keys += f"<span class='key'><i style='{line}'></i>{escape(name)}</span>"
    charts = "".join(
        _chart(arms, looks, *axis, source) for axis in (("flops", "FLOPs"), ("seconds", "seconds"))
    )
    return f"<p>{keys}</p><div class='charts'>{charts}</div>"


def _looks(arms: list[dict]) -> dict[str, tuple[str, bool]]:
    """Name -> colour, dashed. A baseline of one arm shares its colour; a baseline of many is grey."""
    looks, colours = {}, iter(COLOURS)
    for arm in arms:
        name = arm["name"]
        pair = sum(other["baseline"] == (arm["baseline"] or name) for other in arms) == 1
        if arm["baseline"] is None:
            looks[name] = next(colours) if pair else "#555555", True
        else:
            looks[name] = looks[arm["baseline"]][0] if pair else next(colours), False
    return looks


def _chart(arms: list[dict], looks: dict, cost: str, label: str, source: float) -> str:
    curves = {arm["name"]: [(p[cost] + arm["start"][cost], p["loss"]) for p in arm["curve"]] for arm in arms}
    right = max(x for curve in curves.values() for x, _ in curve)
    lowest = min(source, *(y for curve in curves.values() for _, y in curve))
    # The first losses, of 5 nats and more, would press all that matters into the last tenth of the picture.
    highest = lowest + 4 * (max(curve[-1][1] for curve in curves.values()) - lowest + 0.1)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / right

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (highest - value) / (highest - lowest)

    parts = []
    for value in ticks(lowest, highest):
        parts.append(f"<path d='M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}' stroke='#ddd'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{y(value) + 4:.1f}' text-anchor='end'>{value:g}</text>")
    for value in ticks(0, right):
        text = f"{value:.1e}".replace("e+", "e") if right > 1e5 else f"{value:g}"
        parts.append(
            f"<text x='{x(value):.1f}' y='{HEIGHT - BOTTOM + 18}' text-anchor='middle'>{text}</text>"
        )
    parts.append(f"<path d='M{LEFT} {y(source):.1f}H{WIDTH - RIGHT}' stroke='#222' stroke-dasharray='2 4'/>")
    parts.append(
        f"<text x='{WIDTH - RIGHT}' y='{y(source) - 5:.1f}' text-anchor='end'>the source model</text>"
    )
    clip = f"clip-{cost}-{arms[0]['name'].split()[0]}"
    box = f"x='{LEFT}' y='{TOP}' width='{WIDTH - LEFT - RIGHT}' height='{HEIGHT - TOP - BOTTOM}'"
    parts.append(f"<clipPath id='{clip}'><rect {box}/></clipPath><g clip-path='url(#{clip})'>")
    for name, curve in curves.items():
        colour, dash = looks[name]
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in curve)
        style = " stroke-dasharray='6 4'" if dash else ""
        parts.append(
            f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='2'{style}>"
            f"<title>{escape(name)}</title></polyline>"
        )
    parts.append(
        f"</g><text x='{(LEFT + WIDTH - RIGHT) / 2}' y='{HEIGHT - 6}' text-anchor='middle'>{label}</text>"
    )
    parts.append(f"<text x='{LEFT + 6}' y='{TOP + 12}'>validation loss, nats a byte</text>")
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' role='img'>" + "".join(parts) + "</svg>"


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers between low and high: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
