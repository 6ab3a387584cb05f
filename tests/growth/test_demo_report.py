"""What the demo's report says of scripted runs."""

import re
from html import unescape
from io import StringIO

import pytest
from demo_reports import FREE, Strict, curve, family, full, plain, report, run
from rich.console import Console

from growth.demo.charts import Line, chart, points, ticks
from growth.demo.family import read_in
from growth.demo.goals import goals
from growth.demo.page import headline, page
from growth.demo.remarks import remarks
from growth.demo.saving import compare, reach
from growth.demo.style import DARK, LIGHT
from growth.demo.summary import Spread, picked, ranked, summaries
from growth.demo.table import table
from growth.demo.words import difference, duration, percent, saved, scaled, signed

ENDS = (6.0, 4.0, 3.0, 2.5, 2.0)  # of a baseline: 400 FLOPs and 4 s


def seeds(*ends: float, part: str = "whole", **more) -> list[dict]:
    """A baseline and an arm that starts at 2.4 and ends there, for each seed."""
    return [
        one
        for seed, end in enumerate(ends)
        for one in (
            run("scratch", ENDS, seed, **{key: more[key] for key in ("far", "accuracy") if key in more}),
            run("arm", (2.4, end), seed, part, "scratch", **more),
        )
    ]


def only(runs: list[dict], name: str = "arm"):
    (arm,) = (arm for arm in summaries(family(runs)) if arm.name == name)
    return arm


def written(of: dict) -> str:
    out = StringIO()
    Console(file=out, width=80).print(table(of))
    return out.getvalue()


# ---- one run


def test_the_crossing_is_linear_between_measurements():
    assert reach(curve(4.0, 3.0, 1.0), 2.5) == {"flops": 125.0, "seconds": 1.25}
    assert reach(curve(4.0, 3.0, 1.0), 3.0) == {"flops": 100.0, "seconds": 1.0}
    assert reach(curve(4.0, 3.0, 1.0), 5.0) == {"flops": 0, "seconds": 0.0}
    assert reach(curve(4.0, 3.0, 1.0), 0.9) is None


def test_a_saving_includes_what_growing_cost():
    """150 FLOPs and 50 for growing, out of 400; 1.5 s and 0.4, out of 4."""
    arm = run("arm", (2.4, 2.2, 1.8), baseline="scratch", start={"flops": 50, "seconds": 0.4})
    found = compare(arm, run("scratch", ENDS))
    assert found["reached"] == {"flops": pytest.approx(200.0), "seconds": pytest.approx(1.9)}
    assert found["saved"] == {"flops": pytest.approx(0.5), "seconds": pytest.approx(0.525)}
    assert compare(arm, run("scratch", (6.0, 1.7))) == {"reached": None, "saved": None}


# ---- over seeds


def test_the_median_counts_a_seed_that_never_arrived_as_the_worst():
    assert Spread((0.5, 0.7, 0.6)).median == 0.6
    assert Spread((0.5, 0.7)).median == pytest.approx(0.6)
    assert Spread((0.5, 0.7), missing=1).median == 0.5
    assert Spread((0.7,), missing=1).median is None
    assert Spread((0.9, 0.7), missing=3).median is None
    assert Spread(()).median is None


def test_savings_are_read_where_an_arm_arrives_early_and_its_end_at_equal_compute():
    """Short: at 2.0 after 200 of 400 FLOPs. Equal: at 1.9 after 400; there 2.0 is reached at 380."""
    runs = [run("scratch", ENDS), run("arm", (2.4, 2.2, 2.0), 0, "short", "scratch")]
    equal = run("arm", (2.4, 2.4, 2.4, 2.4, 1.9), 0, "equal", "scratch", far=5.0)
    arm = only([*runs, equal])
    assert (arm.flops.median, arm.ended.mean) == (0.5, pytest.approx(-0.1))
    alone = only([runs[0], equal])
    assert alone.flops.median == pytest.approx(0.05) and alone.ended.mean == pytest.approx(-0.1)
    short = only(runs)
    assert short.flops.median == 0.5 and not short.ended.values and difference(short) == "not run"
    above = run("arm", (2.4, 2.3, 2.2), 0, "short", "scratch")
    assert only([runs[0], above, equal]).flops.median == pytest.approx(0.05)


def test_the_curve_that_is_drawn_is_that_in_which_savings_are_read():
    base = run("scratch", [5, 4, 3, 2])
    above = run("lemon", [4, 3], part="short", baseline="scratch")
    there = run("lemon", [4, 3, 1], part="equal", baseline="scratch")
    early = run("lemon", [4, 1], 1, part="short", baseline="scratch")
    told = family([base, run("scratch", [5, 4, 3, 2], 1), above, there, early])
    (arm,) = summaries(told)
    assert read_in(told, arm) == {0: there, 1: early}
    assert read_in(family([base, above]), arm) == {0: above}


def test_an_arm_is_compared_with_the_baseline_of_its_own_seed_alone():
    runs = seeds(1.6, 1.8)
    runs[2]["curve"][-1]["loss"] = 1.9  # the other seed's baseline ends lower
    arm = only([*runs, run("arm", (2.4, 1.0), 2, "whole", "scratch")])
    assert arm.seeds == 2 and arm.ended.values == pytest.approx((-0.4, -0.1))
    assert summaries(family([run("arm", (2.4, 1.0), 0, "whole", "scratch")])) == []


def test_the_first_loss_stands_beside_the_source_of_its_seed_or_the_one_there_is():
    two = [run("source", (6.0, 2.3)), run("source", (6.0, 2.1), 1), *seeds(1.9, 1.9)]
    assert only(two).jump.values == pytest.approx((0.1, 0.3))
    assert only([two[0], *two[2:]]).jump.values == pytest.approx((0.1, 0.1))
    assert only(seeds(1.9)).jump.values == ()


def test_another_domain_and_accuracy_are_compared_with_the_baseline():
    runs = seeds(1.9, 1.8, far=5.0, accuracy=0.9)
    runs[1] |= {"far": 4.9, "accuracy": 0.95}
    arm = only(runs)
    assert arm.far.values == pytest.approx((-0.1, 0.0)) and arm.gained.values == pytest.approx((0.05, 0.0))
    assert only(seeds(1.9)).far.values == ()


def test_what_saved_most_ranks_first_and_what_never_arrived_by_its_end():
    ends = {"a": 2.3, "b": 1.0, "c": 2.1, "d": 1.5}
    runs = [run("scratch", ENDS), *(run(arm, (2.4, end), baseline="scratch") for arm, end in ends.items())]
    assert [arm.name for arm in ranked(summaries(family(runs)))] == ["b", "d", "c", "a"]


# ---- words


def test_figures_are_said_with_their_spread_and_with_what_never_arrived():
    assert saved(only(seeds(1.6))) == "88 %"
    assert saved(only(seeds(1.6, 1.8, 2.0))) == "83 % (75 to 88 %)"
    some = "83 % (83 to 88 %; not reached in 1 of 3, ended 0.020 above)"
    assert saved(only(seeds(1.6, 1.8, 2.02))) == some
    assert saved(only(seeds(2.02, 2.04))) == "not reached, ended 0.030 above"
    assert saved(only(seeds(1.6, 2.02))) == "not reached in 1 of 2, ended 0.020 above; 88 % in the other"
    assert difference(only(seeds(1.9))) == "−0.100 ± 0.004"
    assert difference(only(seeds(1.9, 2.2, noise=None))) == "+0.050 (−0.100 to +0.200)"


def test_numbers_are_short_and_signs_are_true():
    assert [percent(x) for x in (0.574, -0.12, -0.001)] == ["57 %", "−12 %", "0 %"]
    assert [signed(x) for x in (0.02, -0.02, -0.0001)] == ["+0.020", "−0.020", "0.000"]
    assert [scaled(x) for x in (0, 999, 999_999, 16_914_816, 4.2e15)] == [
        "0",
        "999",
        "1 M",
        "16.9 M",
        "4.2 P",
    ]
    assert [duration(x) for x in (12.34, 150, 9000)] == ["12.3 s", "2.5 min", "2.5 h"]


# ---- goals


def test_goals_are_judged_by_the_best_arm_of_each_kind_and_by_the_worst_lossless_one():
    moved = {"baseline": "scratch", "group": "transfer"}
    runs = [run("scratch", ENDS), run("retnet", (2.4, 2.2, 2.0), **moved), run("hybrid", (2.4, 2.0), **moved)]
    runs += [run("retnet-plain", (2.4, 2.3), **moved), run("mamba", (2.4, 2.3), **moved)]
    runs += [run("kept", (2.4, 2.2, 2.01), baseline="scratch", lossless=True)]
    runs += [run("lost", (2.4, 2.2, 2.0), baseline="scratch", lossless=False)]
    found = goals(report(family(runs)))
    assert [(one.met, one.figure) for one in found] == [
        (True, "lost: 50 %"),
        (True, "hybrid: 75 %"),
        (False, "RetNet: 50 %"),
        (False, "0 of 1 do; the highest, kept: +0.010 ± 0.004"),
    ]
    never = goals(report(family([run("scratch", ENDS), run("arm", (2.4, 2.1), baseline="scratch")])))
    assert [(one.met, one.figure) for one in never] == [(False, "arm: not reached, ended 0.100 above")]


# ---- the terminal


def test_the_table_has_every_arm_in_80_columns():
    text = written(full())
    assert max(map(len, text.splitlines())) <= 80
    (mango,) = (line for line in text.splitlines() if line.startswith("mango"))
    assert mango.count("not reached") == 2 and "+0.022 ± 0.003" in mango and mango.endswith("0/3")
    assert "74 % (74..75)" in text and "ligo, tokens" in text and "images" in text


def without_long_runs(told: dict, arm: str) -> dict:
    for of in told["families"]:
        of["runs"] = [one for one in of["runs"] if (one["arm"], one["part"]) != (arm, "equal")]
    return told


def test_the_remarks_tell_goals_negative_results_seeds_and_what_was_left_out():
    said = remarks(without_long_runs(full(), "msg"))
    assert "text: growth saves 45 % of the FLOPs: met. LEMON-carried: 79 % (78 to 80 %)." in said
    assert "text: Mango: not reached, ended 0.022 above." in said
    assert "text: MSG: not reached in 1 of 2, ended 0.004 above; 34 % in the other." in said
    assert "text: with fewer seeds: MSG (2)." in said and "text: seeds 0, 1 and 2." in said
    assert "text: G-stack left out: it makes whole multiples of the depth and width alone." in said
    assert said[-1] == "a family left out"


def test_a_baseline_that_ends_above_the_source_is_called_unfair():
    of = plain()
    fair = "text: every baseline ended below the source's 2.300, by 0.300 at the least: none was beaten by"
    assert f"{fair} copying it." in remarks(of)
    of["families"][0]["runs"][0]["curve"][-1]["loss"] = 1.9
    assert "text: not a fair test, for scratch did not get below the source's 1.900." in remarks(of)


# ---- the page


@pytest.mark.parametrize(
    "of",
    [
        plain(),
        full(1),
        full(3),
        report(),
        report(family([])),
        report(family([run("source", (6.0, 2.3))])),
        report(
            family([run("source", (6.0, 2.3)), run("arm", (2.4, 2.0), baseline="scratch")]), scale="quick"
        ),
        report(family(seeds(2.3, 2.2)), commit=""),
        report(family([run("scratch", (0.0, 0.0)), run("arm", (0.0,), baseline="scratch", start=FREE)])),
    ],
    ids=["plain", "a seed", "seeds", "nothing", "no runs", "a source", "no baseline", "never", "zeros"],
)
def test_whatever_has_run_the_page_parses_and_loads_nothing(of):
    text, parser = page(of), Strict()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"(src|href)\s*=|url\(|<script|@import|https?:", text)
    assert "nan" not in text.lower().replace("nano", "") and "None" not in text
    written(of), remarks(of)


def test_the_page_is_read_aloud_by_its_headings_pictures_and_tables():
    parser = Strict()
    text = page(full())
    parser.feed(text)
    tags = [tag for tag, _ in parser.seen]
    headings = [attrs for tag, attrs in parser.seen if tag == "th"]
    assert headings and all(attrs.get("scope") in ("row", "col") for attrs in headings)
    charts = [attrs for tag, attrs in parser.seen if tag == "svg" and attrs.get("class") == "chart"]
    assert len(charts) == tags.count("title") - 1 == tags.count("desc") > 20
    assert all(attrs["role"] == "img" for attrs in charts)
    regions = [attrs for _, attrs in parser.seen if attrs.get("class") == "scroll"]
    assert regions and all(one["tabindex"] == "0" and one["aria-label"] for one in regions)
    assert re.search(r"<html lang='en'>.*<meta name='viewport'", text, re.S) and tags.count("h1") == 1


def test_the_headings_say_the_result():
    text = unescape(page(full())).replace("\u00a0", " ")
    said = "Of training's FLOPs, reusing a trained model saved 74 to 79 % by growth and 82 % by transfer"
    assert headline(full()) == said and f"<h1>{said}</h1>" in text
    said = "LEMON-carried reached its baseline's loss with 79 % of its FLOPs saved"
    assert f"<h3>{said}; 2 of 10 arms did not reach theirs</h3>" in text
    none = report(family(seeds(2.3)))
    assert headline(none) == "Of training's FLOPs, reusing a trained model saved nothing by growth"
    assert "<h3>Arm never reached its baseline's loss by growth</h3>" in unescape(page(none))


def test_the_page_has_goals_negative_results_samples_rates_and_the_machine():
    text = page(full()).replace("\u00a0", " ")
    assert "7 of 8 goals met" in text and text.count(">not met<") == 1 and "ended 0.022 above" in text
    assert "ended 0.004 above in 1 of 2" in page(without_long_runs(full(), "msg")).replace("\u00a0", " ")
    assert "def walk(node):" in text and "<b>4.100</b>" in text and "97.0 %" in text
    assert "A processor, 2 cores" in text and "G-stack left out: it makes whole" in text
    assert "def &lt;f&gt;(): &amp; &#x27;ä&#x27;" in page(plain())


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_words_and_curves_stand_out_from_the_paper(colours):
    """WCAG's 4.5 for words, which the curves' colours keep too."""
    for name in colours.keys() - {"paper", "raised", "hair"}:
        for ground in ("paper", "raised"):
            bright, dim = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (name, ground)
    assert LIGHT.keys() == DARK.keys()


# ---- charts


def test_a_curve_is_the_mean_over_seeds_on_a_band_its_start_included():
    one = run("a", (3.0, 1.0), start={"flops": 50, "seconds": 0.0})
    runs = [one, run("a", (2.0, 2.0), 1, start={"flops": 150, "seconds": 0.0})]
    assert points(runs) == [(100.0, 2.5, 2.0, 3.0), (200.0, 1.5, 1.0, 2.0)]
    assert "band" in chart([Line(points(runs), "c1")], 2.5, "nats", "t", "d")
    assert "band" not in chart([Line(points([one]), "c1")], None, "nats", "t", "d")


def test_ticks_are_round_and_inside():
    assert ticks(0, 91) == [0, 20, 40, 60, 80]
    assert ticks(3.43, 4.54) == pytest.approx([3.5, 4.0, 4.5])
    assert ticks(1.234, 1.2345) == pytest.approx([1.234, 1.2341, 1.2342, 1.2343, 1.2344, 1.2345])


def test_what_was_saved_lies_between_the_arrival_and_the_baselines_end():
    """At 200 of 404 FLOPs: the frame is 312 wide from 40 on."""
    lines = [Line(points([run("scratch", ENDS)]), "c0 dashed")]
    drawn = chart(lines, None, "nats", "t", "d", (200, 400, 2.0))
    (left, right) = re.search(r"class='saved' d='M([\d.]+) [\d.]+H([\d.]+)'", drawn).groups()
    assert (float(left), float(right)) == pytest.approx((40 + 312 * 200 / 404, 40 + 312 * 400 / 404), abs=0.1)


def test_the_arms_of_a_report_are_found_by_part_and_seed():
    of = full()["families"][0]
    assert list(picked(of, "lemon", ("short", "whole"))) == [0, 1, 2]
    assert list(picked(of, "msg", ("equal",))) == [0, 1] and picked(of, "lemon") == {}
