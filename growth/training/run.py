"""The folder of a run: what it goes on from, and what must not be lost.

    lock               of the process that works in it (growth.locks)
    settings.json      what was asked for; a run goes on under the same, or at a lower rate (training.lowered)
    checkpoint-N/      the Trainer's, of the newest two steps that were saved
    model/             the result, until it takes its place

A checkpoint that is not whole is passed over, and stays for who wants to look at it.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from transformers import TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from growth.checkpoint import Checkpoint
from growth.errors import Alone, Refusal, reason, refuse
from growth.folders import nearest, of_disk, publish, refuse_no_place
from growth.jsonfile import read_object
from growth.locks import alone_in, appear, refuse_busy
from growth.training.division import Division
from growth.training.finite import NotFinite
from growth.training.lowered import LOWERED, RATE, STOPPED, enter_rate, is_lowered, note_stop
from growth.training.pieces import METADATA, Pieces
from growth.training.processes import agree, refuse_lost

SUFFIX = ".unfinished"  # the folder of a run is that of its result and this
MODEL = "model"
SETTINGS = "settings.json"
STATE = "trainer_state.json"  # the Trainer writes it last
LOADED = r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth"  # archives whose tensors the Trainer takes
KEPT = 2  # checkpoints; a third is written before the first is removed
FLOAT = 4  # bytes
# Of what is told by its contents, and may lie elsewhere now.
NAMES = "model", "teacher_name", "data_name", "validation_name", "text_field"
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


@contextlib.contextmanager
def unfinished(
    out: Path, args: TrainingArguments, settings: dict, model: Checkpoint, resume: bool
) -> Iterator[str | None]:
    """Makes the run's folder, or finds it; gives the checkpoint to go on from.

    What the block leaves in the folder's `model` takes the place `out`. Where the block fails, a run that can
    go on, or is done, stays, and a line says so; of any other nothing stays. The first of several processes
    does all of it, the others wait. Where their number is not what it was, `args` and `settings` get the
    division of a step (`Division`) under which it stays the same step; `settings` get the rates before, if
    any, as "lowered" (training.lowered).
    """
    run, first = Path(args.output_dir), args.process_index == 0
    above = [folder for folder in run.absolute().parents if not os.path.lexists(folder)]
    with contextlib.ExitStack() as held:
        last = _entered(run, args, settings, model, resume, held)
        try:
            refuse_unseen(run)
            yield last
        except BaseException as error:
            told = _stopped(error, run, above) if first else _stopped_alone(error, run, args.process_index)
            if told:
                raise told from error
            raise
        if first:
            try:
                publish(run / MODEL, out)
            finally:
                if not (run / MODEL).exists():
                    shutil.rmtree(run, ignore_errors=True)


def refuse_other_start(run: Path, resume: bool, moments: str | None) -> None:
    """Raises Refusal where a run was begun and is not to go on, or is to and was not; it needs no data."""
    if os.path.lexists(run):
        refuse_busy(run)
        if not resume:
            remedy = f"{found}, or remove it" if (found := left(run)) else "pass --resume, or remove it"
            raise refuse(str(run), "no interrupted run", "one", remedy)
    elif resume and not moments:
        expected = f"an interrupted run in {run}, or an optimizer's state beside the model"
        raise refuse("resume", expected, "none", "leave --resume out")


def _entered(
    run: Path,
    args: TrainingArguments,
    settings: dict,
    model: Checkpoint,
    resume: bool,
    held: contextlib.ExitStack,
) -> str | None:
    """The checkpoint to go on from, in a folder that is this run's alone until `held` is closed."""
    agree()
    found: tuple[str | None, Division, list[dict]] | Refusal | None = None
    if args.process_index == 0:
        try:
            goes_on = resume and (os.path.lexists(run) or not settings["moments"])
            found = (_resumed if goes_on else _begun)(run, settings, model, held)
        except Refusal as refusal:
            found = refusal
    found = broadcast_object_list([found])[0]  # the others wait for it
    if isinstance(found, Refusal):
        raise found
    last, division, rates = found
    division.enter(args, settings)
    if rates:
        settings[LOWERED] = rates
    return last


def _stopped(error: BaseException, run: Path, above: list[Path]) -> BaseException | None:
    """What the first process says of an error, if not the error itself. What cannot go on is removed."""
    if not (where := left(run)):
        _remove(run, above)
    if lost := refuse_lost(error, where or "start again"):
        return lost
    if of_disk(error):
        got, remedy = reason(error), where or "make room, and start again"
        return refuse(str(run), "files that can be read and written", got, remedy)
    if where and not isinstance(error, NotFinite):  # which names the checkpoint
        print(f"{run}: {where}", file=sys.stderr)
    return None


def _stopped_alone(error: BaseException, run: Path, index: int) -> BaseException | None:
    """What another process says."""
    if of_disk(error):
        got, remedy = f"{reason(error)}, on process {index}", "make room, and pass --resume"
        return Alone(refuse(str(run), "files that can be read and written", got, remedy))
    return refuse_lost(error, "pass --resume")


def refuse_unseen(run: Path) -> None:
    """Raises Refusal where a process does not see the run's folder: it goes on from what all have written."""
    blind = [i for i, seen in enumerate(gather_object([run.is_dir()])) if not seen]
    if blind:
        got = f"one that process {blind[0]} does not see"
        raise refuse(str(run), "a folder that every machine sees", got, "name one on a disk that all share")


def left(run: Path) -> str:
    """Where the work of a stopped run is, and what to do; "" where there is none to keep."""
    saved = newest(run)
    return _trained(run) or (f"pass --resume to go on from {saved.name}" if saved else "")


def kept_before(run: Path, error: NotFinite) -> str:
    """What to do after a loss that is not finite. Checkpoints that lead to it at every rate are removed."""
    for folder, step in _checkpoints(run).items():
        if step > error.good:
            shutil.rmtree(folder, ignore_errors=True)
    note_stop(run / SETTINGS, error.step)
    look = ", or look at that batch" if error.batch else ""
    if good := newest(run):
        goes_on = f"--resume goes on from it at a lower learning rate{look}"
        return f"the last good checkpoint is {good}{_risen(good)}; {goes_on}"
    return f"no good checkpoint was saved before; choose a lower learning rate{look}"


def _risen(checkpoint: Path) -> str:
    """That the training loss had risen to more than twice the first one before: weights may be spoilt."""
    logs = read_object(checkpoint / STATE).get("log_history", [])
    losses = [log["loss"] for log in logs if "loss" in log]
    if not losses or max(losses) <= 2 * losses[0]:
        return ""
    return f", whose loss had risen from {losses[0]:.3g} to {max(losses):.3g}: rather begin anew"


def newest(run: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    return next((folder for folder in _checkpoints(run) if (folder / STATE).exists()), None)


def _trained(run: Path) -> str:
    if not (run / MODEL).is_dir():  # whose name could be that of a model on the Hub
        return ""
    try:
        Checkpoint(run / MODEL)
    except Refusal:
        return ""
    return f"the trained model is in {run / MODEL}, move it where you want it"


def _remove(run: Path, above: list[Path]) -> None:
    """A run's folder and those above it that were made for it."""
    shutil.rmtree(run, ignore_errors=True)
    for folder in above:
        with contextlib.suppress(OSError):
            folder.rmdir()


def refuse_full(run: Path, parameters: int, trained: int, saves: int, kept: bool = False) -> None:
    """Raises Refusal where checkpoints and model, in float32, will not fit on the disk.

    A checkpoint has two moments beside each of the parameters that are `trained`; so has the result where
    they are `kept`.
    """
    one = checkpoint_bytes(parameters, trained)
    model = one if kept else FLOAT * parameters
    most = at_a_time(saves)
    need = max(most * one, min(saves, KEPT) * one + model)
    files = (file for folder in _checkpoints(run) for file in folder.rglob("*"))
    has = sum(file.stat().st_size for file in files if file.is_file())  # new ones take their place
    if need > (free := shutil.disk_usage(run if run.is_dir() else nearest(run)).free + has):
        if not run.is_dir():
            refuse_no_place(run)
        raise refuse(
            str(run),
            f"room for {need / 1e9:,.3g} GB, for {most} checkpoints of {one / 1e9:,.3g} GB and a model",
            f"{free / 1e9:,.3g} GB",
            "make room, save less often, or name a folder on another disk",
        )


def at_a_time(saves: int) -> int:
    """The most checkpoints that lie there at once, of so many that are written."""
    return min(saves, KEPT + 1)


def checkpoint_bytes(parameters: int, trained: int) -> int:
    """Of weights and two moments, in float32."""
    return FLOAT * (parameters + 2 * trained)


def damage(checkpoint: Path) -> str:
    """Why the Trainer could not go on from this folder; "" where it is whole.

    All that it needs must be there, and every file is read by its kind: JSON parses, a safetensors file is as
    long as its header says, torch's archives have the checksums that they say (5 GB/s) and hold tensors and
    plain values alone, the pieces of a sharded state (FSDP) are as long as their .metadata says. Weights in
    safetensors have no checksum.
    """
    numbers = [""] if (processes := _written_by(checkpoint)) == 1 else [f"_{i}" for i in range(processes)]
    needed = [[STATE], ["scheduler.pt"], *([f"rng_state{number}.pth"] for number in numbers)]
    needed.append(["model.safetensors", "model.safetensors.index.json", "pytorch_model_fsdp*"])
    needed.append(["optimizer.pt", "optimizer.bin", "optimizer_*"])
    for names in needed:
        if not any(file for name in names for file in checkpoint.glob(name)):
            return f"{names[0]} is missing"
    try:
        for file in sorted(checkpoint.rglob("*")):
            if file.is_file() and (why := _flaw(file)):
                return f"{file.relative_to(checkpoint)} {why}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def _written_by(checkpoint: Path) -> int:
    """The number of processes that wrote a checkpoint, 1 where that cannot be read."""
    with contextlib.suppress(Refusal, KeyError, TypeError):
        state = read_object(checkpoint / STATE, "stateful_callbacks")["stateful_callbacks"]
        return int(state["Processes"]["attributes"]["number"])
    return 1


def _flaw(file: Path) -> str:
    """What is wrong with a file; "" where it is what it says."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(file) as archive:
                if archive.testzip():
                    return "does not match its checksums"
            if re.fullmatch(LOADED, file.name):
                with safe_globals():
                    torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        elif file.name == STATE:
            read_object(file, "global_step", "stateful_callbacks")
            TrainerState.load_from_json(str(file))
        elif file.name == "model.safetensors.index.json":
            shards = set(read_object(file, "weight_map")["weight_map"].values())
            lost = sorted(shard for shard in shards if not (file.parent / shard).exists())
            return f"names {lost[0]}, which is missing" if lost else ""
        elif file.suffix == ".json":
            read_object(file)
        elif file.name == METADATA:
            pieces = Pieces(file.parent).read_metadata().storage_data.values()
            for piece in pieces:
                end, part = piece.offset + piece.length, file.parent / piece.relative_path
                if not part.exists() or part.stat().st_size < end:
                    return f"names {end} bytes of {piece.relative_path}, which has fewer"
    except Refusal as refusal:
        return f"is damaged ({refusal})"
    except OSError:
        raise
    except Exception as error:  # damaged bytes raise whatever the parser that meets them does
        return f"is damaged ({reason(error)})"
    return ""


def _checkpoints(run: Path) -> dict[Path, int]:
    """The Trainer's folders and their steps, the newest first, whole or not."""
    step = {
        folder: int(found[1])
        for folder in run.glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    }
    return {folder: step[folder] for folder in sorted(step, key=step.get, reverse=True)}


def _begun(
    run: Path, settings: dict, model: Checkpoint, held: contextlib.ExitStack
) -> tuple[None, Division, list[dict]]:
    """A new folder, with the settings in it."""
    refuse_other_start(run, False, None)
    told = settings | {"weights": model.fingerprint()} | VERSIONS
    appear(run, {SETTINGS: json.dumps(told, indent=1)}, held)
    return None, Division.of(settings), []


def _resumed(
    run: Path, settings: dict, model: Checkpoint, held: contextlib.ExitStack
) -> tuple[str | None, Division, list[dict]]:
    """What a run that was the same as this one goes on from, how steps are shared out now, and the rates
    before."""
    refuse_other_start(run, True, None)
    held.enter_context(alone_in(run))
    division = divided(run, settings, model)
    last = _whole(run)
    rates = enter_rate(run / SETTINGS, settings[RATE], _checkpoints(run).get(last, 0))
    return last and str(last), division, rates


def _whole(run: Path) -> Path | None:
    """The newest whole checkpoint, None where the run was killed before it had one; those passed over are
    said."""
    checkpoints, again = _checkpoints(run), f"remove {run} and start again"
    for checkpoint in checkpoints:
        if not (why := damage(checkpoint)):
            return checkpoint
        print(f"{checkpoint}: passed over, {why}", file=sys.stderr)
    if len(checkpoints) < 2 and not newest(run) and not _trained(run):  # killed while it wrote the first
        print(f"{run}: no checkpoint was saved before, begins at step 0", file=sys.stderr)
        return None
    raise refuse("resume", f"a whole checkpoint in {run}", "none", _trained(run) or again)


def divided(run: Path, settings: dict, model: Checkpoint) -> Division:
    """How the steps of a run are shared out now; other versions than it was begun with are said.

    Raises Refusal where it was begun under other settings.
    """
    record, again = run / SETTINGS, f"remove {run} and start again"
    try:
        before = read_object(record)
    except Refusal as refusal:
        said = str(refusal).rpartition("; ")[0]
        raise refuse("resume", "the settings of the run", said, f"put the file back, or {again}") from refusal
    now = settings | {"weights": model.fingerprint()}
    division = _same_steps(record, before, settings)
    now |= {name: before.get(name) for name in asdict(division)}
    changed = [key for key in now if key not in NAMES and now[key] != before.get(key)]
    if changed and not is_lowered(before, now, changed):
        expected, got = (", ".join(f"{key} {of.get(key)}" for key in changed) for of in (before, now))
        lower = ", or a lower learning rate and nothing else that is new" * (STOPPED in before)
        raise refuse("resume", expected, got, f"use the settings of {record}{lower}")
    for name, version in VERSIONS.items():
        if before.get(name) != version:
            print(f"{run}: began with {name} {before.get(name)}, goes on with {version}", file=sys.stderr)
    return division


def _same_steps(record: Path, before: dict, settings: dict) -> Division:
    """How the run's steps are shared out now: as asked, where they stay the same steps; else as they were,
    among the processes that there are."""
    now = Division.of(settings)
    try:
        was = Division.of(before)
        same = now.examples == was.examples
    except (KeyError, TypeError) as error:
        remedy = "put the file back, or start again"
        raise refuse("resume", f"how steps were shared out in {record}", reason(error), remedy) from error
    if same:
        return now
    if now != replace(was, processes=now.processes):
        expected, got = (f"{of.examples} examples a step, {of}" for of in (was, now))
        raise refuse("resume", expected, got, f"use the settings of {record}")
    if again := was.among(now.processes):
        return again
    expected = f"a number of processes that divides a step's {was.examples} examples"
    raise refuse("resume", expected, now.processes, f"start {was.processes}, as before")
