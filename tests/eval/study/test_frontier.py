"""What a study's statistics say about runs whose figures are known."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from corda_eval.study.frontier import (
    Run,
    between,
    curve_of,
    forgettable,
    forgetting_of,
    gain_of,
    gain_on_test,
    gains_by_rate,
    kept_losses,
    matched_rate,
    steps_at_equal_rates,
    still_right,
    summaries,
    tuned_rate,
    with_interpolations,
)
from corda_eval.study.report import write_study

BASE = Run(
    "base",
    0.0,
    0,
    {
        "spec": {"setting": {"kind": "sums", "steps": 10}, "method": None},
        "validation": 2.0,
        "scores": {"target": {"loss": 2.1, "accuracy": 0.0}, "docs": {"loss": 3.0, "accuracy": None}}
        | {"code": {"loss": 1.0, "accuracy": 50.0}, "facts": {"loss": None, "accuracy": 70.0}},
    },
)


def spec(arm: str) -> dict[str, Any]:
    return {"setting": {"kind": "sums", "steps": 10}, "method": {"method": arm, "context": ["docs"]}}


def run(arm: str, rate: float, seed: int, gain: float, docs: float, code: float, **more: Any) -> Run:
    scores = {
        "target": {"loss": 2.1 - gain, "accuracy": 80.0},
        "docs": {"loss": 3.0 + docs, "accuracy": None},
        "code": {"loss": 1.0 + code, "accuracy": 48.0},
        "facts": {"loss": None, "accuracy": 69.0},
    }
    result = {
        "spec": spec(arm),
        "scores": scores,
        "validation_losses": [[0, 2.0], [5, 2.0 - gain / 2], [10, 2.0 - gain]],
        "change": 0.1,
        "change_on_context": 0.2,
        "trainable_parameters": 12,
        "seconds": {"prepare": 1.0, "train": 2.0},
        "peak_memory_gb": 1.5,
        "diverged": False,
    }
    return Run(arm, rate, seed, result | more)


RUNS = [
    BASE,
    run("lora", 1e-4, 0, 0.6, 0.05, 0.05),
    run("lora", 3e-4, 0, 0.97, 0.1, 0.3),
    run("lora", 3e-4, 1, 0.95, 0.2, 0.4),
    run("lora", 1e-3, 0, 1.0, 0.5, 0.5),
    run("kpm", 3e-4, 0, 0.96, 0.01, 0.03),
    run("kpm", 3e-4, 1, 0.96, 0.02, 0.04),
    run("kpm", 1e-3, 0, 1.5, 0.2, 0.2),
    run("weak", 1e-3, 0, 0.2, 0.0, 0.0),
    Run("weak", 3e-3, 0, {"spec": spec("weak"), "diverged": True}),
]


def test_gain_and_forgetting() -> None:
    assert gain_of(RUNS[2], BASE) == pytest.approx(0.97)
    assert gain_of(RUNS[-1], BASE) == -math.inf
    assert forgetting_of(RUNS[2].result["scores"], BASE) == pytest.approx(0.2)
    better = run("lora", 1e-4, 0, 0.6, -0.4, 0.2)
    assert forgetting_of(better.result["scores"], BASE) == pytest.approx(0.1)  # what got better makes up for nothing


def test_gains_count_from_a_guesser_where_the_base_is_worse() -> None:
    guessed = Run("base", 0.0, 0, {**BASE.result, "guessing": 1.5})
    assert gain_of(RUNS[2], guessed) == pytest.approx(0.47)
    assert gain_on_test(RUNS[2], guessed) == pytest.approx(0.37)
    assert gain_on_test(RUNS[2], BASE) == pytest.approx(0.97)
    assert gain_on_test(RUNS[2], Run("base", 0.0, 0, {**BASE.result, "guessing": 9.0})) == pytest.approx(0.97)


def test_what_the_base_knows_no_better_than_a_guesser_is_not_forgotten() -> None:
    guessed = Run("base", 0.0, 0, {**BASE.result, "kept_guessing": {"docs": 4.0, "code": 1.0}})
    assert forgettable(guessed) == {"docs": 3.0}
    assert forgetting_of(RUNS[2].result["scores"], guessed) == pytest.approx(0.1)
    assert kept_losses(guessed) == {"docs": 3.0, "code": 1.0}


def test_a_curve_ends_at_its_largest_gain() -> None:
    curve = curve_of([item for item in RUNS if item.arm == "lora"], BASE)
    assert curve.gains == pytest.approx((0.6, 0.96, 1.0))
    assert [len(seeds) for seeds in curve.runs] == [1, 2, 1]
    assert curve_of([run("a", 1e-3, 0, 1.0, 0.1, 0.1), run("a", 3e-3, 0, 0.5, 3.0, 3.0)], BASE).gains == pytest.approx((1.0,))
    assert curve_of([RUNS[-1]], BASE).gains == ()


def test_seeds_that_diverged_stop_no_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_study({"sums": [*RUNS, Run("lora", 3e-4, 2, {"spec": spec("lora"), "diverged": True})]}, {}, tmp_path)
    assert "lora at 0.0003 (seed 2)" in (tmp_path / "study.html").read_text()


def test_rates() -> None:
    of = {arm: [item for item in RUNS if item.arm == arm] for arm in ("lora", "kpm", "weak")}
    assert tuned_rate(of["lora"], BASE) == 3e-4  # 0.97 is nearly 1.0
    assert tuned_rate(of["kpm"], BASE) == 1e-3
    assert tuned_rate(of["weak"], BASE) == 1e-3
    assert tuned_rate([RUNS[-1]], BASE) is None
    assert matched_rate(of["lora"], BASE, of["lora"]) == 3e-4
    assert matched_rate(of["kpm"], BASE, of["lora"]) == 3e-4  # 0.96 is enough
    assert matched_rate(of["weak"], BASE, of["lora"]) is None
    # What the first seed alone learns at a rate is not enough, nor is a rate at which another seed diverged.
    unlucky = [run("lora", 1e-3, 1, 0.2, 0.5, 0.5), run("lora", 1e-3, 2, 0.1, 0.5, 0.5)]
    assert gains_by_rate([*of["lora"], *unlucky], BASE) == pytest.approx({1e-4: 0.6, 3e-4: 0.96, 1e-3: 1.3 / 3})
    assert tuned_rate([*of["lora"], *unlucky], BASE) == 3e-4
    assert tuned_rate([*of["lora"], Run("lora", 3e-4, 2, {"spec": spec("lora"), "diverged": True})], BASE) == 1e-3
    assert matched_rate([run("kpm", 1e-4, 0, 0.93, 0.1, 0.1)], BASE, [*of["lora"], *unlucky]) == 1e-4


def test_summaries_are_of_tuned_rates() -> None:
    tuned = summaries(RUNS, BASE)
    assert set(tuned) == {"lora", "kpm", "weak"}
    assert {arm: summary.rate for arm, summary in tuned.items()} == {"lora": 3e-4, "kpm": 1e-3, "weak": 1e-3}
    lora, kpm = tuned["lora"], tuned["kpm"]
    assert (lora.num_seeds, kpm.num_seeds) == (2, 1)
    assert lora.gain == pytest.approx((0.96, 0.95, 0.97))
    assert lora.forgetting == pytest.approx((0.25, 0.2, 0.3))
    assert lora.kept == pytest.approx({"docs": 0.15, "code": 0.35})
    assert lora.accuracy_drops == pytest.approx({"code": 2.0, "facts": 1.0})
    assert math.isinf(tuned["weak"].steps_to_baseline)
    assert kpm.steps_to_baseline == pytest.approx((5 + 5 * (0.97 - 0.75) / 0.75) / 10)


def test_what_the_base_had_right_is_counted_item_by_item() -> None:
    def noted(made: Run, right: list[int]) -> Run:
        scores = {**made.result["scores"], "code": {**made.result["scores"]["code"], "right": right}}
        return Run(made.arm, made.rate, made.seed, {**made.result, "scores": scores})

    base = noted(BASE, [1, 1, 0, 1, 1])
    runs = [noted(RUNS[2], [1, 0, 1, 0, 1]), noted(RUNS[3], [1, 1, 0, 1, 1])]
    assert still_right(runs, base) == pytest.approx({"code": 75.0})  # what is right now and was not makes up for nothing
    assert still_right([*runs, RUNS[4]], base) == {}
    assert still_right(runs, BASE) == {}


def test_steps_at_equal_rates_are_those_of_runs_of_one_rate_and_seed() -> None:
    steps = steps_at_equal_rates(RUNS)
    assert list(steps) == ["kpm", "weak"]
    # At 3e-4 the first seed ends above LoRA's 1.03, at 1e-3 its loss falls from 1.25 to 0.5 and passes LoRA's 1.0 on the way.
    assert steps["kpm"] == pytest.approx({3e-4: math.inf, 1e-3: (5 + 5 * (1.25 - 1.0) / 0.75) / 10})
    assert steps["weak"] == {1e-3: math.inf}


def test_interpolations_are_arms_of_their_own() -> None:
    scores = {"0.5": {"target": {"loss": 1.5, "accuracy": 70.0}, "docs": {"loss": 3.01, "accuracy": None}, "validation": 1.4}}
    measured = {"kl": {"docs": 0.1}, "finish": {"kl": 0.1}}
    whole, half = with_interpolations([run("lora", 1e-3, 0, 1.0, 0.5, 0.5, interpolated=scores, **measured)])
    assert (whole.arm, half.arm) == ("lora", "lora, α = 0.5")
    assert (between(whole.arm), between(half.arm)) == (None, "lora")
    assert not {"kl", "finish"} & half.result.keys()  # they are of the whole run
    assert gain_of(half, BASE) == pytest.approx(0.6)
    assert half.result["validation_losses"] == [[10, 1.4]]
    assert half.result["change"] == pytest.approx(0.05)
    assert "validation" not in half.result["scores"]


def test_the_report_has_every_arm_and_loads_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = write_study({"sums": RUNS}, {"Command": "corda-vlm compare"}, tmp_path)
    assert [item["arm"] for item in result["sums"]["readings"]] == ["kpm", "lora", "weak"]
    assert [item["arm"] for item in result["sums"]["tuned"]] == ["weak", "kpm", "lora"]
    assert {file.name for file in tmp_path.iterdir()} == {"sums.png", "sums.size.png", "study.html", "study.md", "study.json"}
    stored = json.loads((tmp_path / "study.json").read_text())
    assert stored["settings"]["sums"]["lora_gain"] == pytest.approx(0.96)
    assert stored["settings"]["sums"]["readings"][0]["readings"][0]["ratio"] == pytest.approx(0.1)
    page, text = (tmp_path / "study.html").read_text(), (tmp_path / "study.md").read_text()
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "weak" in text
    assert '- `kpm`: kpm, context ["docs"]' in text
    assert "- `sums`: sums, steps 10" in text
    assert "<dt>kpm</dt>" in page
    assert "| kpm |  | 67% |" in text.replace("never", "")
    assert stored["settings"]["sums"]["steps_at_equal_rates"]["kpm"] == {"0.0003": None, "0.001": pytest.approx(2 / 3)}
    assert "at the same rate" in page
    assert "| weak | 20.8 % | not reached | not reached | not reached | \\< 0.0010 |" in text
    assert "| kpm | 156.2 % | 0.10 (0.06 … 0.18) |" in text
    assert "| weak | learns 21 % of LoRA's |" in text
    assert "LoRA's gain: 0.960 nats on the test samples, at its tuned rate 0.0003." in text
    assert "Not finite: weak at 0.003 (seed 0)." in text


def test_names_stay_text_on_every_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    odd = "a|b <script> `x` $\\frac$"
    runs = [dataclasses.replace(item, arm=odd) if item.arm == "kpm" else item for item in RUNS]
    setting = "sums (1) <b>"
    write_study({setting: runs}, {"Command": "<script>"}, tmp_path)
    page, text = (tmp_path / "study.html").read_text(), (tmp_path / "study.md").read_text()
    assert "<script>" not in page
    assert r"| a\|b \<script> \`x\` $\\frac$ |" in text
    assert "](sums%20%281%29%20%3Cb%3E.png)" in text
    assert (tmp_path / f"{setting}.png").exists()
    assert "- `` " in text  # in the glossary


def test_a_report_says_what_the_base_did_not_know(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    guessed = Run("base", 0.0, 0, {**BASE.result, "kept_guessing": {"docs": 2.5}})
    write_study({"sums": [guessed, *RUNS[1:]]}, {}, tmp_path)
    told = "Not in the mean, for the base's loss is no lower than a guesser's (nats): docs (3.00, a guesser 2.50)."
    assert told in (tmp_path / "study.md").read_text()
    assert told in (tmp_path / "study.html").read_text().replace("&#39;", "'")
    nothing = Run("base", 0.0, 0, {**BASE.result, "kept_guessing": {"docs": 2.5, "code": 0.5}})
    with pytest.raises(ValueError, match="no setting has finished runs of the base"):
        write_study({"sums": [nothing, *RUNS[1:]]}, {}, tmp_path)


def test_a_report_needs_the_base_and_lora(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for unfinished in (RUNS[1:], [BASE, RUNS[-1]]):
        with pytest.raises(ValueError, match="sums: no setting has finished runs of the base and of LoRA that learned"):
            write_study({"sums": unfinished}, {}, tmp_path)
        assert not any(tmp_path.iterdir())
        assert write_study({"sums": RUNS, "begun": unfinished}, {}, tmp_path / "out").keys() == {"sums"}
        assert "begun: without finished runs" in (tmp_path / "out" / "study.html").read_text()
        shutil.rmtree(tmp_path / "out")


def test_a_report_of_tasks_in_turn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    matrix = [[[2.0, 0.0], [2.0, 0.0]], [[1.0, 80.0], [2.0, 10.0]], [[1.5, 60.0], [0.5, 90.0]]]
    told = {"matrix": matrix, "change": None, "change_on_context": None}
    write_study({"turns": [BASE, run("lora", 1e-3, 0, 1.0, 0.2, 0.2, **told), run("kpm", 1e-3, 0, 1.0, 0.1, 0.1, **told)]}, {}, tmp_path)
    assert "| kpm | 0.001 | 1 | 75.0 | -20.0 | 1.000 | 0.500 |" in (tmp_path / "study.md").read_text()
    assert "one task after another" in (tmp_path / "study.html").read_text().lower()
    assert not (tmp_path / "turns.size.png").exists()


def test_time_is_the_least_of_an_arms_runs() -> None:
    slow = run("lora", 3e-4, 2, 0.96, 0.1, 0.3, seconds={"prepare": 9.0, "train": 1.5})
    assert summaries([*RUNS, slow], BASE)["lora"].seconds == 2.5
