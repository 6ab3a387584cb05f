"""REUSE.md and the README's tables say what the results say."""

import json
import re
import shutil

import demo_reports
import pytest
from demo_reports import MACHINE, full, plain, report
from test_report import GPU_MACHINE, GPU_ROW, ROW, RUN

from benchmarks import readme, savings
from growth.demo.arms import ARMS


def saved_in(folder, of: dict) -> None:
    """A file a family, as benchmarks/reuse.py leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    for family in of["families"]:
        (folder / f"{family['name']}.json").write_text(json.dumps(of | {"families": [family]}))


def measured_in(folder, name: str, *rows: dict, file: str = "bench_cpu.py", **run) -> None:
    benchmarks = [{"fullname": f"benchmarks/{file}::test_op", "extra_info": row} for row in rows]
    (folder / f"{name}.json").write_text(json.dumps(RUN | run | {"benchmarks": benchmarks}))


def test_the_readmes_tables_are_those_of_the_results():
    """Where this fails: python -m benchmarks.report."""
    text = readme.README.read_text()
    assert readme.filled(text) == text
    page = savings.PAGE.read_text()
    assert page == savings.text(savings.read())


def test_the_picture_is_that_of_the_results(tmp_path):
    """Its words: how letters are drawn is matplotlib's own."""
    for file in savings.REUSED.glob("*.json"):
        shutil.copy(file, tmp_path)
    savings.write(tmp_path, tmp_path / "REUSE.md")
    drawn, there = (
        re.findall(r">([^<]+)</text>", (folder / "savings.svg").read_text())
        for folder in (tmp_path, savings.REUSED)
    )
    assert drawn == there and len(drawn) > 20


def test_the_scripted_arms_are_those_of_the_demo():
    assert {
        run["arm"] for family in full()["families"] for run in family["runs"] if run["baseline"]
    } <= ARMS.keys()


def test_the_page_has_every_arm_its_goals_and_what_it_was_measured_against(tmp_path):
    saved_in(tmp_path, full())
    text = savings.text(savings.read(tmp_path))
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert [title.split(",")[0] for title in titles] == ["## Llama", "## BERT", "## ViT"]
    lines = text.splitlines()
    assert (
        "| mango | not reached, ended 0.022 above |  | 4.205 | +0.400 | +0.022 ± 0.003 (+0.019 to +0.024) "
        "| +0.022 (+0.019 to +0.024) |" in lines
    )
    assert any(line.endswith("| −0.060 ± 0.003 | 97.0 % (0.0 points) |") for line in lines)
    assert sum(line.startswith("| lemon (lossless) | 74 % ") for line in lines) == 3
    assert "| scratch | 3.505 | 5.600 | 90 T | 6 min | 16.9 M | 100 | 0.002 |" in lines
    assert any(
        line.startswith("* Every lossless arm ends below its baseline") and "**not met**" in line
        for line in lines
    )
    assert "* G-stack left out: it makes whole multiples of the depth and width alone." in lines


def test_results_of_several_days_say_the_first_and_the_last():
    runs = plain()["families"][0]["runs"]
    days = [{"date": f"2026-12-0{i % 3 + 1} 10:00", "commit": "ab"[i % 2] * 40} for i, _ in enumerate(runs)]
    runs = [one | {"made": MACHINE | day} for one, day in zip(runs, days)]
    said = savings.text([report(demo_reports.family(runs))])
    commits = f"commits {'a' * 10}, {'b' * 10}, A processor, 2 threads"
    assert f"2026-12-01 10:00 to 2026-12-03 10:00, {commits}" in said


def test_the_pictures_show_what_every_arm_saved(tmp_path):
    saved_in(tmp_path, full())
    savings.write(tmp_path, tmp_path / "REUSE.md")
    svg = (tmp_path / "savings.svg").read_text()
    for said in (
        "lemon-carried",
        "79 %",
        "not reached",
        "retnet, unaligned",
        "ViT, 4 x 192 (1.8 M) to 8 x 288 (8.0 M)",
    ):
        assert f">{said}</text>" in svg, said
    png = (tmp_path / "savings.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    savings.write(tmp_path, tmp_path / "REUSE.md")
    assert (svg, png) == ((tmp_path / "savings.svg").read_text(), (tmp_path / "savings.png").read_bytes())


def test_the_readme_tells_of_the_best_arms_and_of_those_that_papers_are_about(tmp_path):
    saved_in(tmp_path, full())
    rows = [
        line.split(" | ") for line in savings.headline(savings.read(tmp_path)).splitlines() if line[:1] == "|"
    ][2:]
    told = [
        "LEMON-carried",
        "LEMON",
        "LiGO",
        "bert2BERT",
        "Mango",
        "RetNet-learned",
        "hybrid",
        "Mamba-2",
        "Mamba",
    ]
    assert [row[1].split(" (")[0] for row in rows] == [*told, "LEMON", "LiGO", "LEMON", "LiGO"]
    assert rows[1][1] == "LEMON" and rows[9][1] == "LEMON (2 seeds)"
    assert [row[0].strip("| ").split(",")[0] for row in rows if row[0].strip("| ")] == [
        "Llama",
        "BERT",
        "ViT",
    ]
    assert rows[4][2] == "not reached, ended 0.022 above"
    saved_in(tmp_path / "plain", plain())
    assert "| fast | 50 % | 50 % | −0.200 ± 0.004 |" in savings.headline(savings.read(tmp_path / "plain"))


def test_without_results_one_line_says_how_to_make_them(tmp_path):
    for text in (savings.headline(savings.read(tmp_path)), readme.speeds(tmp_path)):
        assert "python -m benchmarks.report" in text and "\n" not in text
    savings.write(tmp_path, tmp_path / "REUSE.md")
    assert savings.NONE in (tmp_path / "REUSE.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["REUSE.md"]


def test_speeds_are_the_last_runs_at_the_first_size_beside_the_fastest_rival(tmp_path):
    """Neither variants of ours nor what compares models with each other are rivals."""
    fast = ROW | {"rival": "another", "rival_seconds": 0.1}
    both = fast | {"mode": "forward + backward", "rival_seconds": 0.4}
    ours = ROW | {"rival": "ours in torch", "rival_seconds": 0.003}
    large = fast | {"shape": "B=1 T=16 D=4 N=2", "rival_seconds": 0.01}
    measured_in(tmp_path, "a", ROW | {"seconds": 1.0}, datetime="2026-11-20T15:00:00+00:00")
    measured_in(tmp_path, "b", ours, ROW, fast, large, ROW | {"op": "other"} | {"red": "y: error 1"})
    measured_in(tmp_path, "c", ROW | {"op": "a model"}, file="bench_transfer.py")
    lines = readme.speeds(tmp_path).splitlines()[2:4]
    size, where = "B=1 T=8 D=4 N=2", "A processor, 2 threads |"
    assert lines[0] == f"| selective_scan | {size} | forward | 2 | another | 100 | 50x | {where}"
    assert lines[1] == f"| other | {size} | forward | 2 | a loop | 500 | **red** | {where}"
    assert "a model" not in readme.speeds(tmp_path) and len(readme.speeds(tmp_path).splitlines()) == 6
    measured_in(tmp_path, "b", ROW, fast, both)
    assert f"| {size} | forward + backward | 2 | another | 400 | 200x |" in readme.speeds(tmp_path)
    measured_in(tmp_path, "d", GPU_ROW, file="bench_gpu.py", machine_info=GPU_MACHINE, datetime="2026-12-01")
    assert "| 2 | a CUDA scan | 5 | 2.5x | A chip |" in readme.speeds(tmp_path)


def test_a_block_is_replaced_and_a_missing_marker_is_refused(tmp_path):
    text = "a\n<!-- speeds -->\nold \\1\n<!-- /speeds -->\nb\n<!-- savings -->\n<!-- /savings -->\nc\n"
    got = readme.filled(text, tmp_path)
    speeds = f"<!-- speeds -->\n{readme.NONE}\n<!-- /speeds -->"
    assert got == f"a\n{speeds}\nb\n<!-- savings -->\n{savings.NONE}\n<!-- /savings -->\nc\n"
    assert readme.filled(got, tmp_path) == got
    with pytest.raises(ValueError, match="expected <!-- speeds --> and <!-- /speeds --> once each"):
        readme.filled(text.replace("<!-- /speeds -->", ""), tmp_path)
