"""report.html: one page by itself, no script, nothing to load; a function of what report.json holds."""

from collections.abc import Iterable
from html import escape

from growth.demo.charts import charts
from growth.demo.saving import COLUMNS, arms_of, remarks, rows

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
the same order, as many steps. The question: what does it cost to reach the loss that training from scratch
ends with?
"""

VISION = """
A ViT of {small} learnt handwritten digits of 8 x 8 pixels, each moved by up to a pixel, and was grown to
{large}. Of {held_out} other digits, the share that each model names rightly at its end: {accuracy}. The
difference between an arm's last loss and its baseline's has a standard error of at most {noise:.3f}.
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

A baseline's learning rate falls along a cosine over all its steps. An arm starts ahead: it falls faster,
along LEMON's schedule, after a gentler warm-up; lemon-carried and lemon-early, which go on with their
source's optimizer, warm up in no step. The source of lemon-early is another one: its rate had not fallen yet.
A grown model has its baseline's peak; of a transferred one and its baseline each has the peak at which it
does best. LiGO's maps learn for {learning[steps]} steps first. Steps, rates, warm-ups and shares were chosen
in trials on this text, those of transfers on windows that are not measured here: so many steps that a
baseline ends about where the source does. report.json has them all.

What is transferred keeps all but the mixers. A new mixer is first fitted to the attention whose place it
takes: {aligned} steps of one window each, on what the source's own layer reads of {windows} windows, through
which the source runs once. Then everything trains, what was copied at {copied} of the rate.

Machine: {processor}, {threads} threads, torch {torch}, transformers {transformers}, Python {python}, {date};
{seconds:.0f} s for all.
"""


def page(report: dict) -> str:
    """The report as HTML: what was done, the table, the curves, words the models wrote, how it is counted."""
    groups = {group["name"]: group for group in report["groups"]}
    text = groups["text"]
    grown = [arm for arm in text["arms"] if arm["name"] == "scratch" or arm["baseline"] == "scratch"]
    moved = [arm for arm in text["arms"] if arm not in grown]
    body = [
        "<h1>What a trained transformer saves</h1>",
        _paragraph(_summary(report, text)),
        _table(report),
        _list(remarks(report)),
        "<h2>Grown to a larger GPT-NeoX</h2>",
        _charts(text, grown),
        "<h2>Transferred to linear-cost layers</h2>",
        _charts(text, moved),
    ]
    if images := groups.get("images"):
        body += [
            "<h2>Grown to a larger ViT</h2>",
            _paragraph(_vision(report, images)),
            _charts(images, images["arms"]),
        ]
    body += [
        "<h2>How it is counted</h2>",
        _list(_counting(report, text)),
        "<h2>What the models write</h2>",
        *(
            f"{_paragraph(arm['name'])}<pre>{escape(arm['sample'])}</pre>"
            for arm in (text["source"], *text["arms"])
        ),
    ]
    head = f"<meta charset='utf-8'><title>growth demo</title><style>{STYLE}</style>"
    return (
        f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _paragraph(text: str) -> str:
    return f"<p>{escape(' '.join(text.split()))}</p>"


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _charts(group: dict, arms: list[dict]) -> str:
    return charts(arms, group["source"]["curve"][-1]["loss"], group["unit"])


def _sizes(numbers: dict) -> dict[str, str]:
    """The source's and the target's, in words."""
    sizes = ("small", "source"), ("large", "target")
    return {name: f"{numbers[of]['layers']} layers x {numbers[of]['hidden']}" for name, of in sizes}


def _summary(report: dict, text: dict) -> str:
    loss = text["source"]["curve"][-1]["loss"]
    return SUMMARY.format(loss=loss, what=text["corpus"]["what"], **_sizes(report["job"]["text"]))


def _vision(report: dict, images: dict) -> str:
    numbers = report["job"]["images"]
    models = (images["source"], *images["arms"])
    accuracy = ", ".join(f"{arm['name']} {arm['accuracy']:.1%}" for arm in models)
    facts = {"held_out": numbers["held_out"], "accuracy": accuracy, "noise": _noise(images)}
    return VISION.format(**facts, **_sizes(numbers))


def _counting(report: dict, text: dict) -> list[str]:
    trained, measured = text["corpus"]["files"]
    facts = {"trained": trained, "measured": measured, "noise": _noise(text), "seconds": report["seconds"]}
    transfers = report["job"]["text"]["transferring"].values()
    for said, name in (("aligned", "align"), ("windows", "windows"), ("copied", "copied")):
        facts[said] = _range(arm[name] for arm in transfers)
    said = COUNTING.format(**report["job"]["text"] | report["machine"] | facts)
    return [" ".join(paragraph.split()) for paragraph in said.split("\n\n")]


def _range(numbers: Iterable[float]) -> str:
    """The one that all are, or the least and the most."""
    least, *_, most = sorted(numbers) * 2
    return f"{least}" if least == most else f"{least} to {most}"


def _noise(group: dict) -> float:
    return max(arm["noise"] for arm in group["arms"] if arm["baseline"])


def _table(report: dict) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    lines = []
    for arm, cells in zip(arms_of(report), rows(report)):
        kind = "" if arm["baseline"] else " class='baseline'"
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"
