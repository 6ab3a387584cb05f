"""Every verb's inputs, drawn: a call works, or is refused in one line, and writes nothing then.

How many calls each test makes: one for SHARE of pytest's --calls, or SAMPLE; these are the same every time.
"""

import json
from dataclasses import fields

import pytest
import torch
from checkpoints import ALL
from command import run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from outputs import error
from outputs import run as outputs
from typer.main import get_command

import growth
from growth.cli.app import app
from growth.errors import Refusal
from growth.growing import grow
from growth.loading import quiet
from growth.methods import METHODS

SAMPLE = 25
SHARE = 20  # a verb takes many times what an op does
NAMES = ("gpt_neox", "gpt2", "llama", "gemma2", "bert", "mixtral", "granitemoehybrid", "lci RAM", "t5")
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
    """Runs a property as often as is asked for, on examples that the seed gives."""
    calls = request.config.getoption("--calls") // SHARE or SAMPLE

    def check(strategy, claim):
        own = {"max_examples": calls, "derandomize": True, "database": None, "deadline": None}
        own["phases"] = [Phase.generate]  # the first failure is small as it is
        own["suppress_health_check"] = [*HealthCheck]
        settings(**own)(given(strategy)(claim))()

    return check


def served(call):
    """What a call gives, None where it refuses in one line with a remedy."""
    try:
        return call()
    except Refusal as refusal:
        assert "; " in str(refusal) and len(str(refusal).splitlines()) == 1, str(refusal)
        return None


def test_growth_by_any_method_works_or_is_refused_and_keeps_its_promise(sources, fuzzed, tmp_path):
    kinds, written = {x.name: x.annotation for x in fields_of(grow)}, iter(range(10**9))

    def claim(data):
        name = data.draw(st.sampled_from(NAMES))
        method = METHODS[data.draw(st.sampled_from([*METHODS]))]
        known = data.draw(st.lists(st.sampled_from(fields(method)), max_size=3)) if fields(method) else []
        options = {x.name: drawn(x.type, data) for x in known if x.name != "data"}
        asked = {x: data.draw(sizes) for x in kinds if x.startswith(("hidden", "num", "ffn"))}
        others = ("allow_lossy", "dtype", "shard_bytes", "seed", "policy")
        asked |= {x: drawn(kinds[x], data) for x in data.draw(st.lists(st.sampled_from(others), max_size=1))}
        folder, truth = sources(name)

        def call(dst=None):
            return grow(folder, dst, method=method(**options), **asked, dry_run=dst is None)

        report = served(call)
        if report and report.lossless and data.draw(st.integers(0, 3)) == 0:
            dst = tmp_path / str(next(written))
            if served(lambda: call(dst)):
                apart = error(truth, outputs(dst, torch.float64)[1])
                rounded = asked.get("dtype") not in (None, "float64")
                assert apart < (0.5 if rounded else 1e-9), (name, method, options, asked, apart)
            else:
                assert not dst.exists()

    fuzzed(st.data(), claim)


def fields_of(verb):
    from inspect import signature

    return signature(verb).parameters.values()


@pytest.mark.parametrize("verb", ["shrink", "transfer"])
def test_other_verbs_work_or_refuse(sources, fuzzed, verb):
    call = getattr(growth, verb)
    kinds = {x.name: x.annotation for x in fields_of(call)}
    left_out = {"src", "dst", "sizes", "data", "cache", "dry_run", "text_field"}

    def claim(data):
        folder, _ = sources(data.draw(st.sampled_from(NAMES)))
        names = data.draw(st.lists(st.sampled_from(sorted(kinds.keys() - left_out)), max_size=4, unique=True))
        sized = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size", "experts")
        asked = {x: data.draw(sizes) if x in sized else drawn(kinds[x], data) for x in names}
        served(lambda: call(folder, **asked, dry_run=True))

    fuzzed(st.data(), claim)


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

    fuzzed(st.data(), claim)


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

    fuzzed(st.data(), claim)
