"""Forgetting over other draws of items."""

from typing import Any

import numpy as np
import pytest
from test_frontier import BASE, run

from corda_eval.study.frontier import Run
from corda_eval.study.items import drawn_at, drawn_forgetting
from corda_eval.study.reading import read_study


def with_items(made: Run, rises: dict[str, np.ndarray[Any, Any]]) -> Run:
    """Return a run whose items' losses are 1 nat and what rises say; the means follow."""
    scores = dict(made.result["scores"])
    for name, rise in rises.items():
        losses = [round(1000 * (1 + value)) for value in rise]
        scores[name] = {**scores[name], "loss": sum(losses) / len(losses) / 1000, "losses": losses}
    return Run(made.arm, made.rate, made.seed, {**made.result, "scores": scores})


def study(noise: float) -> list[Run]:
    """Return runs of which kpm forgets a tenth of LoRA's, each item as much as the noise makes it differ."""
    generator = np.random.default_rng(1)
    luck = generator.normal(size=(2, 400))
    kept = {name: 0.4 * (1 + noise * (row - row.mean())) for name, row in zip(("docs", "code"), luck, strict=True)}
    zero = {name: np.zeros(400) for name in kept}
    tenth = {name: rise / 10 for name, rise in kept.items()}
    return [
        with_items(BASE, zero),
        with_items(run("lora", 1e-3, 0, 1.0, 0, 0), kept),
        with_items(run("kpm", 1e-3, 0, 1.0, 0, 0), tenth),
        with_items(run("other", 1e-3, 0, 1.0, 0, 0), {name: rise[::-1] / 10 for name, rise in kept.items()}),
    ]


def test_what_makes_an_item_hard_cancels() -> None:
    """An arm that forgets a tenth of LoRA's at every item has no doubt of it; one that does so on the mean alone has."""
    runs = study(1.0)
    _, arms = read_study(runs, runs[0])
    paired, other = arms["kpm"].readings[0], arms["other"].readings[0]
    assert paired.ratio == pytest.approx(0.1, rel=0.01)
    assert paired.items == pytest.approx((0.1, 0.1), rel=0.02)
    assert other.items is not None
    assert other.items[0] < 0.095 < 0.105 < other.items[1]
    assert paired.seeds is None  # one seed


def test_draws_are_those_of_the_mean() -> None:
    runs = study(1.0)
    drawn = drawn_forgetting(runs, runs[0])["lora", 1e-3, 0]
    assert drawn.forgetting.shape == (2000,)
    assert drawn.forgetting.mean() == pytest.approx(0.4, rel=0.01)
    assert drawn.forgetting.std() == pytest.approx(drawn.error, rel=0.1)
    assert drawn.error == pytest.approx(0.4 / np.sqrt(400) / np.sqrt(2), rel=0.1)


def test_forgetting_within_its_error_is_a_bound() -> None:
    runs = study(100.0)
    reading = read_study(runs, runs[0])[1]["kpm"].readings[0]
    assert not reading.resolved
    assert reading.forgetting > 0.04


def test_runs_without_items_have_no_such_interval() -> None:
    runs = [*study(1.0), run("old", 1e-3, 0, 1.0, 0.1, 0.1)]
    drawn = drawn_forgetting(runs, runs[0])
    assert ("old", 1e-3, 0) not in drawn
    assert drawn_at(drawn, runs[-1:]) is None
    assert read_study(runs, runs[0])[1]["old"].readings[0].items is None
    assert drawn_forgetting(runs, BASE) == {}
    fewer = with_items(run("fewer", 1e-3, 0, 1.0, 0, 0), {"docs": np.zeros(10), "code": np.zeros(400)})
    assert ("fewer", 1e-3, 0) not in drawn_forgetting([*runs, fewer], runs[0])
