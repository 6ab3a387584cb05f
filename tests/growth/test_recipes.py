"""Recipes: what a chain of verbs makes, what is refused before it runs, what is kept where a step fails."""

import json
import shutil

import command
import pytest
import torch
import yaml
from checkpoints import ALL, neox
from safetensors.torch import load_file

import growth
from growth.errors import Refusal
from growth.recipes import running
from growth.recipes.commands import Commands
from growth.training.callbacks import TokenDropping

TRAIN = {"steps": 2, "batch-size": 2, "sequence-length": 16}


@pytest.fixture
def src(tmp_path):
    return neox(tmp_path / "src")


def written(folder, steps, **more):
    """A file of these steps."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(more | {"steps": steps}))
    return file


def chain(text):
    return [
        {"grow": {"method": "lemon", "hidden_size": 120}},
        {"train": TRAIN | {"data": str(text), "learning-rate": "1e-3"}},
        {"grow": {"method": "llama-pro", "insert": [0, 2], "noise": 0.5}},
        {"train": TRAIN | {"data": str(text), "freeze": "transferred", "teacher": "$source", "seed": 3}},
    ]


def bytes_of(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory, text):
    """A source, and what the chain of steps makes of it."""
    folder = tmp_path_factory.mktemp("made")
    src = neox(folder / "src")
    growth.run_recipe(written(folder, chain(text), source=str(src)), folder / "out")
    return src, folder / "out"


def test_a_recipe_makes_what_its_steps_make_one_by_one(made, text, tmp_path):
    src, out = made
    growth.grow(src, tmp_path / "1", method="lemon", hidden_size=120)
    how = {"steps": 2, "batch_size": 2, "sequence_length": 16}
    growth.train(tmp_path / "1", text, tmp_path / "2", learning_rate=1e-3, **how)
    growth.grow(tmp_path / "2", tmp_path / "3", method=growth.LlamaPro(insert="0,2", noise=0.5))
    growth.train(tmp_path / "3", text, tmp_path / "4", freeze="transferred", teacher=src, seed=3, **how)
    assert bytes_of(out) == bytes_of(tmp_path / "4")
    assert {x.name for x in out.parent.iterdir()} == {"src", "out", "recipe.yaml"}
    record = json.loads((out / "growth.json").read_text())
    assert record["recipe"]["source"] == str(src)
    assert [x["verb"] for x in record["lineage"]] == ["grow", "train"] and record["verb"] == "grow"
    card = (out / "README.md").read_text()
    assert card.startswith('---\nbase_model: "src"') and 'from_pretrained("out")' in card


@pytest.mark.parametrize(
    "recorded", [True, False], ids=["the recorded one", "one put together from the calls"]
)
def test_a_printed_recipe_makes_the_same_bytes_again(made, tmp_path, monkeypatch, capsys, recorded):
    out = shutil.copytree(made[1], tmp_path / "out")
    if not recorded:
        record = json.loads((out / "growth.json").read_text())
        del record["recipe"]
        (out / "growth.json").write_text(json.dumps(record))
    capsys.readouterr()
    code, printed, _ = command.run(monkeypatch, capsys, "inspect", out, "--recipe")
    assert code == 0 and ("$source" in printed) == recorded
    (tmp_path / "again.yaml").write_text(printed)
    words = "grow", tmp_path / "again", "--recipe", tmp_path / "again.yaml"
    code, told, err = command.run(monkeypatch, capsys, *words)
    assert code == 0 and told.splitlines()[-1] == f"{tmp_path / 'again'}: 4 steps", err
    assert bytes_of(tmp_path / "again") == bytes_of(made[1])
    code, printed, _ = command.run(monkeypatch, capsys, "inspect", tmp_path / "again", "--recipe", "--json")
    assert code == 0 and len(json.loads(printed)["steps"]) == 4


def test_an_optimizer_that_is_carried_along_and_a_shrink_are_steps_too(src, text, tmp_path):
    steps = [
        {"train": TRAIN | {"data": str(text), "schedule": "constant"}},
        {"grow": {"method": "lemon", "hidden-size": 192, "optimizer": "$model"}},
        {"train": TRAIN | {"data": str(text), "schedule": "lemon", "resume": True}},
        {"shrink": {"hidden-size": 96, "data": str(text), "windows": 4, "sequence-length": 16}},
    ]
    growth.run_recipe({"source": str(src), "steps": steps}, tmp_path / "out")
    trained = json.loads((tmp_path / "out" / "growth.json").read_text())["lineage"][-1]
    assert trained["verb"] == "train" and trained["moments"].endswith("after 2 steps")
    for file in ("growth.json", "training.json"):
        if (path := tmp_path / "out" / file).exists():
            told = json.loads(path.read_text())
            told.pop("recipe", None)
            path.write_text(json.dumps(told))
    again = growth.recipe_of(tmp_path / "out")
    assert [step.verb for step in again.steps] == ["train", "grow", "train", "shrink"]
    assert again.steps[1].options["optimizer"] == "$model" and again.steps[2].options["resume"] is True
    growth.run_recipe(again, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")


CALLS = {
    "stack": ("neox", {"method": "stack", "num-layers": 5, "noise": 0.3, "dtype": "bfloat16"}),
    "an order": ("neox", {"method": "net2net", "order": "0,1,1,2", "hidden-size": 192, "seed": 7}),
    "groups": ("llama", {"num-heads": 8, "num-kv-heads": 4, "hidden-size": 128}),
    "copies": ("gpt2", {"method": "interpolate", "num-layers": 6, "copy-noise": 0.1, "zero-outputs": True}),
    "lossy": ("bert", {"hidden-size": 80, "allow-lossy": True}),
    "experts": ("llama", {"method": "upcycle", "experts": 3, "granularity": 2, "top-k": 1}),
    "more experts": ("mixtral", {"method": "upcycle", "experts": 10}),
    "a wider mixture": ("mixtral", {"hidden-size": 128, "num-layers": 4}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_single_call_is_told_as_a_recipe(tmp_path, monkeypatch, capsys, name):
    family, options = CALLS[name]
    src = neox(tmp_path / "src") if family == "neox" else ALL[family](tmp_path / "src")
    flags = (
        word for flag, x in options.items() for word in ([f"--{flag}"] if x is True else [f"--{flag}", x])
    )
    assert command.run(monkeypatch, capsys, "grow", src, tmp_path / "out", *flags)[0] == 0
    recipe = growth.recipe_of(tmp_path / "out")
    growth.run_recipe(recipe.json(), tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")
    kept = recipe.steps[0].options
    assert (
        recipe.source == str(src)
        and {flag: kept[flag] for flag in options if flag != "order"}.items() <= {**options}.items()
    )


def test_transfer_and_training_alone_are_told_too(src, text, tmp_path):
    growth.transfer(src, tmp_path / "moved", pattern="RAM", copy="norms", seed=2)
    growth.train(tmp_path / "moved", text, tmp_path / "out", steps=2, batch_size=2, sequence_length=16)
    recipe = growth.recipe_of(tmp_path / "out")
    assert [step.verb for step in recipe.steps] == ["transfer", "train"]
    assert recipe.steps[0].options == {"pattern": "RAM", "copy": "norms", "seed": 2}
    growth.run_recipe(recipe.json(), tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")
    alone = [{"train": TRAIN | {"data": str(text)}}, {"train": TRAIN | {"data": str(text), "seed": 1}}]
    growth.run_recipe({"steps": alone}, tmp_path / "trained", src)
    assert growth.recipe_of(tmp_path / "trained").json() == {"source": str(src), "steps": alone}
    told = json.loads((tmp_path / "trained" / "training.json").read_text())
    del told["recipe"]
    (tmp_path / "trained" / "training.json").write_text(json.dumps(told))
    assert [step.options["seed"] for step in growth.recipe_of(tmp_path / "trained").steps] == [0, 1]


def test_a_learned_method_is_told_with_its_data(src, text, tmp_path):
    method = growth.Ligo(data=str(text), steps=2, batch_size=2, sequence_length=16, learn=("depth.*",))
    growth.grow(src, tmp_path / "out", method=method, num_layers=4)
    options = growth.recipe_of(tmp_path / "out").steps[0].options
    assert options["data"] == str(text) and options["learn"] == ["depth.*"] and options["steps"] == 2
    growth.run_recipe(growth.recipe_of(tmp_path / "out"), tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")


def test_training_goes_on_with_the_state_that_a_step_grew(src, text, tmp_path):
    train = TRAIN | {"data": str(text), "schedule": "constant"}
    grow = {"grow": {"hidden-size": 192, "optimizer": "$model"}}
    steps = [{"train": train}, grow, {"train": train | {"resume": True}}]
    growth.run_recipe({"steps": steps}, tmp_path / "out", src)
    state = torch.load(tmp_path / "out" / "optimizer.pt")["state"]
    assert {int(x["step"]) for x in state.values()} == {4}
    told = json.loads((tmp_path / "out" / "growth.json").read_text())
    del told["recipe"]
    (tmp_path / "out" / "growth.json").write_text(json.dumps(told))
    again = growth.recipe_of(tmp_path / "out")
    assert again.steps[1].options["optimizer"] == "$model" and again.steps[2].options["resume"] is True
    growth.run_recipe(again, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")


SHRUNK = {
    "by activation": {"hidden-size": 72, "score": "activation", "windows": 3, "sequence-length": 16},
    "layers by name": {"layers": [0, 2], "ffn-size": 80, "windows": 2, "sequence-length": 16},
    "layers by score, unmerged": {"num-layers": 2, "merge": False, "score": "redundancy", "windows": 2},
}


@pytest.mark.parametrize("name", SHRUNK)
def test_shrinking_and_dropping_are_told_too(src, text, tmp_path, name):
    dropping = TRAIN | {"data": str(text), "drop-layers": 0.3, "drop-tokens": 0.2}
    steps = [{"shrink": SHRUNK[name] | {"data": str(text)}}, {"grow": {"num-layers": 4}}, {"train": dropping}]
    growth.run_recipe({"steps": steps}, tmp_path / "out", src)
    told = json.loads((tmp_path / "out" / "growth.json").read_text())
    del told["recipe"]
    (tmp_path / "out" / "growth.json").write_text(json.dumps(told))
    again = growth.recipe_of(tmp_path / "out")
    assert [step.verb for step in again.steps] == ["shrink", "grow", "train"]
    assert {"drop-layers": 0.3, "drop-tokens": 0.2}.items() <= again.steps[2].options.items()
    growth.run_recipe(again, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")


def test_stages_of_mslt_are_a_recipe(src, text, tmp_path):
    """As the method's file has them."""
    train, alone = (TRAIN | {"data": str(text)} | more for more in ({}, {"freeze": "transferred"}))
    steps = [{"grow": {"method": "mslt", "num-layers": 4}}, {"train": alone}]
    steps += [{"grow": {"method": "mslt", "num-layers": 6}}, {"train": alone}, {"train": train}]
    growth.run_recipe({"source": str(src), "steps": steps}, tmp_path / "out")
    first, last = load_file(src / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert any(".layers.5." in name for name in last)
    assert all(not torch.equal(x, last[name]) for name, x in first.items() if x.ndim == 2)


def test_another_source_than_the_recipe_s_is_said(src, tmp_path, capsys):
    other = tmp_path / "other"
    other.symlink_to(src)
    for source, line in (
        (src, ""),
        (other, ""),
        (tmp_path / "no", f"recipe: begins with {src}, in the place of its source {tmp_path / 'no'}\n"),
    ):
        growth.run_recipe({"source": str(source), "steps": [GROW]}, src=src, dry_run=True)
        assert capsys.readouterr().err == line


def test_check_is_a_step_that_stops_where_a_promise_does_not_hold(src, tmp_path, monkeypatch, capsys):
    steps = [{"grow": {"hidden-size": 120}}, "check", {"grow": {"num-layers": 5}}, {"check": {}}]
    recipe = written(tmp_path, steps)
    code, out, _ = command.run(monkeypatch, capsys, "grow", src, tmp_path / "out", "--recipe", recipe)
    assert code == 0 and out.count(": kept") == 2
    assert "kept" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr("growth.checking.LIMIT", {"grow": -1.0})
    code, _, err = command.run(monkeypatch, capsys, "grow", src, tmp_path / "other", "--recipe", recipe)
    assert code == 2 and err.startswith("growth: step 2, check: ") and "BROKEN" in err
    assert not (tmp_path / "other").exists() and not (tmp_path / "other.recipe").exists()


GROW = {"grow": {"num-layers": 4}}
ODD = {
    "no steps": ({"source": "x"}, "steps: expected a list of verbs"),
    "another key": ({"steps": [GROW], "model": "x"}, "expected steps, and a source or none, got also model"),
    "a list": ([GROW], "expected steps, and a source or none, got list"),
    "an unknown verb": ({"steps": [GROW, {"sing": {}}]}, "step 2, sing: expected one of grow, "),
    "two verbs at once": (
        {"steps": [GROW | {"check": {}}]},
        "step 1: expected one verb with its options, got check, grow",
    ),
    "options that are none": (
        {"steps": [{"grow": [1]}]},
        "step 1, grow: expected options and their values, got list",
    ),
    "an unknown option": (
        {"steps": [{"grow": {"layers": 4}}]},
        "step 1, grow: layers: expected an option of growth",
    ),
    "its own output": (
        {"steps": [{"train": {"out": "x"}}]},
        "step 1, train: out: expected an option of growth train",
    ),
    "a word for a number": (
        {"steps": [{"grow": {"num-layers": "four"}}]},
        "step 1, grow: expected what growth grow",
    ),
    "a switch for a number": (
        {"steps": [{"grow": {"num-layers": True}}]},
        "num-layers: expected a word or a number",
    ),
    "a number for a switch": (
        {"steps": [{"grow": {"allow-lossy": 1}}]},
        "allow-lossy: expected true or false, got 1",
    ),
    "an option twice": (
        {"steps": [{"grow": {"num-layers": 4, "num_layers": 5}}]},
        "num-layers: expected one value",
    ),
    "a missing option": (
        {"steps": [{"train": {"steps": 2}}]},
        "step 1, train: expected what growth train takes, got",
    ),
    "a missing file": (
        {"steps": [GROW, {"train": TRAIN | {"data": "none"}}]},
        "step 2, train: data: expected a file",
    ),
    "an option of another method": (
        {"steps": [GROW, {"grow": {"method": "stack", "insert": 1}}]},
        "step 2, grow: insert: expected none, for stack has no use for it",
    ),
    "sizes that go down": (
        {"steps": [{"grow": {"num-layers": 5}}, {"grow": {"num-layers": 4}}]},
        "step 2, grow: num-layers: expected at least the source's 5, got 4",
    ),
    "a width that loses something": (
        {"steps": [{"grow": {"num-layers": 4}}, {"grow": {"num-layers": 4, "num-kv-heads": 3}}]},
        "step 2, grow: num-kv-heads: expected ",
    ),
    "layers to shrink to that the step before does not make": (
        {"steps": [{"grow": {"num-layers": 5}}, {"shrink": {"num-layers": 7}}]},
        "step 2, shrink: num-layers: expected 1 to the source's 5, got 7",
    ),
    "layers to grow to that are fewer than were shrunk to": (
        {"steps": [{"shrink": {"layers": "0,2"}}, {"grow": {"num-layers": 1}}]},
        "step 2, grow: num-layers: expected at least the source's 2, got 1",
    ),
    "a score without data": (
        {"steps": [GROW, {"shrink": {"num-layers": 2, "score": "activation"}}]},
        "step 2, shrink: data: expected text for score activation",
    ),
    "data that shrinking has no use for": (
        {"steps": [GROW, {"shrink": {"num-layers": 2, "data": "."}}]},
        "step 2, shrink: data: expected none where whole layers and experts go by magnitude",
    ),
    "an order of layers that the step before does not make": (
        {"steps": [{"grow": {"num-layers": 5}}, {"grow": {"order": "0,1,2,3,4,5"}}]},
        "step 2, grow: order: expected layers from 0 to 4, got 5",
    ),
    "a rate below zero": (
        {"steps": [GROW, {"train": TRAIN | {"data": ".", "learning-rate": -1}}]},
        "step 2, train: learning rate: expected above 0",
    ),
    "nothing to hold still": (
        {"steps": [GROW, {"train": TRAIN | {"data": ".", "freeze": "transferred"}}]},
        "step 2, train: freeze: expected a model of which something is to be held still, got none",
    ),
    "masks that no step opens": (
        {"steps": [{"grow": {"method": "msg", "num-layers": 4}}, {"grow": {"num-layers": 5}}]},
        "step 2, grow: lemon: expected a model that was trained since msg made it",
    ),
    "no masks to open": (
        {"steps": [GROW, {"train": TRAIN | {"data": ".", "masks": 1}}]},
        "step 2, train: masks: expected a model with masks to open, got none",
    ),
    "a policy without a state": (
        {"steps": [{"grow": {"num-layers": 4, "policy": "reset"}}]},
        "step 1, grow: policy: expected none without an optimizer's state",
    ),
    "a size that upcycle leaves": (
        {"steps": [{"grow": {"method": "upcycle", "num-layers": 4}}]},
        "step 1, grow: num-layers: expected none, for upcycle leaves sizes as they are",
    ),
    "a share that is none": (
        {"steps": [GROW, {"train": TRAIN | {"data": ".", "drop-layers": 2}}]},
        "step 2, train: ",
    ),
    "a check of nothing": ({"steps": ["check", GROW]}, "step 1, check: expected a step before it"),
    "nothing made": ({"steps": ["check"]}, "recipe: expected a step that makes a checkpoint"),
    "a source that is not there": ({"source": "/nowhere/x", "steps": [GROW]}, "/nowhere/x"),
    "a date": ("steps: [grow: {num-layers: 2020-01-01}]", "num-layers: expected words and numbers"),
    "no YAML": ("steps: [", "expected YAML, got"),
    "a name twice": (
        "steps: [grow: {num-layers: 4, num-layers: 5}]",
        "expected YAML, got num-layers twice, in line 1",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_is_one_line_exit_code_2_and_nothing_is_done(src, tmp_path, monkeypatch, capsys, name):
    given, message = ODD[name]
    file = tmp_path / "recipe.yaml"
    given = (
        given | {"source": str(src)} if isinstance(given, dict) and "/nowhere" not in str(given) else given
    )
    given = {"steps": []} | given if isinstance(given, dict) and name != "no steps" else given
    file.write_text(given if isinstance(given, str) else yaml.safe_dump(given))
    monkeypatch.setattr(Commands, "run", lambda *_: pytest.fail("a step ran"))
    words = (src, tmp_path / "out") if isinstance(given, str) else (tmp_path / "out",)
    code, out, err = command.run(monkeypatch, capsys, "grow", *words, "--recipe", file)
    assert code == 2 and not out and len(err.splitlines()) == 1 and message in err, err
    assert "; " in err and {x.name for x in tmp_path.iterdir()} == {"src", "recipe.yaml"}


def test_an_output_that_exists_and_options_beside_a_recipe_are_refused(src, tmp_path, monkeypatch, capsys):
    file = written(tmp_path, [GROW])
    code, _, err = command.run(monkeypatch, capsys, "grow", src, src, "--recipe", file)
    assert code == 2 and "expected an output folder that does not exist yet" in err
    words = "grow", src, tmp_path / "out", "--recipe", file
    for more in (
        ("--num-layers", 4),
        ("--noise", 0.5),
        ("--method", "stack"),
        ("--seed", 1),
        ("--allow-lossy",),
    ):
        code, _, err = command.run(monkeypatch, capsys, *words, *more)
        assert code == 2 and "recipe: expected no sizes or options beside it" in err
    code, _, err = command.run(monkeypatch, capsys, "grow", tmp_path / "out", "--recipe", file)
    assert code == 2 and "recipe: expected a source, there or in the call, got none" in err
    code, _, err = command.run(monkeypatch, capsys, "inspect", src, "--recipe")
    assert code == 2 and "expected a checkpoint that growth made, got no record of how" in err


def test_a_dry_run_tells_the_sizes_of_every_step_and_writes_nothing(src, text, tmp_path, monkeypatch, capsys):
    file = written(tmp_path, chain(text))
    code, out, _ = command.run(monkeypatch, capsys, "grow", src, "--recipe", file, "--dry-run")
    assert code == 0 and len(out.splitlines()) == 4
    assert "step 1, grow: by lemon: hidden-size 96 -> 120" in out
    assert "step 3, grow: by llama-pro: num-layers 3 -> 5" in out and "step 4, train: 2 steps on" in out
    assert {x.name for x in tmp_path.iterdir()} == {"src", "recipe.yaml"}


def test_a_dry_run_takes_the_words_of_the_call_that_it_is_to_try(src, tmp_path, monkeypatch, capsys):
    file = written(tmp_path, [GROW, {"shrink": {"num-layers": 2}}], source=str(src))
    for name in (src, tmp_path / "out"):
        code, out, _ = command.run(monkeypatch, capsys, "grow", name, "--recipe", file, "--dry-run")
        assert (
            code == 0 and "step 2, shrink: by magnitude: num-layers" in out and out.rstrip().endswith("-> 2")
        )


def test_cheap_steps_are_not_kept_where_a_later_one_fails(src, text, tmp_path):
    steps = [GROW, {"train": TRAIN | {"data": str(text), "batch-size": 5000}}]
    with pytest.raises(Refusal, match=r"^step 2, train: .*5000"):
        growth.run_recipe({"steps": steps}, tmp_path / "out", src)
    assert {x.name for x in tmp_path.iterdir()} == {"src"}


def test_the_same_call_goes_on_after_what_was_trained(made, text, tmp_path, monkeypatch, capsys):
    (src, whole), steps = made, chain(text)
    real, ran = Commands.run, []

    def fails_at(number):
        def run(self, step, at, settings):
            ran.append((at.out.rpartition("/")[2], step.verb))
            if ran[-1][0] == number:
                raise Refusal("disk: expected room, got none; make some")
            return real(self, step, at, settings)

        return run

    monkeypatch.setattr(Commands, "run", fails_at("3"))
    with pytest.raises(
        Refusal, match=r"^step 3, grow: disk: .*what steps 1 to 2 made is kept in .*out\.recipe, and the"
    ):
        growth.run_recipe({"steps": steps}, tmp_path / "out", src)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.recipe" / "2").exists()
    with pytest.raises(
        Refusal, match="expected the recipe and source that were begun there, got others; .*remove"
    ):
        growth.run_recipe({"steps": steps[:2]}, tmp_path / "out", src)
    ran.clear()
    monkeypatch.setattr(Commands, "run", fails_at(None))
    growth.run_recipe({"steps": steps}, tmp_path / "out", src)
    assert ran == [("3", "grow"), ("4", "train")] and "goes on after step 2" in capsys.readouterr().err
    assert bytes_of(tmp_path / "out") == bytes_of(whole)
    assert not (tmp_path / "out.recipe").exists()


def test_after_a_loss_that_is_no_number_the_steps_before_are_kept_for_a_lower_rate(
    src, text, tmp_path, capsys
):
    def steps(*rates):
        return [{"train": TRAIN | {"data": str(text), "learning-rate": x, "save-every": 1}} for x in rates]

    said = "^step 2, train: step 1: .* no good checkpoint .*; what steps 1 to 1 made is kept in .*, and the "
    with pytest.raises(Refusal, match=said + "same call goes on from it, with a lower learning-rate in this"):
        growth.run_recipe({"steps": steps(1e-3, 1e30)}, tmp_path / "out", src)
    with pytest.raises(Refusal, match="expected the recipe and source that were begun there, got others"):
        growth.run_recipe({"steps": steps(1e-4, 1e-3)}, tmp_path / "out", src)
    capsys.readouterr()
    growth.run_recipe({"steps": steps(1e-3, 1e-4)}, tmp_path / "out", src)
    assert "goes on after step 1" in capsys.readouterr().err
    told = json.loads((tmp_path / "out/training.json").read_text())
    assert [step["train"]["learning-rate"] for step in told["recipe"]["steps"]] == [1e-3, 1e-4]


def test_training_that_was_interrupted_is_resumed(src, text, tmp_path, monkeypatch):
    """Stopped in the step after the first checkpoint."""
    steps = [GROW, {"train": TRAIN | {"data": str(text), "steps": 4, "save-every": 2}}]
    growth.run_recipe({"steps": steps}, tmp_path / "whole", src)
    from growth.training.scheduled import ScheduledTrainer

    real = ScheduledTrainer.training_step

    def stopped(self, *args, **how):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *args, **how)

    monkeypatch.setattr(ScheduledTrainer, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        growth.run_recipe({"steps": steps}, tmp_path / "out", src)
    assert (tmp_path / "out.recipe" / "2.unfinished" / "checkpoint-2").exists()
    monkeypatch.setattr(ScheduledTrainer, "training_step", real)
    growth.run_recipe({"steps": steps}, tmp_path / "out", src)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_what_only_python_can_give_is_no_recipe(src, text, tmp_path):
    growth.train(
        src, text, tmp_path / "out", steps=2, batch_size=2, sequence_length=16, rates={"*norm*": 0.5}
    )
    with pytest.raises(Refusal, match="step 1, train: expected what the command line has too, got rates"):
        growth.recipe_of(tmp_path / "out")
    callbacks = [TokenDropping(0.2, first=1)]
    growth.train(
        src, text, tmp_path / "tokens", steps=2, batch_size=2, sequence_length=16, callbacks=callbacks
    )
    with pytest.raises(Refusal, match="the command line has too, got callbacks TokenDropping"):
        growth.recipe_of(tmp_path / "tokens")


def test_a_place_that_is_taken_meanwhile_costs_nothing(src, tmp_path, monkeypatch):
    real = running.enter_recipe
    monkeypatch.setattr(running, "enter_recipe", lambda *x: [real(*x), (tmp_path / "out").mkdir()])
    with pytest.raises(Refusal, match="the result is in .*out-2"):
        growth.run_recipe({"steps": [GROW]}, tmp_path / "out", src)
    assert (tmp_path / "out-2" / "growth.json").exists() and not (tmp_path / "out.recipe").exists()
