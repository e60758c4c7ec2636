"""Q-CorDA's study: steps to a loss, which runs count, and the tables; the runs themselves take minutes and are not tests."""

from typing import Any

import pytest
import torch
from conftest import tiny_llama

from corda_eval.bench.qcorda import METHODS, best_rates, beyond_the_edge, error_table, rate_table, readings, steps_table, train
from corda_eval.metrics.curves import steps_to


@pytest.mark.parametrize(
    ("target", "expected"), [(3.0, 0.0), (2.5, 5.0), (2.25, 10 + 10 * 0.25 / 0.75), (2.0, 10 + 10 * 0.5 / 0.75), (1.0, float("inf"))]
)
def test_steps_to_is_the_first_crossing(target: float, expected: float) -> None:
    # Down through 2.5, back up to it, and lowest in the middle of the curve.
    assert steps_to([(0, 3.0), (5, 2.5), (10, 2.5), (20, 1.75), (30, 2.2)], target) == pytest.approx(expected)


def run(method: str, rate: float, seed: int, final: float) -> dict[str, Any]:
    held_out = [[0, 4.0], [10, (4.0 + final) / 2], [20, final]]
    return {"method": method, "rate": rate, "seed": seed, "held_out": held_out, "training": [final] * 20}


def runs() -> list[dict[str, Any]]:
    finals = {"QLoRA": (3.4, 3.2), "CorDA-IPM": (3.0, 3.1), "Q-CorDA": (3.6, 2.8)}
    grid = [run(method, rate, 0, final) for method in METHODS for rate, final in zip((1e-3, 3e-3), finals[method], strict=True)]
    return [*grid, run("QLoRA", 3e-3, 1, 3.0), run("Q-CorDA", 3e-3, 1, 3.5)]


def test_rates_are_chosen_by_the_first_seed() -> None:
    assert best_rates(runs()) == {"QLoRA": 3e-3, "CorDA-IPM": 1e-3, "Q-CorDA": 3e-3}
    same, claimed, own = readings(runs()).values()
    assert claimed == same
    assert [item["rate"] for method in METHODS for item in same[method]] == [3e-3] * 5
    assert own["CorDA-IPM"][0]["rate"] == 1e-3
    assert [item["seed"] for item in own["Q-CorDA"]] == [0, 1]
    assert "| QLoRA | 3.400 | 3.200 |" in rate_table(runs())


def test_the_grid_grows_where_the_best_rate_lies_at_its_edge() -> None:
    assert beyond_the_edge(runs()) == [("QLoRA", 1e-2), ("CorDA-IPM", 3e-4), ("Q-CorDA", 1e-2)]
    inside = [*runs(), run("QLoRA", 1e-2, 0, 5.0), run("CorDA-IPM", 3e-4, 0, 5.0), run("Q-CorDA", 1e-2, 0, 5.0)]
    assert beyond_the_edge(inside) == []


def test_steps_are_counted_to_the_baseline_of_the_same_seed() -> None:
    table = steps_table([item for item in runs() if item["seed"] == 0])
    assert (
        "| QLoRA | 0.003 | 1 | 4.000 (4.000 to 4.000) | 3.200 (3.200 to 3.200) | 3.200 (3.200 to 3.200) | 20.0 (20.0 to 20.0) | 1.00 "
        in table
    )
    assert table.count("| 13.3 (13.3 to 13.3) | 1.50 (1.50 to 1.50) × |") == 3  # Q-CorDA in all readings: 4 to 2.8 passes 3.2 at 2/3
    both = [run("Q-CorDA", 3e-3, 2, 3.5), run("QLoRA", 3e-3, 2, 3.0), *runs()]
    own = steps_table(both).splitlines()[-1]
    assert own.endswith("| never (13.3 to never) | never (never to 1.50) × |")


def test_errors_are_means_by_kind_of_layer() -> None:
    layers = {
        f"layers.{number}.{kind}": {"base": 0.09, "residual": residual, "base_on_context": 0.08, "residual_on_context": 0.02}
        for kind, residuals in (("q_proj", (0.10, 0.06)), ("up_proj", (0.05, 0.03)))
        for number, residual in enumerate(residuals)
    }
    table = error_table(layers)
    assert "| q_proj | 9.00% | 8.00% | 1 of 2 | 8.00% | 2.00% | 2 of 2 |" in table
    assert "| all | 9.00% | 6.00% | 3 of 4 |" in table


def test_training_measures_before_the_first_step_and_lowers_the_loss() -> None:
    model = tiny_llama()
    windows = torch.randint(5, 20, (40, 8))
    measured, training = train(model, windows.split(4), windows[:8], 1e-2, "tiny")
    assert [step for step, _ in measured] == [0, 6]
    assert len(training) == 10
    assert measured[-1][1] < measured[0][1]
