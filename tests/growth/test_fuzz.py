"""Every verb's inputs, drawn: a call works, or is refused in one line, and writes nothing then.

Two of three fit (tests/fitting.py). What small results hold is compared with tests/by_maps.py, in float64.
How many calls each test makes: one for SHARE of pytest's --calls, or SAMPLE; these are the same every time.
The end of pytest's output has how many were written, refused and compared.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from pathlib import Path
from random import Random
from typing import Any

import by_maps
import fitting
import pytest
import torch
from by_maps import opened
from checkpoints import ALL
from command import run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from outputs import error
from outputs import run as outputs
from safetensors.torch import load_file
from typer.main import get_command

import growth
from growth.cli.app import app
from growth.errors import Refusal
from growth.growing import Growth, grow
from growth.loading import quiet
from growth.methods import METHODS, Method
from growth.methods.learning import Learning
from growth.sizes import Sizes
from growth.training.progress import RunProgress
from growth.training.trainer import train

SAMPLE = 25
SHARE = 20  # a verb takes many times what an op does
LARGE = 2_000_000  # parameters of a result that is only planned
NAMES = ("gpt_neox", "gpt2", "llama", "gemma2", "bert", "mixtral", "granitemoehybrid", "lci RAM", "t5")
DECODERS = ("gpt_neox", "llama", "gemma2", "granitemoehybrid", "lci RAM")  # they transfer and train
WORDS = ("", " ", "x", "a b", "\n", "*", "../x", "é", "none", "-1", "0", "lemon", "auto:2", "RRR", "1,2")
NUMBERS = (-(10**20), -1, 0, 1, 2, 3, 4, 5, 6, 8, 64, 96, 128, 192, 2**31, 2**64, 10**30)
REALS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-300, 0.1, 0.5, 1.0, 1.5, 1e300)
CHOSEN = """projection comp aki fpi append alternate identity copy idle nearest linear mean max lossless
    net2net published auto always never granitemoehybrid mixtral qwen2_moe qwen3_moe retnet alibi learned
    norms mlp output all lci fla retention mamba mamba2 attention magnitude activation redundancy float32
    bfloat16""".split()

numbers = st.one_of(st.sampled_from(NUMBERS), st.integers(-3, 300))
reals = st.one_of(st.sampled_from(REALS), st.floats())
words = st.one_of(st.sampled_from(CHOSEN), st.sampled_from(WORDS), st.text(max_size=9))
lists = st.lists(st.one_of(st.integers(-1, 4), numbers), max_size=5).map(tuple)
odd = st.one_of(numbers, reals, words, lists, st.none(), st.booleans(), st.just({}), st.just([None]))
sizes = st.one_of(st.none(), st.none(), st.sampled_from((3, 4, 5, 6, 8, 64, 80, 96, 128, 192)), numbers)


def drawn(kind, data):
    """A value for something that is told by this type; one time in ten of any other."""
    if data.draw(st.integers(0, 9)) == 0:
        return data.draw(odd)
    held = set(str(kind).replace("|", " ").replace(",", " ").split())
    of = {
        "int": numbers,
        "float": reals,
        "bool": st.booleans(),
        "str": words,
        "Index": lists,
        "None": st.none(),
    }
    found = [of[name] for name in of if name in held or getattr(kind, "__name__", "") == name]
    return data.draw(st.one_of(found or [lists, words]))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> the folder of such a checkpoint in float64, and what it gives."""
    made = {}

    def make(name):
        if name not in made:
            with quiet():
                folder = ALL[name](tmp_path_factory.mktemp("source") / "src", torch.float64)
            made[name] = folder, outputs(folder, torch.float64)[1]
        return made[name]

    return make


@pytest.fixture(scope="module")
def fuzzed(request):
    """Runs a property as often as is asked for, on examples that the seed gives.

    odd: of what Hypothesis draws. fits: of a generator and the number of the call; it has two thirds of them.
    share: one of so many calls is made.
    """
    calls = request.config.getoption("--calls") // SHARE or SAMPLE

    def check(odd, fits=None, share=1):
        fitting = 2 * calls // share // 3 if fits else 0
        drawn = calls // share - fitting
        own = {"max_examples": drawn, "derandomize": True, "database": None, "deadline": None}
        own["phases"] = [Phase.generate]  # the first failure is small as it is
        own["suppress_health_check"] = [*HealthCheck]
        settings(**own)(given(st.data())(odd))()
        for number in range(fitting):
            fits(Random(number), number)

    return check


@pytest.fixture
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tally(record_property):
    """What became of the calls."""
    found = Counter()
    yield found
    record_property("tally", ", ".join(f"{n:,} {what}" for what, n in found.items()))


class PowerCut(Exception):
    pass


def cut_at(step, now):
    if now == step:
        raise PowerCut


def served(call):
    """What a call gives, None where it refuses in one line with a remedy."""
    try:
        return call()
    except Refusal as refusal:
        assert "; " in str(refusal) and len(str(refusal).splitlines()) == 1, str(refusal)
        return None


def asked_of(verb: Callable, *left_out: str) -> dict[str, Any]:
    """What it can be told, and of which type that is."""
    kinds = {x.name: x.annotation for x in signature(verb).parameters.values()}
    return {x: kinds[x] for x in kinds if x not in ("src", "dst", "sizes", "data", "dry_run", *left_out)}


def told(kinds: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """Some of that; one time in ten of another type."""
    names = data.draw(st.lists(st.sampled_from(sorted(kinds)), max_size=4, unique=True))
    sized = (*fitting.SIZED, "experts")
    return {x: data.draw(sizes) if x in sized else drawn(kinds[x], data) for x in names}


def tried(call: Callable, place: Path, tally: Counter) -> tuple[Any, Path] | None:
    """The report and the folder of a call that is served, and whose result is small.

    One that is refused leaves nothing, whether it is to write or not.
    """
    dst = place / "dst"
    shutil.rmtree(dst, ignore_errors=True)
    planned = served(lambda: call(None))
    tally["calls"] += 1
    if planned and planned.parameters[1] > LARGE:
        tally["too large"] += 1
        return None
    report = served(lambda: call(dst))
    assert [*place.iterdir()] == [dst] * (report is not None)
    assert planned or not report
    tally["written" if report else "refused"] += 1
    return report and (report, dst)


def test_what_grows_is_what_the_maps_say_and_computes_the_same_where_that_is_promised(
    sources, fuzzed, tmp_path, tally
):
    kinds = asked_of(grow, "method", "optimizer")

    def claim(name, method, options, asked):
        folder, truth = sources(name)

        def call(dst=None):
            return grow(folder, dst, method=method(**options), **asked, dry_run=dst is None)

        if not (done := tried(call, tmp_path, tally)):
            return
        report, dst = done
        got, said = outputs(dst, torch.float64)[1], (name, method, options, asked)
        assert all(x.isfinite().all() for x in got), said
        if report.lossless and method.name != "msg":  # whose masks are not in the file
            rounded = {row.dtype for row in report.plan.rows} != {"float64"}
            assert error(truth, got) < (0.5 if rounded else 1e-9), said
            tally["same outputs"] += 1
        of = growth_of(folder, method(**options), asked)
        learned = isinstance(of.method, Learning) and of.method.learned
        tally["numbers by the maps"] += 0 if learned else by_maps.grown(of, dst, report.plan)

    def odd(data):
        method = METHODS[data.draw(st.sampled_from([*METHODS]))]
        known = data.draw(st.lists(st.sampled_from(fields(method)), max_size=3)) if fields(method) else []
        options = {x.name: drawn(x.type, data) for x in known if x.name != "data"}
        claim(data.draw(st.sampled_from(NAMES)), method, options, told(kinds, data))

    def fits(random, number):
        name, method = random.choice(NAMES), random.choice([*METHODS.values()])
        options, asked = fitting.growing(random, opened(sources(name)[0]), method)
        claim(name, method, options, asked | {"allow_lossy": True, "seed": number})

    fuzzed(odd, fits)
    assert tally["written"] >= tally["calls"] // 4 and tally["same outputs"] >= tally["calls"] // 25


def growth_of(folder: Path, method: Method, asked: dict) -> Growth:
    wanted = Sizes(*(asked.get(x) for x in fitting.SIZED))
    return Growth.of(opened(folder), wanted, method, asked.get("seed", 0), None, None)


def test_what_is_shrunk_has_the_units_that_stay_as_they_were(sources, fuzzed, cache, tmp_path, tally):
    kinds = asked_of(growth.shrink, "cache", "text_field")

    def claim(name, asked):
        folder, _ = sources(name)
        done = tried(lambda dst: growth.shrink(folder, dst, **asked, dry_run=dst is None), tmp_path, tally)
        if done:
            report, dst = done
            assert all(x.isfinite().all() for x in outputs(dst, torch.float64)[1]), (name, asked)
            tally["numbers as they were"] += by_maps.shrunk(opened(folder), dst, report.plan)

    def odd(data):
        claim(data.draw(st.sampled_from(NAMES)), told(kinds, data))

    def fits(random, number):
        name = random.choice(NAMES)
        claim(name, fitting.shrinking(random, opened(sources(name)[0]), cache))

    fuzzed(odd, fits)
    assert tally["written"] >= tally["calls"] // 4


def test_what_is_transferred_has_what_is_copied_as_it_was(sources, fuzzed, tmp_path, tally):
    kinds = asked_of(growth.transfer, "text_field")

    def claim(name, asked):
        folder, truth = sources(name)
        done = tried(lambda dst: growth.transfer(folder, dst, **asked, dry_run=dst is None), tmp_path, tally)
        if not done or asked.get("format") == "fla":  # which another library loads
            return
        report, dst = done
        got = outputs(dst, torch.float64)[1]
        assert all(x.isfinite().all() for x in got), (name, asked)
        if report.lossless:
            assert error(truth, got) < 1e-9, (name, asked)
            tally["same outputs"] += 1
        if asked.get("format", "lci") == "lci":
            tally["numbers as they were"] += by_maps.transferred(opened(folder), dst, report.plan)

    def odd(data):
        claim(data.draw(st.sampled_from(NAMES)), told(kinds, data))

    def fits(random, number):
        name = random.choice(DECODERS)
        claim(name, fitting.transferring(random, opened(sources(name)[0])))

    fuzzed(odd, fits)
    assert tally["written"] >= tally["calls"] // 4


def test_what_trains_goes_on_as_if_it_had_not_stopped(sources, fuzzed, tmp_path, tally, monkeypatch):
    """A quarter of the calls: each is three runs of three steps."""
    kinds = asked_of(train, "model", "out", "steps", "callbacks", "text_field", "resume", "report_to", "fsdp")

    def claim(name, asked, cut):
        folder, _ = sources(name)
        words = fitting.words(opened(folder).config.vocab_size)
        whole, broken = (tmp_path / x for x in ("whole", "broken"))
        for path in (whole, broken):
            shutil.rmtree(path, ignore_errors=True)
        tally["calls"] += 1
        if not served(lambda: train(folder, words, whole, **asked)):
            tally["refused"] += 1
            assert not [*tmp_path.iterdir()], (name, asked)
            return
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            patch.setattr(RunProgress, "step", lambda self, now: cut_at(cut, now))
            train(folder, words, broken, **asked)
        train(folder, words, broken, **asked, resume=True)
        want, got = (load_file(path / "model.safetensors") for path in (whole, broken))
        assert want.keys() == got.keys(), (name, asked)
        assert all(x.equal(got[of]) for of, x in want.items()), (name, asked)
        assert all(x.isfinite().all() for x in outputs(broken, torch.float64)[1]), (name, asked)
        tally["resumed"] += 1

    def odd(data):
        asked = {"steps": 2, "save_every": 1, "batch_size": 2} | told(kinds, data)
        claim(data.draw(st.sampled_from(NAMES)), asked, 2)

    def fits(random, number):
        name = random.choice(DECODERS)
        claim(name, fitting.training(random, sources(name)[0]), random.choice((2, 3)))

    fuzzed(odd, fits, 4)
    assert tally["resumed"] >= tally["calls"] // 4


FLAGS = {
    name: [
        x
        for x in command.params
        if x.param_type_name == "option" and x.name not in ("dry_run", "recipe", "cache")
    ]
    for name, command in get_command(app).commands.items()
    if name in ("inspect", "grow", "shrink", "transfer", "train", "check")
}


def typed(flag, data):
    """A flag as it might be typed."""
    if flag.is_flag:
        return [data.draw(st.sampled_from([*flag.opts, *flag.secondary_opts]))]
    value = data.draw(st.one_of(numbers, reals, words, lists, st.sampled_from(["{text}", "{src}"])))
    value = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [f"{flag.opts[0]}={value}"]


@pytest.mark.parametrize("verb", FLAGS)
def test_the_command_line_works_or_refuses(sources, fuzzed, verb, text, tmp_path, monkeypatch, capsys):
    """Of train a run would take a second: it is given no data, or none that are enough."""
    monkeypatch.chdir(tmp_path)
    few = tmp_path / "few.txt"
    few.write_text("few")

    def claim(data):
        src, _ = sources(data.draw(st.sampled_from(NAMES)))
        flags = data.draw(st.lists(st.sampled_from(FLAGS[verb]), max_size=4))
        words = [
            word.replace("{text}", str(few)).replace("{src}", str(src))
            for x in flags
            for word in typed(x, data)
        ]
        given = [word.replace("\0", "") for word in words if "--recipe" not in word]
        places = {"inspect": [src], "check": [src, src], "train": [src]}.get(verb, [src])
        whole = {"train": ["--data", few, "--out", "out", "--steps", "2"], "check": [], "inspect": []}
        before = sorted(tmp_path.rglob("*"))
        code, _, err = run(monkeypatch, capsys, verb, *whole.get(verb, ["--dry-run"]), *given, *places)
        assert code in (0, 2), (code, given, err)
        assert code == 0 or len([x for x in err.splitlines() if x.startswith("growth: ")]) == 1, (given, err)
        assert code == 0 or "Traceback" not in err, err
        assert sorted(tmp_path.rglob("*")) == before, given

    fuzzed(claim)


scalars = st.one_of(st.none(), st.booleans(), st.integers(-9, 300), reals, words)
values = st.recursive(
    scalars, lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(words, x, max_size=3)), max_leaves=6
)
options = st.dictionaries(
    st.one_of(st.sampled_from(sorted({x.opts[0][2:] for of in FLAGS.values() for x in of})), words),
    values,
    max_size=3,
)
steps = st.one_of(
    st.dictionaries(
        st.one_of(st.sampled_from([*FLAGS]), words), st.one_of(options, values), min_size=1, max_size=1
    ),
    st.sampled_from(["check", "grow"]),
    values,
)
recipes = st.one_of(
    values,
    st.fixed_dictionaries({"steps": st.one_of(st.lists(steps, min_size=1, max_size=4), values)}),
    st.fixed_dictionaries({"steps": st.lists(steps, max_size=2), "source": values}),
)


def test_a_recipe_works_or_is_refused(sources, fuzzed, tmp_path):
    """As what a file of YAML holds, and as a file of any text."""
    src, file = sources("gpt_neox")[0], tmp_path / "recipe.yaml"

    def claim(data):
        recipe = data.draw(recipes)
        if isinstance(recipe, dict):
            served(lambda: growth.run_recipe(recipe, src=src, dry_run=True))
        text = json.dumps(recipe) if data.draw(st.booleans()) else data.draw(st.text(max_size=60))
        file.write_text(text, encoding="utf-8", errors="ignore")
        served(lambda: growth.run_recipe(file, src=src, dry_run=True))

    fuzzed(claim)
