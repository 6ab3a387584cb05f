"""report.html: one page by itself, no script, nothing to load; a function of what report.json holds."""

from html import escape

from growth.demo.charts import charts
from growth.demo.saving import COLUMNS, remarks, rows

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
p, li { max-width: 75ch }
svg { max-width: 100%; height: auto }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr.baseline td { border-top: 1px solid #999; color: #555 }
pre { background: #f4f4f4; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere;
      margin: .2rem 0 1rem }
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
stops improving, then everything does (XATL). LiGO's maps learn for {learning} steps first. Steps, rates,
warm-ups and shares were chosen in trials on this text; report.json has them all.

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
        charts(grown, last),
        "<h2>Transferred to linear-cost layers</h2>",
        charts(moved, last),
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
    facts = {"trained": trained, "measured": measured, "noise": noise, "seconds": report["seconds"]}
    text = COUNTING.format(**report["job"] | report["machine"] | facts)
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _table(report: dict) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    lines = []
    for arm, cells in zip(report["arms"], rows(report)):
        kind = "" if arm["baseline"] else " class='baseline'"
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"
