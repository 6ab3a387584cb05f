"""The main job: small source models, every way to reuse them, and what each way saves.

text -> source -> grown by every method     -> trained on      against the large model from scratch
               -> transferred to each LCI   -> trained on      against the same LCI model from scratch
digits -> ViT  -> grown by every method     -> trained on      against the large ViT from scratch
"""

import os
import platform
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from rich.console import Console

import growth
from growth.demo import digits
from growth.demo.page import page
from growth.demo.remarks import remarks
from growth.demo.scales import DEMO, LARGER, QUICK, Scale
from growth.demo.study import Study
from growth.demo.table import table
from growth.errors import refuse
from growth.folders import named_folder, refuse_existing
from growth.jsonfile import read_object, rewrite, rewrite_text
from growth.locks import alone_in


def run(out: str | Path = "growth-demo", quick: bool = False, scale: str | None = None) -> dict:
    """Do the main job, write checkpoints and report.html into the new folder `out`, print the table.

    Takes minutes on two CPU cores, with `quick` one, on a job too small to mean much. scale: laptop, for
    hours, or gpu, on one: larger models on several seeds, of which `out` has every result as soon as it is
    there; the same call goes on where it was ended. Returns what report.json holds. Raises Refusal where
    `out` exists or is of something else, where there is no such scale, or Python comes without its sources.
    """
    if scale is not None and (quick or scale not in LARGER):
        got, remedy = ("quick as well", "leave one out") if quick else (scale, "choose one of these")
        raise refuse("scale", f"one of {', '.join(LARGER)}, alone", got, remedy)
    chosen = LARGER[scale] if scale else QUICK if quick else DEMO
    return perform(chosen, named_folder(out, "output folder"), Console())


def perform(scale: Scale, out: Path, console: Console) -> dict:
    """The job of a scale. What is not parted leaves no `out` where it does not come to its end."""
    threads = torch.get_num_threads()
    if not scale.parted:
        refuse_existing(out)
    elif out.exists() and not (out.is_dir() and begun(scale, out)):
        raise refuse(str(out), "a new folder, or one that such a run was ended in", "another", "name another")
    out.mkdir(parents=True, exist_ok=scale.parted)
    torch.set_num_threads(scale.threads)
    try:
        report = report_of(scale, out, console)
        report["seconds"] = sum(map(spent, report["families"]))
        rewrite(out / "report.json", report)
        show(report, out)
    except BaseException:
        if not scale.parted:
            shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        torch.set_num_threads(threads)
    console.print(table(report))
    for line in [
        *remarks(report),
        f"{out / 'report.html'} shows the curves. {report['seconds']:.0f} s for all runs.",
    ]:
        console.print(line, highlight=False, soft_wrap=True)
    return report


def begun(scale: Scale, out: Path) -> bool:
    """Is nothing in the folder but what a run of this scale leaves?"""
    ours = {f"{name}.{kind}" for name in (*scale.families, "report") for kind in ("json", "html")}
    half = tuple(f".{name}." for name in ours)  # of a process that was killed while it wrote one
    return all(path.name in ours | {"work"} or path.name.startswith(half) for path in out.iterdir())


def spent(family: dict) -> float:
    """Seconds of all its runs, and of what they began with."""
    return sum(run["curve"][-1]["seconds"] + run["start"]["seconds"] for run in family["runs"])


def report_of(scale: Scale, out: Path, console: Console, commit: str = "") -> dict:
    """All families, each carried out as far as its results in `out` are not there yet."""
    report = {"scale": scale.name, "machine": machine(), "commit": commit, "skipped": [], "families": []}
    left = [name for name, x in scale.families.items() if x.corpus is None and not digits.there()]
    for name in left:
        report["skipped"].append(f"{name}: left out, for {digits.MISSING}")
        console.print(report["skipped"][-1], highlight=False, soft_wrap=True)
    for name in (name for name in scale.families if name not in left):
        results = out / f"{name}.json" if scale.parted else None
        done = carried_out(scale, name, out / "work", results, console, commit, partial(shown, report, out))
        report["families"].append(done)
    return report


def shown(report: dict, out: Path, told: dict) -> None:
    """The page of what is done, and of a family that is not yet."""
    families = [*report["families"], told]
    show(report | {"families": families, "seconds": sum(map(spent, families))}, out)


def show(report: dict, out: Path) -> None:
    rewrite_text(out / "report.html", page(report))


def carried_out(
    scale: Scale,
    name: str,
    work: Path,
    results: Path | None,
    console: Console,
    commit: str = "",
    also: Callable[[dict], None] = lambda told: None,
) -> dict:
    """One family, whose report is in the file `results`, if any, and is written there after every run. also:
    is called with it then."""

    def made() -> dict:
        return machine() | {"commit": commit}

    def keep(told: dict) -> None:
        report = {"scale": scale.name, "machine": machine(), "commit": commit, "seconds": spent(told)}
        rewrite(results, report | {"skipped": [], "families": [told]})
        also(told)

    if results is None:
        return Study(scale, name, work, None, lambda told: None, console, made).carry_out()
    (work / name).mkdir(parents=True, exist_ok=True)
    with alone_in(work / name):
        told = results_in(results) if results.exists() else None
        return Study(scale, name, work, told, keep, console, made).carry_out()


def results_in(file: Path) -> dict:
    """A family's, as they were kept. Raises Refusal where they are damaged."""
    found = read_object(file, "families")
    families = found["families"]
    fields = {"numbers", "runs", "tried", "pending", "left_out"}
    if not (
        isinstance(families, list)
        and families
        and isinstance(families[0], dict)
        and families[0].keys() >= fields
    ):
        raise refuse(
            str(file), "results that a run has kept", "others", "take it away, or name another folder"
        )
    told, known = families[0], found.get("machine")
    for run in told["runs"] if isinstance(known, dict) else ():  # once one machine stood over all of them
        run.setdefault("made", known | {"commit": found.get("commit", "")})
    return told


def machine() -> dict:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "growth": growth.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def processor() -> str:
    """The processor's name, which Linux keeps in /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
