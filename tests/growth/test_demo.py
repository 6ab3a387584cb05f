"""The demo at a toy size."""

import json
from io import StringIO

import pytest
import torch
from demo_reports import Strict, plain
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
from growth.demo.job import perform
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


def test_every_job_has_every_transfer():
    for job in (FULL, QUICK, TOY):
        assert {name: arm.settings for name, arm in job.text.transferring.items()} == TRANSFERS


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
    arms = {arm["name"]: arm for group in report["groups"] for arm in group["arms"]}
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
            return plain()["families"][0]

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
