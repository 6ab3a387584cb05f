"""RESULTS.md says what a run measured, and which targets it missed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[1]

ROW = {
    "op": "selective_scan",
    "shape": "B=1 T=8 D=4 N=2",
    "mode": "forward",
    "ours": "ours (cpp)",
    "rival": "a loop",
    "seconds": 0.002,
    "seconds_memory_kept": 0.001,
    "rival_seconds": 0.5,
    "floor": 0.0015,
    "mb": 12.6,
    "rival_mb": 1672.0,
    "targets": {"ratio": 230, "ms": 1.5, "percent": 75, "mb": None},
}
MACHINE = {
    "cpu": {"brand_raw": "A processor"},
    "threads": 2,
    "instruction_set": "AVX512",
    "versions": {"torch": "2.13.0"},
    "limits": {"flops": 478e9, "exps": 26.5e9, "triad": 28.5e9, "sgemm": 424e9},
}
RUN = {
    "machine_info": MACHINE,
    "commit_info": {"id": "0123456789abcdef", "dirty": True},
    "datetime": "2026-11-21T15:00:00+00:00",
}

GPU_ROW = {
    "op": "selective_scan",
    "shape": "B=8 T=4096 D=2048 N=16",
    "mode": "forward + backward",
    "ours": "ours",
    "rival": "a CUDA scan",
    "seconds": 0.002,
    "rival_seconds": 0.005,
    "floor": 0.001,
    "elements": 8 * 4096 * 2048,
    "memory": 1.25,
    "targets": {"first_ms": 2.5, "ms": 1.5, "ratio": 2.5, "memory": 1.2},
}
GPU_MACHINE = {
    "cpu": {"brand_raw": "A processor"},
    "gpu": {"name": "A chip"},
    "versions": {"torch": "2.11.0"},
    "limits": {
        "copy": 4300e9,
        "special": 4.18e12,
        "issue": 3.35e13,
        "clock": 1.98e9,
        "multiprocessors": 132,
        "matmul": 790e12,
    },
}


PREDICTED = {
    "op": "selective_scan",
    "shape": "B=8 T=4096 D=2048 N=16",
    "mode": "backward",
    "by": "ours",
    "predicted": 0.00132,
    "bound": "slots",
    "floor": 0.00061,
    "launches": 14,
    "torch": 5,
    "host": 0.00021,
}


def page(tmp_path, *rows: dict, predicted: tuple[dict, ...] = (), **run: object) -> str:
    """The page made of one run's rows, and of predictions."""
    run = RUN | run | {"benchmarks": [{"extra_info": row} for row in rows]}
    (tmp_path / "machine.json").write_text(json.dumps(run))
    (tmp_path / "of").mkdir(exist_ok=True)
    (tmp_path / "of/predicted.json").write_text(json.dumps(predicted))
    report.write(tmp_path, tmp_path / "RESULTS.md", tmp_path / "of/predicted.json")
    return (tmp_path / "RESULTS.md").read_text()


def test_a_row_has_both_sides_the_floor_and_the_targets(tmp_path):
    (row,) = (line for line in page(tmp_path, ROW).splitlines() if line.startswith("| forward"))
    cells = ["forward", "ours (cpp)", "2 (1 kept)", "a loop", "500", "250x"]
    cells += ["≥ 230x, **≤ 1.5 ms missed**, ≥ 75 % of floor", "75 %", "12.6", "1672"]
    assert row == f"| {' | '.join(cells)} |"


def test_the_page_names_machine_commit_and_limits(tmp_path):
    text = page(tmp_path, ROW)
    assert "## A processor, 2 threads, AVX512" in text
    assert "2026-11-21, commit 0123456789 with changes, torch 2.13.0." in text
    assert "478 Gflop/s of FMA and 26.5 Gexp2/s" in text and "28.5 GB/s" in text and "424 Gflop/s" in text


def test_each_op_and_shape_has_one_table(tmp_path):
    other = ROW | {"op": "retention"}
    text = page(tmp_path, ROW, other, ROW | {"mode": "forward + backward"})
    tables = [part.splitlines() for part in text.split("### ")[1:]]
    assert [(table[0].split(":")[0], sum("a loop" in line for line in table)) for table in tables] == [
        ("selective_scan", 2),
        ("retention", 1),
    ]


def test_a_row_of_a_gpu_has_the_time_of_an_element_and_memory(tmp_path):
    (row,) = (
        line for line in page(tmp_path, GPU_ROW, machine_info=GPU_MACHINE).splitlines() if "| forw" in line
    )
    targets = "≥ 2.5x, ≤ 2.5 ms at first, **≤ 1.5 ms missed**, **≤ 1.2x memory missed**"
    cells = ["forward + backward", "2", "a CUDA scan", "5", "2.5x", targets, "50 %", "29.8", "1.25"]
    assert row == f"| {' | '.join(cells)} |"


def test_a_row_without_a_rival_has_no_ratio(tmp_path):
    alone = GPU_ROW | {
        "mode": "T=512 forward",
        "rival": None,
        "rival_seconds": None,
        "memory": None,
        "targets": {},
    }
    (row,) = (
        line for line in page(tmp_path, alone, machine_info=GPU_MACHINE).splitlines() if "| T=512" in line
    )
    assert row == "| T=512 forward | 2 |  |  |  |  | 50 % | 29.8 |  |"


def test_gpus_come_after_processors_under_a_head_of_their_own(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps(RUN | {"machine_info": GPU_MACHINE, "benchmarks": [{"extra_info": GPU_ROW}]})
    )
    text = page(tmp_path, ROW)
    heads = [line for line in text.splitlines() if line.startswith(("# ", "## "))]
    want = ["# What the ops take on a CPU", "## A processor, 2 threads, AVX512"]
    assert heads == [*want, "# What the ops take on a GPU", "## A chip"]
    assert "a copy's 4300 GB/s" in text and "4180 G special" in text and "132 multiprocessors" in text
    assert "790000 Gflop/s of torch's product of bfloat16 matrices" in text


def test_what_was_measured_on_a_gpu_stands_beside_what_is_predicted_of_the_same_call(tmp_path):
    rival = PREDICTED | {"by": "a CUDA scan 1.2", "predicted": 0.003, "torch": 0, "host": None}
    predicted = PREDICTED, rival, PREDICTED | {"mode": "forward"}
    row = GPU_ROW | {"mode": "backward"}
    text = page(tmp_path, row, ROW | {"mode": "backward"}, predicted=predicted, machine_info=GPU_MACHINE)
    ours, theirs, other = (line for line in text.splitlines() if "B=8 T=4096 D=2048 N=16 | " in line)
    assert "| ours | 1.32 | slots | 0.61 | 2 | 14 + 5 of torch | 210 |" in ours
    assert "| a CUDA scan 1.2 | 3 | slots | 0.61 | 5 | 14 |  |" in theirs
    assert "| 0.61 |  | 14" in other  # of the forward pass no time is known
    assert text.count("What is predicted") == 1
    alone = page(tmp_path, ROW | {"shape": row["shape"], "mode": "backward"}, predicted=predicted)
    assert "| 0.61 |  | 14 + 5" in alone  # a CPU's time is not its


def test_a_wrong_answer_marks_its_own_ratio_and_no_other(tmp_path):
    for row, machine, ratio in ((ROW, MACHINE, "250x"), (GPU_ROW, GPU_MACHINE, "2.5x")):
        rows = row | {"red": "b: error 1, budget 0"}, row | {"red": ""}
        text = page(tmp_path, *rows, machine_info=machine, red=["test_op[a]"])
        assert "**Red: test_op[a] failed in this run.**" in text
        wrong, right = (line for line in text.splitlines() if line.startswith("| forward"))
        assert f"| **red** {ratio} | **b: error 1, budget 0** |" in wrong and "≥" not in wrong
        assert f"| {ratio} | ≥ " in right


RUN_OF_TWO = """
import pytest

@pytest.mark.parametrize("wrong", ["", "y: error 1, budget 0"], ids=["right", "wrong"])
def test_op(benchmark, record, wrong):
    benchmark.pedantic(int)
    record(wrong=wrong, **{row})
"""


def test_a_run_with_a_wrong_answer_prints_every_ratio_and_fails(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "test_two.py").write_text(RUN_OF_TWO.replace("{row}", repr(ROW)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.conftest", "-k", "test_op"]
    done = subprocess.run([*command, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    right, wrong = (line for line in done.stdout.splitlines() if line.startswith("| forward"))
    assert "| 250x | ≥ 230x" in right and "| **red** 250x | **y: error 1, budget 0** |" in wrong
