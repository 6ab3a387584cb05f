"""The demo's job: small source models, every way to reuse them, and what each way saves.

text -> source -> grown by every method     -> trained on      against the large model from scratch
               -> transferred to each LCI   -> trained on      against the same LCI model from scratch
digits -> ViT  -> grown by lemon and ligo   -> trained on      against the large ViT from scratch
"""

import json
import os
import platform
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console

import growth
from growth.demo import digits
from growth.demo.budgets import FULL, QUICK, Job
from growth.demo.page import page
from growth.demo.table import remarks, table
from growth.demo.text import Texts
from growth.folders import named_folder, refuse_existing


def run(out: str | Path = "growth-demo", quick: bool = False) -> dict:
    """Do the main job, write checkpoints and report.html into the new folder `out`, print the table.

    Takes minutes on two CPU cores, with `quick` one, on a job too small to mean much. Returns
    what report.json holds. Raises Refusal where `out` exists or Python comes without its sources.
    """
    return perform(QUICK if quick else FULL, named_folder(out, "output folder"), Console())


def perform(job: Job, out: Path, console: Console) -> dict:
    """The job with the numbers of `job`. `out` is removed if it does not come to its end."""
    refuse_existing(out)
    began, threads = time.perf_counter(), torch.get_num_threads()
    out.mkdir(parents=True)
    torch.set_num_threads(job.threads)
    try:
        groups, skipped = [Texts(job.text, out, console, job.seed).report()], []
        if digits.there():
            groups.append(digits.Digits(job.images, out, console, job.seed).report())
        else:
            skipped.append(f"images: left out, for {digits.MISSING}")
        report = {"job": asdict(job), "machine": machine(), "groups": groups, "skipped": skipped}
        report["seconds"] = time.perf_counter() - began
        (out / "report.json").write_text(json.dumps(report, indent=1))
        (out / "report.html").write_text(page(report), encoding="utf-8")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        torch.set_num_threads(threads)
    console.print(table(report))
    for line in [
        *remarks(report),
        f"{out / 'report.html'} shows the curves. {report['seconds']:.0f} s in all.",
    ]:
        console.print(line, highlight=False, soft_wrap=True)
    return report


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
