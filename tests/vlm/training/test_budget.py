"""The largest part of a change within a budget."""

import math
from collections.abc import Callable

import pytest

from corda_vlm.training.budget import TOLERANCE, largest_alpha

CURVES: dict[str, Callable[[float], float]] = {
    "quadratic, as near the base": lambda alpha: 3 * alpha**2,
    "steeper": lambda alpha: 8 * alpha**6,
    "flattening": lambda alpha: 4 * (1 - math.exp(-8 * alpha)),
    "a cliff": lambda alpha: 0.5 * alpha**2 + 12 / (1 + math.exp(-40 * (alpha - 0.6))) - 12 / (1 + math.exp(24)),
    "ruined at the end": lambda alpha: math.nan if alpha > 0.7 else 2 * alpha**2,
    "infinite at the end": lambda alpha: math.inf if alpha > 0.01 else 2 * alpha**2,
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("budget", [1e-4, 0.02, 0.3])
def test_the_budget_is_used_and_not_exceeded(name: str, budget: float) -> None:
    measured: list[float] = []

    def kl_at(alpha: float) -> float:
        measured.append(alpha)
        return CURVES[name](alpha)

    alpha, kl = largest_alpha(kl_at, budget)
    assert kl == CURVES[name](alpha) <= budget
    within = not CURVES[name](min(1.0, alpha * 1.01)) <= budget  # the curve may jump over the budget
    assert kl >= (1 - TOLERANCE) * budget or within
    assert len(measured) <= 24


def test_few_measurements_where_the_kl_is_quadratic() -> None:
    measured: list[float] = []

    def kl_at(alpha: float) -> float:
        measured.append(alpha)
        return 1.35 * alpha**2 + 0.4 * alpha**3

    largest_alpha(kl_at, 0.01)
    assert len(measured) <= 4


def test_all_of_the_change_where_it_is_within_the_budget() -> None:
    assert largest_alpha(lambda alpha: 0.01 * alpha**2, 0.02) == (1.0, 0.01)


def test_a_budget_of_nothing_is_the_base_and_needs_no_measurement() -> None:
    def kl_at(alpha: float) -> float:
        raise AssertionError

    assert largest_alpha(kl_at, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("budget", [-0.1, math.nan, math.inf])
def test_what_is_no_budget_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match=r"budget is .*; expected nats"):
        largest_alpha(lambda alpha: alpha, budget)
