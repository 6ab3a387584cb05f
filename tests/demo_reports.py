"""Reports of the demo's format, scripted, and a parser of HTML that refuses what is not closed, or loads."""

import math
from html.parser import HTMLParser

MACHINE = {
    "processor": "A processor",
    "cores": 2,
    "threads": 2,
    "system": "Linux",
    "python": "3.11.2",
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "growth": "0.1.0",
    "date": "2026-11-30 12:00",
}
STEP = 1.5e11  # FLOPs
UNALIGNED = ", unaligned"
FREE = {"flops": 0, "seconds": 0.0}


def curve(*losses: float, step: float = 100, seconds: float = 1.0) -> list[dict]:
    return [
        {"step": i, "flops": step * i, "seconds": seconds * i, "loss": loss} for i, loss in enumerate(losses)
    ]


def run(arm: str, losses, seed: int = 0, part: str = "whole", baseline: str | None = None, **more) -> dict:
    """One run; `losses` at equal distances, 100 FLOPs and a second each unless `step`, `second` differ."""
    group = more.pop("group", "source" if arm == "source" else "growth")
    made = curve(*losses, step=more.pop("step", 100), seconds=more.pop("second", 1.0))
    told = {"rate": 0.002, "steps": 100, "parameters": 16_914_816, "step_flops": 100, "start": FREE}
    told |= {"lossless": None, "noise": 0.004 if baseline else None, "far": None}
    return (
        told
        | {"arm": arm, "seed": seed, "part": part, "baseline": baseline, "group": group, "curve": made}
        | more
    )


def family(runs: list[dict], name: str = "text", **more) -> dict:
    told = {"title": "Llama, 4 x 256 (4.5 M) to 8 x 384 (16.9 M)", "said": "Text.", "unit": "nats a token"}
    told |= {"source": {"layers": 4, "hidden": 256, "parameters": 4_500_000}, "rates": [0.001, 0.002]}
    told |= {"target": {"layers": 8, "hidden": 384, "parameters": 16_900_000}, "tried": [], "left_out": {}}
    return told | {"name": name, "runs": runs} | more


def report(*families: dict, **more) -> dict:
    told = {
        "scale": "laptop",
        "machine": MACHINE,
        "commit": "0123456789abcdef",
        "seconds": 9000.0,
        "skipped": [],
    }
    return told | {"families": list(families)} | more


def plain() -> dict:
    """A baseline that ends at 2.0 after 400 FLOPs and 4 s, one arm there after 1.5 steps, one never."""
    runs = [
        run("source", (6.0, 2.3)),
        run("scratch", (6.0, 4.0, 3.0, 2.5, 2.0), sample="def <f>(): & 'ä'"),
        run("fast", (2.4, 2.2, 1.8), baseline="scratch", start={"flops": 50, "seconds": 0.5}, lossless=True),
        run("slow", (2.4, 2.3, 2.25), baseline="scratch", start=FREE),
    ]
    return report(family(runs), scale="demo", skipped=["images: left out, for a reason"])


# loss at the start beyond the source's, how fast it falls, the start in steps, where it ends, lossless
GROWN = {
    "lemon": (0.0, 0.16, 0, -0.06, True),
    "lemon-carried": (0.0, 0.14, 0, -0.08, True),
    "net2net": (0.0, 0.2, 0, -0.03, True),
    "stack": (0.9, 0.26, 0, -0.02, False),
    "bert2bert": (0.5, 0.24, 0, -0.02, False),
    "ligo": (0.15, 0.2, 60, -0.03, False),
    "ligo, tokens dropped": (0.2, 0.18, 40, -0.01, False),
    "mango": (0.4, 0.5, 80, 0.021, False),
    "interpolate": (1.6, 0.35, 0, -0.004, False),
    "msg": (0.0, 0.22, 0, 0.004, True),
}
MOVED = {
    "retnet": (1.2, 0.1, 25, -0.09, None),
    "retnet, unaligned": (3.4, 0.5, 0, 0.012, None),
    "retnet-learned": (0.8, 0.06, 25, -0.12, None),
    "hybrid": (0.5, 0.08, 25, -0.1, None),
    "mamba": (2.0, 0.45, 30, -0.01, None),
    "mamba2": (1.8, 0.35, 30, -0.015, None),
}


def full(seeds: int = 3) -> dict:
    """Three families as a long run leaves them: arms that never arrive, missing seeds, no other domain."""
    said = (
        "Trained on 11 MB of text, cut by a tokenizer of 4096 tokens, in windows of 256; rates are of a grid."
    )
    text = _trained(
        "text", seeds, GROWN, MOVED, far=True, sample="def walk(node):\n    return [x for x in node]\n" * 3
    )
    text["runs"] = [one for one in text["runs"] if (one["arm"], one["seed"]) != ("msg", 2)]
    text |= {"said": said, "left_out": {"gstack": "it makes whole multiples of the depth and width alone."}}
    text["tried"] = [
        {"arm": arm, "rate": rate, "loss": 4.1 + 0.1 * i}
        for arm in ("scratch", "lemon")
        for i, rate in enumerate((0.001, 0.002, 0.004))
    ]
    few = {name: GROWN[name] for name in ("lemon", "ligo", "stack")}
    masked = _trained("masked", max(1, seeds - 1), few, {}, title="BERT, 4 x 256 (5.6 M) to 8 x 384 (18.1 M)")
    images = _trained(
        "images",
        1,
        {name: few[name] for name in ("lemon", "ligo")},
        {},
        accuracy=0.97,
        title="ViT, 4 x 192 (1.8 M) to 8 x 288 (8.0 M)",
        unit="nats an image",
    )
    return report(
        text, masked | {"said": said}, images | {"said": "8 x 8 digits."}, skipped=["a family left out"]
    )


def _trained(name: str, seeds: int, grown: dict, moved: dict, far=False, **more) -> dict:
    told = {key: more.pop(key) for key in ("accuracy", "sample") if key in more}
    told |= {"far": 5.6} if far else {}
    runs, how = [], {"step": 50 * STEP, "second": 30.0}
    for seed in range(seeds):
        shift = 0.01 * math.sin(7 * seed)
        runs.append(run("source", _falling(8.3, 3.8 + shift, 12, 0.12), seed, **how, **told))
        runs.append(run("scratch", _falling(8.3, 3.5 + shift, 12, 0.25), seed, **how, **told))
        runs += _arms(grown, "growth", lambda arm: "scratch", seed, shift, how, told)
        for arm in moved:
            if not arm.endswith(UNALIGNED):
                of = {"group": "transfer"} | how | told
                runs.append(run(f"scratch of {arm}", _falling(8.3, 3.6 + shift, 12, 0.25), seed, **of))
        runs += _arms(
            moved,
            "transfer",
            lambda arm: f"scratch of {arm.removesuffix(UNALIGNED)}",
            seed,
            shift,
            how,
            told,
        )
    return family(runs, name, **more)


def _arms(arms: dict, group: str, against, seed: int, shift: float, how: dict, told: dict) -> list[dict]:
    out, goal = [], (3.5 if group == "growth" else 3.6) + shift
    for i, (arm, (jump, speed, start, end, lossless)) in enumerate(arms.items()):
        wobble = 0.004 * math.sin(3 * seed + i)
        of = {"baseline": against(arm), "group": group, "lossless": lossless, "noise": 0.003} | how | told
        of["start"] = {"flops": start * STEP, "seconds": 0.7 * start}
        if "far" in told:
            of["far"] = told["far"] + end + wobble
        first, length = 3.8 + shift + jump, round((600 - start) / 50)
        out.append(run(arm, _falling(first, goal + end + wobble, length, speed), seed, "equal", **of))
        short = _falling(first, goal + end / 2 + wobble, max(4, length * 2 // 3), speed)
        out.append(run(arm, short, seed, "short", **of))
    return out


def _falling(first: float, end: float, points: int, speed: float) -> list[float]:
    """From the first loss to the last, most of the way at once."""
    x = [i / points for i in range(points + 1)]
    fall = [math.exp(-i / speed) for i in x]
    return [end + (first - end) * (y - fall[-1]) / (1 - fall[-1]) for y in fall]


class Strict(HTMLParser):
    """Every tag that opens closes, in order; nothing is loaded from anywhere; no id stands twice."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.ids = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        assert not {"src", "href", "xlink:href"} & dict(attrs).keys() and tag not in ("script", "link")
        if name := dict(attrs).get("id"):
            assert name not in self.ids
            self.ids.add(name)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
