"""The demo's runs at a toy size: all arms beside their baselines, and a study that goes on where it ended."""

import json
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from demo_reports import full, report
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from growth.demo.arms import ARMS
from growth.demo.corpus import corpus
from growth.demo.digits import digits
from growth.demo.job import carried_out, perform, shown
from growth.demo.job import run as demo
from growth.demo.runs import Runs
from growth.demo.scales import ALL, DEMO, LARGER, MOVED, QUICK, Budget, Corpus, Lesson, Numbers, Scale, Size
from growth.demo.study import Study, beyond
from growth.errors import Refusal
from growth.locks import alone_in
from growth.methods import METHODS
from growth.training.callbacks import LayerDropping, TokenDropping
from growth.training.finite import NotFinite

NUMBERS = Numbers(
    model="gpt_neox",
    source=Size(2, 16, 2),
    target=Size(3, 24, 3),
    budgets={
        "source": Budget(6, 1e-2, 0),
        "scratch": Budget(4, 1e-2, 0),
        "growth": Budget(4, 1e-2, 1, 0.6),
        "lemon-carried": Budget(4, 1e-2, 0, 0.6),
        "lemon-early": Budget(4, 1e-2, 0, 0.6),
        "scratch of any": Budget(4, 1e-2, 0),
        "transfer": Budget(4, 5e-3, 1, 0.6),
    },
    align=dict.fromkeys(MOVED, 2),
    windows=4,
    learning=Lesson(2, 2),
    batch_size=2,
    held_out=4,
    evaluations=2,
    corpus=Corpus(40_000, 0, 32, 4),
    arms=ALL + MOVED,
)
IMAGES = replace(NUMBERS, model="vit", corpus=None, align={}, arms=("lemon", "ligo"))
TOY = Scale("toy", {"text": NUMBERS, "images": IMAGES})
# Two rates to choose from, and two seeds.
FEW = replace(
    NUMBERS,
    model="llama",
    source=Size(2, 16, 2, 32),
    target=Size(3, 24, 3, 48),
    budgets={name: replace(budget, rate=None) for name, budget in NUMBERS.budgets.items()}
    | {"scratch": Budget(12, None, 0)},
    corpus=Corpus(60_000, 300, 32, 4),
    arms=("lemon", "ligo, tokens dropped", "lemon-early", "hybrid, unaligned"),
    rates=(1e-2, 1e-3),
)
PARTED = Scale("toy", {"text": FEW}, seeds=(0, 1), parted=True, keep=False)


def quiet_console() -> Console:
    return Console(file=StringIO(), width=100)


# ---- data


def test_no_file_is_both_trained_and_measured_on():
    train, validation = corpus(limit=300_000)
    assert set(train).isdisjoint(validation)
    assert 0.05 < sum(map(len, validation)) / sum(map(len, train + validation)) < 0.5
    assert corpus(limit=300_000) == (train, validation)


def test_a_corpus_is_as_large_as_what_there_is():
    train, validation = corpus(limit=10**12)
    assert sum(map(len, validation)) < 0.2 * sum(map(len, train))


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


# ---- scales


def test_every_scale_has_a_budget_for_each_of_its_arms_and_their_baselines():
    for scale in (DEMO, QUICK, *LARGER.values()):
        for numbers in scale.families.values():
            for arm in map(ARMS.get, numbers.arms):
                assert {arm.name, arm.group} & numbers.budgets.keys(), arm
                assert {arm.baseline, "scratch of any"} & numbers.budgets.keys(), arm
                assert arm.fitted != "steps" or {arm.name, "transfer"} & numbers.align.keys(), arm
                assert numbers.rates or all(budget.rate for budget in numbers.budgets.values())


def test_a_scale_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Refusal, match="scale: expected one of laptop, gpu, alone, got huge"):
        demo(tmp_path / "out", scale="huge")
    with pytest.raises(Refusal, match="got quick as well"):
        demo(tmp_path / "out", quick=True, scale="laptop")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(Refusal, match="expected a new folder, or one that such a run was ended in"):
        demo(tmp_path / "other", scale="laptop")
    assert [file.name for file in tmp_path.rglob("*")] == ["other", "mine.txt"]


# ---- the whole job


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    spoken = StringIO()
    return perform(TOY, out, Console(file=spoken, width=100)), out, spoken.getvalue()


def settings(out, name, family="text"):
    return json.loads((out / f"work/{family}/0/trained/{name}/training.json").read_text())["settings"]


def test_every_arm_is_trained_beside_its_baseline_on_the_same_budget(done):
    pytest.importorskip("sklearn")
    report, out, _ = done
    text, images = report["families"]
    runs = {run["arm"]: run for run in text["runs"]}
    left_out = text["left_out"]
    assert left_out.keys() == {"gstack", "gradmax", "hypercloning", "solar", "staged", "upcycle"}, left_out
    grown = METHODS.keys() - left_out.keys() | {"lemon-carried", "lemon-early"}
    fresh = {"source", "early source", "scratch", *(f"scratch of {name}" for name in MOVED)}
    assert set(runs) == grown | fresh | set(MOVED)
    assert {run["arm"] for run in images["runs"]} == {"source", "scratch", "lemon", "ligo"}
    for run in runs.values():
        if run["group"] != "source":
            assert [point["step"] for point in run["curve"]] == [0, 2, 4]
        if run["baseline"]:
            baseline = runs[run["baseline"]]
            assert baseline["baseline"] is None
            assert (run["parameters"], run["step_flops"]) == (baseline["parameters"], baseline["step_flops"])
            assert 0 < run["noise"] < 1 and run["start"]["seconds"] > 0
        assert run["far"] > 0 and run["sample"].startswith("def ")
    assert runs["lemon"]["lossless"] and not runs["stack"]["lossless"]
    for name in ("lemon-carried", "lemon-early"):
        told = settings(out, name)
        assert told["warmup"] == 0 and told["moments"].endswith("after 6 steps")
    assert [settings(out, name)["schedule"] for name in ("source", "early-source")] == ["cosine", "constant"]
    for of, name in (("source", "lemon"), ("early source", "lemon-early")):
        end = runs[of]["curve"][-1]["loss"]
        assert runs[name]["curve"][0]["loss"] == pytest.approx(end, abs=1e-4)
    assert runs["ligo"]["start"]["flops"] > runs["lemon"]["start"]["flops"]
    for name in MOVED:
        assert runs[name]["start"]["flops"] > 0, "fitting is counted"
        record = json.loads((out / f"work/text/0/start/{name}/growth.json").read_text())
        assert record["align"]["steps"] == 2 and record["flops"] == runs[name]["start"]["flops"]
        told = settings(out, name)
        assert (told["learning_rate"], told["copied_rate"], told["freeze"]) == (5e-3, 0.3, None)
        assert settings(out, f"scratch-of-{name}")["learning_rate"] == 1e-2
        config = json.loads((out / f"work/text/0/trained/scratch-of-{name}/config.json").read_text())
        assert config.get("retention_learned_decay", False) is (name == "retnet-learned")


@pytest.mark.parametrize("scale", LARGER)
def test_every_arm_of_a_scale_is_one_and_grows_to_heads_of_its_source_s_width(scale):
    for numbers in LARGER[scale].families.values():
        assert set(numbers.first) <= set(numbers.arms) <= set(ARMS)
        source, target = numbers.source, numbers.target
        assert source.hidden / source.heads == target.hidden / target.heads


def test_the_larger_scales_have_every_arm_that_there_is():
    assert set(LARGER["laptop"].families["text"].arms) == set(ARMS)


def test_every_checkpoint_works_and_the_report_is_on_disk(done):
    report, out, spoken = done
    assert "text: upcycle left out: hidden-size: " in spoken
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "lemon" in (out / "report.html").read_text(encoding="utf-8")
    for family in report["families"]:
        for told in family["runs"]:
            assert f"{family['name']}: {told['arm']}, seed 0, whole: ended at " in spoken
            folder = out / "work" / told["checkpoint"]
            if family["name"] == "images":
                model = AutoModelForImageClassification.from_pretrained(folder).eval()
                assert digits(4)[1].accuracy(model) == told["accuracy"]
    for name in ("lemon", "hybrid"):
        folder = out / "work/text/0/trained" / name
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer("import ", return_tensors="pt", return_token_type_ids=False)
        text = model.generate(**prompt, max_new_tokens=3, do_sample=False)
        assert tokenizer.decode(text[0]).startswith("import ") and len(text[0]) == 10


def test_every_arm_of_images_trains_by_what_a_vit_takes():
    (images,) = (scale.families["images"] for scale in LARGER.values() if "images" in scale.families)
    used = {type(x) for arm in images.arms for x in ARMS[arm].callbacks(10)}
    assert LayerDropping in used and TokenDropping not in used


def test_without_scikit_learn_the_images_are_left_out_with_a_line_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("growth.demo.digits.there", lambda: False)
    spoken = StringIO()
    text = replace(NUMBERS, arms=("lemon",))
    scale = Scale("toy", {"text": text, "images": IMAGES})
    report = perform(scale, tmp_path / "out", Console(file=spoken, width=100))
    assert [family["name"] for family in report["families"]] == ["text"]
    said = (
        "images: left out, for scikit-learn, which has the digits, is not installed: pip install scikit-learn"
    )
    assert spoken.getvalue().startswith(said + "\n"), "before the first run begins"
    assert (
        said in spoken.getvalue()[len(said) :].replace("\n", "")
        and said in (tmp_path / "out/report.html").read_text()
    )


def test_an_existing_folder_is_refused_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(Refusal, match="expected an output folder that does not exist"):
        perform(TOY, tmp_path, quiet_console())

    def fail(*args, **settings):
        raise RuntimeError("no memory left")

    monkeypatch.setattr("growth.train", fail)
    with pytest.raises(RuntimeError):
        perform(TOY, tmp_path / "out", quiet_console())
    assert list(tmp_path.iterdir()) == []


# ---- a study


class Stop(Exception):
    """After so many runs."""


class Stopping(Console):
    def __init__(self, after: int):
        super().__init__(file=StringIO())
        self.after = after

    def print(self, *args, **how):
        self.after -= 1
        if not self.after:
            raise Stop


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Of the grid alone: each rate more is a run more."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("growth.demo.study.BEYOND", 0)
        yield carried_out_in_two(tmp_path_factory.mktemp("study"))


def carried_out_in_two(out: Path) -> tuple[dict, dict, Path]:
    where = PARTED, "text", out / "work", out / "text.json"
    with pytest.raises(Stop):
        carried_out(*where, Stopping(8), "first", partial(shown, report(), out))
    before = json.loads((out / "text.json").read_text())["families"][0]
    return before, carried_out(*where, quiet_console(), "second"), out


def test_a_study_does_not_go_on_with_other_numbers(study):
    other = replace(PARTED, families={"text": replace(FEW, batch_size=3)})
    with pytest.raises(Refusal, match="those of the same sizes and budgets"):
        carried_out(other, "text", study[2] / "work", study[2] / "text.json", quiet_console())


def test_a_study_goes_on_where_it_ended(study):
    before, after, out = study
    assert len(before["runs"]) + len(before["tried"]) + len(before["pending"]) == 8
    assert before["pending"] and not after["pending"]
    assert after["runs"][: len(before["runs"])] == before["runs"]
    assert after["tried"][: len(before["tried"])] == before["tried"]
    keys = [(run["arm"], run["seed"], run["part"]) for run in after["runs"]]
    assert len(keys) == len(set(keys))
    arms = set(FEW.arms)
    parts = {(arm, seed, part) for arm in arms for seed in (0, 1) for part in ("short", "equal")}
    fresh = ("source", "early source", "scratch", "scratch of hybrid")
    assert set(keys) == parts | {(name, seed, "whole") for name in fresh for seed in (0, 1)}
    assert json.loads((out / "text.json").read_text())["families"][0] == json.loads(json.dumps(after))


def test_what_a_run_rests_on_is_kept_where_a_study_goes_on(study):
    """Its baseline's losses, for the standard error; when and at which commit it was carried out."""
    before, after, out = study
    assert "source" in (out / "report.html").read_text()  # of what had run when it ended
    assert any(run["arm"] == "scratch" for run in before["runs"]), "a baseline of the first call"
    assert all(0 < run["noise"] < 1 for run in after["runs"] if run["baseline"])
    first = len(before["runs"])
    assert {run["made"]["commit"] for run in after["runs"][:first]} == {"first"}
    assert "second" in {run["made"]["commit"] for run in after["runs"][first:]}


def test_a_study_goes_on_with_the_same_text_alone(study, tmp_path):
    told, work = study[1], tmp_path / "work"

    def kept(**changed):
        (tmp_path / "text.json").write_text(json.dumps(report(told | changed, commit="old")))
        return carried_out(PARTED, "text", work, tmp_path / "text.json", quiet_console())

    assert kept(corpus="other") == told | {"corpus": "other"}  # nothing is left to do
    with pytest.raises(Refusal, match="results of text: expected those of the same text"):
        kept(corpus="other", runs=told["runs"][:-1])
    older = [{key: x for key, x in run.items() if key != "made"} for run in told["runs"]]
    found = kept(runs=older)["runs"]
    assert {run["made"]["commit"] for run in found} == {"old"}


def test_every_rate_is_the_best_of_those_that_were_tried(study):
    _, told, _ = study
    for run in told["runs"]:
        arm = "source" if run["arm"] == "early source" else run["arm"]
        tried = {x["rate"]: x["loss"] for x in told["tried"] if x["arm"] == arm}
        assert tried.keys() == set(FEW.rates) and run["rate"] == min(tried, key=tried.get)


def test_the_grid_goes_on_from_the_edge_that_is_best():
    def trials(**losses: float | None) -> list[dict]:
        return [
            {"rate": float(rate[1:])}
            | ({"failed": "diverged"} if loss is None else {"curve": [{"loss": loss}]})
            for rate, loss in losses.items()
        ]

    assert beyond(trials(r1=3.0, r2=2.0, r4=2.5)) is None
    assert beyond(trials(r1=3.0, r2=2.0)) == 4.0 and beyond(trials(r2=3.0, r1=2.0)) == 0.5
    assert beyond(trials(r1=3.0, r2=2.0, r4=None)) is None and beyond(trials(r1=None)) is None
    assert beyond(trials(r2=1.0)) == 1.0 and beyond(trials(r2=1.0, r1=2.0)) == 4.0


def test_a_study_that_was_ended_tries_no_more_rates_than_another(monkeypatch):
    monkeypatch.setattr("growth.demo.study.BEYOND", 3)

    class Falling(Study):
        def __init__(self, pending: list[dict]):
            self.numbers, self.told = FEW, {"pending": pending}

        def attempt(self, arm, part, rate):
            if all(x["rate"] != rate for x in self.pending(arm)):
                self.told["pending"].append({"arm": arm, "rate": rate, "curve": [{"loss": -rate}]})

    whole = Falling([])
    whole.attempt_all("lemon", "short")
    assert len(whole.pending("lemon")) == len(FEW.rates) + 3
    for done in range(len(whole.pending("lemon"))):
        again = Falling(whole.pending("lemon")[:done])
        again.attempt_all("lemon", "short")
        assert again.told == whole.told


def test_an_arm_of_equal_compute_costs_what_its_baseline_does(study):
    _, told, _ = study
    whole = {
        (run["arm"], run["seed"]): run["curve"][-1]["flops"] for run in told["runs"] if not run["baseline"]
    }
    for run in told["runs"]:
        if run["part"] == "equal":
            cost, limit = (
                run["start"]["flops"] + run["curve"][-1]["flops"],
                whole[run["baseline"], run["seed"]],
            )
            assert limit - 1.5 * run["step_flops"] < cost <= limit + run["step_flops"], run["arm"]


def test_only_sources_are_kept(study):
    _, _, out = study
    kept = {str(file.parent.relative_to(out / "work/text")) for file in out.rglob("model.safetensors")}
    assert kept == {f"{seed}/trained/{name}" for seed in (0, 1) for name in ("source", "early-source")}


def test_a_source_that_is_lost_is_trained_again_to_the_same(study, tmp_path):
    _, told, out = study
    some = replace(FEW, arms=("lemon",))
    scale = replace(PARTED, families={"text": some}, seeds=(0,))
    missing = [run for run in told["runs"] if (run["arm"], run["part"]) != ("lemon", "equal")]
    report = json.loads((out / "text.json").read_text()) | {"families": [told | {"runs": missing}]}
    (tmp_path / "text.json").write_text(json.dumps(report))
    again = carried_out(scale, "text", tmp_path / "work", tmp_path / "text.json", quiet_console())
    ends = [
        [x["curve"][-1]["loss"] for x in runs if (x["arm"], x["seed"], x["part"]) == key]
        for runs in (told["runs"], again["runs"])
        for key in (("source", 0, "whole"), ("lemon", 0, "equal"))
    ]
    assert ends[0] == ends[2] and ends[1] == ends[3] and all(len(end) == 1 for end in ends)


def test_a_masked_model_has_its_arms_too(tmp_path):
    numbers = replace(FEW, model="bert", source=Size(2, 16, 2), target=Size(3, 32, 4), arms=("lemon",))
    numbers = replace(numbers, budgets=NUMBERS.budgets, rates=())
    told = carried_out(Scale("toy", {"masked": numbers}), "masked", tmp_path, None, quiet_console())
    runs = {run["arm"]: run for run in told["runs"]}
    assert runs.keys() == {"source", "scratch", "lemon"} and "sample" not in runs["lemon"]
    end = runs["source"]["curve"][-1]["loss"]
    assert runs["lemon"]["curve"][0]["loss"] == pytest.approx(end, abs=1e-4)
    assert 0 < runs["lemon"]["noise"] < 1


def test_a_rate_that_diverges_is_left_and_the_study_goes_on(tmp_path, monkeypatch):
    done = Runs.done

    def diverging(runs, run):
        if run.trial and run.budget.rate == FEW.rates[0]:
            raise NotFinite(2, "nan")
        return done(runs, run)

    monkeypatch.setattr(Runs, "done", diverging)
    monkeypatch.setattr("growth.demo.study.BEYOND", 0)
    scale = replace(PARTED, families={"text": replace(FEW, arms=("lemon",))}, seeds=(0,))
    told = carried_out(scale, "text", tmp_path / "work", tmp_path / "text.json", quiet_console())
    assert {run["rate"] for run in told["runs"]} == {x["rate"] for x in told["tried"]} == {FEW.rates[1]}
    monkeypatch.setattr(Runs, "done", None)  # nothing is left to do
    assert told == carried_out(scale, "text", tmp_path / "none", tmp_path / "text.json", quiet_console())


def test_two_processes_do_not_work_on_one_study(tmp_path):
    (tmp_path / "work/text").mkdir(parents=True)
    with alone_in(tmp_path / "work/text"), pytest.raises(Refusal, match="still going on"):
        carried_out(PARTED, "text", tmp_path / "work", tmp_path / "text.json", quiet_console())


def test_a_study_that_was_ended_before_its_first_result_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    (out / ".text.json.1f").touch()  # killed as it wrote
    monkeypatch.setattr("growth.demo.job.report_of", lambda *how: full())
    assert perform(PARTED, out, quiet_console())["families"]
    (out / "mine.txt").touch()
    with pytest.raises(Refusal, match="a new folder, or one that such a run was ended in"):
        perform(PARTED, out, quiet_console())


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"families": []}', '{"families": [{}]}'])
def test_damaged_results_are_refused(tmp_path, damage):
    (tmp_path / "text.json").write_text(damage)
    with pytest.raises(Refusal, match="text.json"):
        carried_out(PARTED, "text", tmp_path / "work", tmp_path / "text.json", quiet_console())
