"""The study's figures: which curves have names, and where the names stand."""

import pytest
from test_frontier import BASE, RUNS, run

from corda_eval.study.figure import MOST_NAMED, apart, arms_to_name, draw
from corda_eval.study.frontier import Run
from corda_eval.study.reading import read_study


def test_few_curves_have_names_and_lora_and_the_defaults_among_them() -> None:
    def made(arm: str, lost: float) -> Run:
        return run(arm, 1e-3, 0, 1.0, lost, lost)

    strict = made("strict", 0.9)
    strict.result["spec"]["method"] |= {"method": "corda", "rank": 32, "protect": "strict"}
    del strict.result["spec"]["method"]["context"]
    others = [made(f"arm{number}", 0.01 * (number + 1)) for number in range(9)]
    poor = run("poor", 1e-3, 0, 0.5, 0.0, 0.0)
    runs = [BASE, made("lora", 0.5), *others, strict, poor]
    named = arms_to_name(runs, read_study(runs, BASE)[1])
    assert named == ["arm0", "arm1", "arm2", "arm3", "lora", "strict"]
    assert len(named) == MOST_NAMED


def test_labels_stand_apart_in_order() -> None:
    heights = apart([0.5, 0.51, 0.1, 0.52, 1.0, 0.99], 0.05)
    ordered = sorted(heights)
    assert all(upper - lower >= 0.05 - 1e-9 for lower, upper in zip(ordered, ordered[1:], strict=False))
    assert heights[2] == 0.1
    assert heights[0] < heights[1] < heights[3] < heights[5] < heights[4] <= 1.0
    assert apart([], 0.05) == []


def test_a_figure_is_a_picture_and_the_same_each_time() -> None:
    pytest.importorskip("matplotlib")
    drawn = draw("sums $\\frac$", RUNS, BASE, ["kpm", "lora"], 0.96)
    assert drawn.startswith(b"\x89PNG")
    assert drawn == draw("sums $\\frac$", RUNS, BASE, ["kpm", "lora"], 0.96)
