"""A recipe is run: each step in a folder of its own beside the output, which the last becomes.

    DST.recipe/recipe.json      what was begun, and of which weights
    DST.recipe/lock             of the process that works in it (growth.locks)
    DST.recipe/N/               what step N made; the newest two stay

Where a step fails, what took training stays, and the same call goes on after it.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed import is_torchelastic_launched

from growth.checkpoint import Checkpoint
from growth.errors import Refusal, refuse
from growth.folders import Taken, named_folder, publish, refuse_odd_output
from growth.jsonfile import read_object, rewrite
from growth.locks import alone_in, appear
from growth.recipes.commands import MAKING, Commands, Places
from growth.recipes.planned import refuse_odd_steps
from growth.recipes.recipe import Recipe, Step, read_recipe
from growth.record import BEGUN, enter_recipe
from growth.training.finite import NotFinite
from growth.training.run import SUFFIX as RUN
from growth.training.run import newest

RATE = "learning-rate"
SUFFIX = ".recipe"  # of the folder where the steps are, behind the name of the output


def run_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    dst: str | Path | None = None,
    src: str | Path | None = None,
    *,
    dry_run: bool = False,
    as_json: bool = False,
) -> list[Any]:
    """Run a recipe, a file of YAML or what is in it (growth.recipes.recipe); its result is the folder `dst`.

    src       the checkpoint to begin with, a folder or the Hub's; a line says where the recipe has another
    dry_run   validate it alone, and say what each step is to do; `dst` may be left out then
    as_json   each step prints its report as JSON, where its verb does

    Everything is validated before anything runs (growth.recipes.planned). Then each step prints what its
    command does. Returns their reports, of a dry run the lines; growth.json in `dst`, or for training alone
    training.json, has the recipe, and growth.recipe_of gives it back. Raises Refusal, with the step's number,
    where a step cannot be served: nothing is written then, but for steps that follow training, which is kept
    in `dst`.recipe, as the message says, and not done again by the same call.
    """
    if is_torchelastic_launched():
        raise refuse("recipe", "one process", "torchrun", "run its steps one by one; training takes several")
    found = read_recipe(recipe)
    source = found.source if src is None else str(src)
    if source is None:
        raise refuse("recipe", "a source, there or in the call", "none", "name the checkpoint to begin with")
    if found.source is not None and os.path.realpath(found.source) != os.path.realpath(source):
        print(f"recipe: begins with {source}, in the place of its source {found.source}", file=sys.stderr)
    found, commands = replace(found, source=source), Commands()
    lines = refuse_odd_steps(found, source, commands)
    if dry_run:
        return lines
    refuse_odd_output(dst, dry_run)
    return _Run(found, named_folder(dst, "output folder"), commands).run(as_json)


class _Run:
    def __init__(self, recipe: Recipe, dst: Path, commands: Commands):
        self.recipe, self.dst, self.commands = recipe, dst, commands
        self.folder = dst.with_name(dst.name + SUFFIX)

    def run(self, as_json: bool) -> list[Any]:
        with contextlib.ExitStack() as held:
            return self._run(self._begun(held), as_json)

    def _run(self, done: int, as_json: bool) -> list[Any]:
        reports = []
        last = max(i for i, step in enumerate(self.recipe.steps, 1) if step.verb in MAKING)
        try:
            for number, step in enumerate(self.recipe.steps, 1):
                if number > done:
                    reports.append(self._step(number, step, as_json))
                    self._forget(number)
            made = self._at(last)
            enter_recipe(made, self.recipe.json())
        except BaseException as error:
            other = ", with a lower learning-rate in this step" if isinstance(error, NotFinite) else ""
            kept = "" if isinstance(error, Taken) else self._left(other)  # it says where its own result is
            if isinstance(error, Refusal):
                error.args = (f"step {number}, {step.verb}: {error}" + (f"; {kept}" if kept else ""),)
            elif kept:
                print(f"{self.folder}: {kept}", file=sys.stderr)
            raise
        try:
            publish(made, self.dst)
        finally:
            if not made.exists():
                shutil.rmtree(self.folder, ignore_errors=True)
        return reports

    def _step(self, number: int, step: Step, as_json: bool) -> Any:
        model = self._made_before(number)
        before = model if model == self.recipe.source else self._made_before(int(Path(model).name))
        out = self._at(number)
        at = Places(self.recipe.source, model, str(out), before)
        # Else it begins with the state beside the model, if the step says so.
        going_on = {"resume": True} if _unfinished(out) else {}
        report = self.commands.run(step, at, {"as_json": as_json} | going_on)
        if step.verb == "check" and not report.kept:
            raise refuse("check", "what growth promised", str(report), "look at the step before it")
        return report

    def _at(self, number: int) -> Path:
        return self.folder / str(number)

    def _made_before(self, number: int) -> str:
        """What the step of that number reads."""
        earlier = [i for i, step in enumerate(self.recipe.steps[: number - 1], 1) if step.verb in MAKING]
        return str(self._at(earlier[-1])) if earlier else self.recipe.source

    def _begun(self, held: contextlib.ExitStack) -> int:
        """The last step that was done by a call like this one, 0 where there is none; the folder of the steps
        is this process's alone until `held` is closed."""
        now = self.recipe.json() | {"output": self.dst.absolute().name}
        now["weights"] = Checkpoint(self.recipe.source).fingerprint()
        if not os.path.lexists(self.folder):
            appear(self.folder, {BEGUN: json.dumps(now, indent=1)}, held)
            return 0
        held.enter_context(alone_in(self.folder))
        done = max((int(x.name) for x in self.folder.iterdir() if x.name.isdigit()), default=0)
        before = read_object(self.folder / BEGUN) if (self.folder / BEGUN).exists() else {}
        if _without_rates(before, done) != _without_rates(now, done):
            remedy = f"go on with that one, name another output, or remove {self.folder}"
            raise refuse(str(self.dst), "the recipe and source that were begun there", "others", remedy)
        rewrite(self.folder / BEGUN, now)
        if done:
            print(f"{self.folder}: goes on after step {done}", file=sys.stderr)
        return done

    def _forget(self, number: int) -> None:
        """What no later step, and no check, reads."""
        made = sorted(int(x.name) for x in self.folder.iterdir() if x.name.isdigit())
        for old in made[:-2]:
            shutil.rmtree(self._at(old))

    def _left(self, other: str) -> str:
        """What is kept, and how to go on, to which the words `other` are added. What is not worth keeping is
        removed."""
        done = [int(x.name) for x in self.folder.iterdir() if x.name.isdigit()]
        begun = [x for x in self.folder.iterdir() if x.name.endswith(RUN)]
        trained = any(_took(step) for step in self.recipe.steps[: max(done, default=0)])
        if not trained and not any(newest(run) for run in begun):
            shutil.rmtree(self.folder, ignore_errors=True)
            return ""
        steps = f"what steps 1 to {max(done)} made" if done else "the training that was begun"
        return f"{steps} is kept in {self.folder}, and the same call goes on from it{other}"


def _without_rates(begun: dict[str, Any], done: int) -> dict[str, Any]:
    """What was begun, without the learning rates of steps that are not done: of one that has begun, `train`
    says which it takes."""
    steps = [
        {verb: {name: x for name, x in options.items() if name != RATE or number <= done}}
        for number, step in enumerate(begun.get("steps", ()), 1)
        for verb, options in step.items()
    ]
    return begun | {"steps": steps}


def _took(step: Step) -> bool:
    """Did it train something?"""
    return step.verb == "train" or "data" in step.options


def _unfinished(out: Path) -> bool:
    """Was the training of this folder begun, so that it can go on? What cannot go on is removed."""
    run = Path(f"{out}{RUN}")
    if os.path.lexists(run) and not newest(run):
        shutil.rmtree(run)
    return run.exists()
