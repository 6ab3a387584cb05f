"""RESULTS.md says what a run measured, and which targets it missed."""

import json

from benchmarks import report

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


def page(tmp_path, *rows: dict) -> str:
    """The page made of one run's rows."""
    run = RUN | {"benchmarks": [{"extra_info": row} for row in rows]}
    (tmp_path / "machine.json").write_text(json.dumps(run))
    report.write(tmp_path, tmp_path / "RESULTS.md")
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
