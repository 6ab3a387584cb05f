"""The demo at a toy size, and what its report says of a scripted run."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from io import StringIO

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from growth.demo.budgets import (
    FULL,
    QUICK,
    TRANSFERS,
    Budget,
    Carried,
    Group,
    Job,
    Lesson,
    Size,
    Text,
    transfers,
)
from growth.demo.corpus import corpus
from growth.demo.digits import digits
from growth.demo.job import machine, perform
from growth.demo.page import page
from growth.demo.saving import arms_of, compare, reach, remarks, rows, table
from growth.errors import Refusal
from growth.methods import METHODS

SIZES = {"source": Size(2, 16, 2), "target": Size(3, 24, 3)}
BUDGETS = {"training": Budget(6, 1e-2, 1, 0.6), "growing": Budget(4, 1e-2, 1, 0.6)}
NUMBERS = SIZES | BUDGETS | {"learning": Lesson(2, 2), "batch_size": 2, "held_out": 4, "evaluations": 2}
TOY = Job(
    text=Text(
        **NUMBERS,
        carrying={
            "lemon-carried": Carried(True, Budget(4, 1e-2, 0, 0.6)),
            "lemon-early": Carried(False, Budget(4, 1e-2, 0, 0.6)),
        },
        transferring=transfers({name: (2, Budget(4, 1e-2, 1, 0.6, 5e-3)) for name in TRANSFERS}, 4),
        length=32,
        text=40_000,
        words=4,
    ),
    images=Group(**NUMBERS),
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
    told = {"what": "some text", "files": (5, 2), "bytes": (100, 20)}
    text = {"name": "text", "unit": "nats a byte", "corpus": told, "source": source, "arms": arms}
    return {
        "job": asdict(TOY),
        "machine": machine(),
        "seconds": 12.0,
        "groups": [text],
        "skipped": ["images: left out, for a reason"],
    }


def with_images(report: dict) -> dict:
    """The scripted run again, with its first two arms as image models."""
    text = report["groups"][0]
    arms = [
        arm | {"name": f"vit-{arm['name']}", "accuracy": 0.875, "baseline": arm["baseline"] and "vit-scratch"}
        for arm in text["arms"][:2]
    ]
    source = text["source"] | {"name": "vit-source", "accuracy": 0.5}
    images = {"name": "images", "unit": "nats an image", "source": source, "arms": arms}
    return report | {"groups": [text, images], "skipped": []}


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
    fast = scripted()["groups"][0]["arms"][1]
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
    assert remarks(report)[1:] == [
        "text: every baseline ended below the source model's 2.300: none was beaten by copying it.",
        "images: left out, for a reason",
    ]
    report["groups"][0]["source"]["curve"][-1]["loss"] = 1.9
    said = "text: not a fair test, for scratch, slow-scratch did not get below the source's 1.900."
    assert remarks(report)[1] == said


def test_every_job_has_every_transfer():
    for job in (FULL, QUICK, TOY):
        assert {name: arm.settings for name, arm in job.text.transferring.items()} == TRANSFERS


def test_a_group_of_images_has_rows_and_a_verdict_of_its_own():
    report = with_images(scripted())
    assert rows(report)[4:] == [
        ("vit-scratch", "6.000", "2.000", "4.00e+02", "", "4.0", ""),
        ("vit-fast", "2.400", "1.800", "2.00e+02", "50%", "2.0", "50%"),
    ]
    assert [line.split(":")[0] for line in remarks(report)] == ["slow", "text", "images"]


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
    assert (
        "2 steps of one window each" in text and "reads of 4 windows" in text and "at 0.3 of the rate" in text
    )


def test_the_page_shows_images_by_themselves_in_their_own_unit():
    text = page(with_images(scripted()))
    parser = Strict()
    parser.feed(text)
    assert parser.open == [] and parser.seen.count("svg") == 3
    assert text.count("nats an image") == 1 and "vit-source 50.0%, vit-scratch 87.5%, vit-fast 87.5%" in text


# ---- the data and the whole job


def test_no_file_is_both_trained_and_measured_on():
    train, validation = corpus(limit=300_000)
    assert set(train).isdisjoint(validation)
    assert 0.05 < sum(map(len, validation)) / sum(map(len, train + validation)) < 0.5
    assert corpus(limit=300_000) == (train, validation)


def test_no_digit_is_both_trained_and_measured_on():
    """Of each to train on there are nine, moved by up to a pixel: the fifth is where it was."""
    pytest.importorskip("sklearn")
    train, held_out = digits(256)
    assert (len(train), len(held_out)) == (9 * (1797 - 256), 256)
    places = train.pixel_values.unflatten(0, (9, -1))
    assert torch.equal(places[0, :, :, 1:, 1:], places[4, :, :, :-1, :-1])
    assert torch.equal(places[8, :, :, :-1, :-1], places[4, :, :, 1:, 1:])
    own = {x.numpy().tobytes() for x in places[4]}
    assert not own & {x.numpy().tobytes() for x in held_out.pixel_values}
    assert held_out.pixel_values.min() == -1 and held_out.pixel_values.max() == 1


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    spoken = StringIO()
    return perform(TOY, out, Console(file=spoken, width=100)), out, spoken.getvalue()


def test_every_arm_is_trained_beside_its_baseline_on_the_same_budget(done):
    pytest.importorskip("sklearn")
    report, _, _ = done
    arms = {arm["name"]: arm for arm in arms_of(report)}
    left_out = report["groups"][0]["left_out"]
    assert left_out.keys() == {"gstack", "gradmax", "hypercloning", "solar", "staged", "upcycle"}, left_out
    carried = {"lemon-carried", "lemon-early"}
    grown = METHODS.keys() - left_out.keys() | carried
    texts = {"scratch", *grown, *TRANSFERS, *(f"{name}-scratch" for name in TRANSFERS)}
    assert set(arms) == texts | {"vit-scratch", "vit-lemon", "vit-ligo"}
    for arm in arms.values():
        assert [p["step"] for p in arm["curve"]] == [0, 2, 4]
        if arm["baseline"]:
            baseline = arms[arm["baseline"]]
            assert baseline["baseline"] is None
            assert (arm["parameters"], arm["step_flops"]) == (baseline["parameters"], baseline["step_flops"])
            assert 0 < arm["noise"] < 1 and arm["start"]["seconds"] > 0
    assert arms["lemon"]["lossless"] and not arms["stack"]["lossless"]
    for name in carried:
        settings = json.loads((done[1] / "trained" / name / "training.json").read_text())["settings"]
        assert settings["warmup"] == 0 and settings["moments"].endswith("after 6 steps")
    early = arms["lemon-early"]["source"]
    schedules = [
        json.loads((done[1] / "trained" / name / "training.json").read_text())["settings"]["schedule"]
        for name in ("source", early["name"])
    ]
    assert schedules == ["cosine", "constant"]
    assert arms["lemon-early"]["curve"][0]["loss"] == pytest.approx(early["curve"][-1]["loss"], abs=1e-4)
    for name in TRANSFERS:
        assert arms[name]["start"]["flops"] > 0, "fitting is counted"
        record = json.loads((done[1] / "start" / name / "growth.json").read_text())
        assert record["align"]["steps"] == 2 and record["flops"] == arms[name]["start"]["flops"]
        settings = json.loads((done[1] / "trained" / name / "training.json").read_text())["settings"]
        assert (settings["learning_rate"], settings["copied_rate"], settings["freeze"]) == (5e-3, 0.3, None)
        beside = json.loads((done[1] / "trained" / f"{name}-scratch" / "training.json").read_text())
        assert beside["settings"]["learning_rate"] == 1e-2
    for name, learned in (("retnet", False), ("retnet-learned", True)):
        for of in (name, f"{name}-scratch"):
            config = json.loads((done[1] / "trained" / of / "config.json").read_text())
            assert config.get("retention_learned_decay", False) is learned, of
    for group, prefix in zip(report["groups"], ("", "vit-"), strict=True):
        end = group["source"]["curve"][-1]["loss"]
        assert arms[f"{prefix}lemon"]["curve"][0]["loss"] == pytest.approx(end, abs=1e-4)
        assert arms[f"{prefix}ligo"]["start"]["flops"] > arms[f"{prefix}lemon"]["start"]["flops"]


def test_every_checkpoint_works_and_the_report_is_on_disk(done):
    report, out, spoken = done
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert Strict().feed((out / "report.html").read_text(encoding="utf-8")) is None
    for group in report["groups"]:
        for arm in [group["source"], *group["arms"]]:
            if arm["baseline"]:
                assert f"{arm['name']}: the from-scratch loss" in spoken
            if group["name"] == "images":
                model = AutoModelForImageClassification.from_pretrained(out / arm["checkpoint"]).eval()
                assert digits(4)[1].accuracy(model) == arm["accuracy"]
                continue
            model = AutoModelForCausalLM.from_pretrained(out / arm["checkpoint"])
            tokenizer = AutoTokenizer.from_pretrained(out / arm["checkpoint"])
            prompt = tokenizer("import ", return_tensors="pt", return_token_type_ids=False)
            text = model.generate(**prompt, max_new_tokens=3, do_sample=False)
            assert tokenizer.decode(text[0]).startswith("import ") and len(text[0]) == 10
    assert "the cost until it is that of training from scratch" in spoken


def test_without_scikit_learn_the_images_are_left_out_with_a_line_that_says_so(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, *args):
            """Reports what was scripted."""

        def report(self):
            return scripted()["groups"][0]

    monkeypatch.setattr("growth.demo.job.Texts", Fake)
    monkeypatch.setattr("growth.demo.digits.there", lambda: False)
    spoken = StringIO()
    report = perform(TOY, tmp_path / "out", Console(file=spoken, width=100))
    assert [group["name"] for group in report["groups"]] == ["text"]
    said = (
        "images: left out, for scikit-learn, which has the digits, is not installed: pip install scikit-learn"
    )
    assert said in spoken.getvalue() and said in (tmp_path / "out/report.html").read_text()


def test_an_existing_folder_is_refused_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(Refusal, match="expected an output folder that does not exist"):
        perform(TOY, tmp_path, Console(file=StringIO()))

    def fail(*args, **settings):
        raise RuntimeError("no memory left")

    monkeypatch.setattr("growth.train", fail)
    with pytest.raises(RuntimeError):
        perform(TOY, tmp_path / "out", Console(file=StringIO()))
    assert list(tmp_path.iterdir()) == []
