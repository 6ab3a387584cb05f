"""The demo at a toy size, and what its report says of a scripted run."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from growth.demo.corpus import corpus
from growth.demo.job import TRANSFERS, Budget, Job, Size, perform
from growth.demo.machine import machine
from growth.demo.page import page
from growth.demo.saving import compare, reach, remarks, rows, table
from growth.errors import Refusal
from growth.methods import METHODS

TOY = Job(
    source=Size(2, 16, 2),
    target=Size(3, 24, 3),
    training=Budget(6, 1e-2, 1, 0.6),
    growing=Budget(4, 1e-2, 1, 0.6),
    transferring={name: Budget(4, 1e-2, 1, 0.6) for name in TRANSFERS},
    learning=2,
    batch_size=2,
    length=32,
    held_out=4,
    evaluations=2,
    text=40_000,
    words=4,
)


def curve(*points):
    return [{"step": i, "flops": 100 * i, "seconds": 1.0 * i, "loss": loss} for i, loss in enumerate(points)]


def scripted() -> dict:
    """Two baselines that end at 2.0 after 400 FLOPs and 4 s, one arm there after 1.5 steps, one never."""
    rest = {
        "parameters": 10,
        "step_flops": 100,
        "unfrozen_at": None,
        "sample": "def <f>(): & 'ä'",
        "noise": 0.004,
    }
    free = {"flops": 0, "seconds": 0.0}
    source = {"name": "source", "baseline": None, "start": free, "curve": curve(6.0, 2.3), **rest}
    scratch = {
        "name": "scratch",
        "baseline": None,
        "start": free,
        "curve": curve(6.0, 4.0, 3.0, 2.5, 2.0),
        **rest,
    }
    fast = {"name": "fast", "baseline": "scratch", "curve": curve(2.4, 2.2, 1.8), **rest}
    other = scratch | {"name": "slow-scratch"}
    slow = {"name": "slow", "baseline": "slow-scratch", "start": free, "curve": curve(2.4, 2.3, 2.25), **rest}
    fast["start"] = {"flops": 50, "seconds": 0.5}
    arms = [scratch, fast | compare(fast, scratch), other, slow | compare(slow, other)]
    return {
        "job": asdict(TOY),
        "corpus": {"what": "some text", "files": (5, 2), "bytes": (100, 20)},
        "machine": machine(),
        "seconds": 12.0,
        "source": source,
        "arms": arms,
    }


class Strict(HTMLParser):
    """Every tag that opens closes, in order; nothing is loaded from anywhere."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not {"src", "href", "xlink:href"} & dict(attrs).keys()
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# ---- savings


def test_the_crossing_is_linear_between_measurements():
    assert reach(curve(4.0, 3.0, 1.0), 2.5) == {"flops": 125.0, "seconds": 1.25}
    assert reach(curve(4.0, 3.0, 1.0), 3.0) == {"flops": 100.0, "seconds": 1.0}
    assert reach(curve(4.0, 3.0, 1.0), 5.0) == {"flops": 0, "seconds": 0.0}
    assert reach(curve(4.0, 3.0, 1.0), 0.9) is None


def test_a_saving_includes_what_growing_cost():
    """150 FLOPs and 50 for growing, out of 400; 1.5 s and 0.5, out of 4."""
    fast = scripted()["arms"][1]
    assert fast["reached"] == {
        "flops": pytest.approx(200.0),
        "seconds": pytest.approx(2.0),
    }
    assert fast["saved"] == {"flops": pytest.approx(0.5), "seconds": pytest.approx(0.5)}


def test_the_table_says_what_was_saved_and_what_was_not_reached():
    report = scripted()
    assert rows(report) == [
        ("scratch", "6.000", "2.000", "4.00e+02", "", "4.0", ""),
        ("fast", "2.400", "1.800", "2.00e+02", "50%", "2.0", "50%"),
        ("slow-scratch", "6.000", "2.000", "4.00e+02", "", "4.0", ""),
        ("slow", "2.400", "2.250", "not reached", "", "-", ""),
    ]
    out = StringIO()
    Console(file=out, width=80).print(table(report))
    assert "not reached" in out.getvalue() and "50%" in out.getvalue()
    assert "slow: not reached: ended at 2.250 against 2.000." in remarks(report)


def test_a_baseline_that_ends_above_the_source_is_called_unfair():
    report = scripted()
    assert "Every baseline ended below the source model's 2.300" in remarks(report)[-1]
    report["source"]["curve"][-1]["loss"] = 1.9
    assert (
        remarks(report)[-1] == "Not a fair test: scratch, slow-scratch did not get below the source's 1.900."
    )


# ---- the page


def test_the_page_parses_loads_nothing_and_says_what_was_not_reached():
    text = page(scripted())
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    assert parser.seen.count("svg") == 2
    assert text.count(">slow-scratch</text>") == 1, "the legend of its group"
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*http|url\(\s*[\"']?http|<script|@import", text)
    assert "slow: not reached: ended at 2.250 against 2.000." in text
    assert "def &lt;f&gt;(): &amp; &#x27;ä&#x27;" in text


# ---- the text and the whole job


def test_no_file_is_both_trained_and_measured_on():
    train, validation = corpus(limit=300_000)
    assert set(train).isdisjoint(validation)
    assert 0.05 < sum(map(len, validation)) / sum(map(len, train + validation)) < 0.5
    assert corpus(limit=300_000) == (train, validation)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    spoken = StringIO()
    return perform(TOY, out, Console(file=spoken, width=100)), out, spoken.getvalue()


def test_every_arm_is_trained_beside_its_baseline_on_the_same_budget(done):
    report, _, _ = done
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert set(arms) == {"scratch", *METHODS, *TRANSFERS, *(f"{name}-scratch" for name in TRANSFERS)}
    for arm in arms.values():
        assert [p["step"] for p in arm["curve"]] == [0, 2, 4]
        if arm["baseline"]:
            baseline = arms[arm["baseline"]]
            assert baseline["baseline"] is None
            assert (arm["parameters"], arm["step_flops"]) == (baseline["parameters"], baseline["step_flops"])
            assert 0 < arm["noise"] < 1 and arm["start"]["seconds"] > 0
    assert arms["lemon"]["lossless"] and not arms["stack"]["lossless"]
    assert arms["lemon"]["curve"][0]["loss"] == pytest.approx(report["source"]["curve"][-1]["loss"], abs=1e-4)
    assert arms["ligo"]["start"]["flops"] > arms["lemon"]["start"]["flops"]


def test_every_checkpoint_writes_text_and_the_report_is_on_disk(done):
    report, out, spoken = done
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert Strict().feed((out / "report.html").read_text(encoding="utf-8")) is None
    for arm in [report["source"], *report["arms"]]:
        model = AutoModelForCausalLM.from_pretrained(out / arm["checkpoint"])
        tokenizer = AutoTokenizer.from_pretrained(out / arm["checkpoint"])
        prompt = tokenizer("import ", return_tensors="pt", return_token_type_ids=False)
        text = model.generate(**prompt, max_new_tokens=3, do_sample=False)
        assert tokenizer.decode(text[0]).startswith("import ") and len(text[0]) == 10
        if arm["baseline"]:
            assert f"{arm['name']}: the from-scratch loss" in spoken
    assert "the cost until it is that of training from scratch" in spoken


def test_an_existing_folder_is_refused_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(Refusal, match="expected an output folder that does not exist"):
        perform(TOY, tmp_path, Console(file=StringIO()))

    def fail(*args, **settings):
        raise RuntimeError("no memory left")

    monkeypatch.setattr("growth.train", fail)
    with pytest.raises(RuntimeError):
        perform(TOY, tmp_path / "out", Console(file=StringIO()))
    assert list(tmp_path.iterdir()) == []
