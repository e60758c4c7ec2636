"""Intervals of what was gained or lost."""

import math

import pytest

from corda_eval.metrics.intervals import bootstrap_interval, ratio_interval, student


def test_interval_of_an_accuracy() -> None:
    before, after = [True] * 60 + [False] * 40, [True] * 40 + [False] * 60
    low, high = bootstrap_interval(before, after)
    assert low < -0.2 < high < 0
    assert bootstrap_interval(before, before) == (0.0, 0.0)
    assert bootstrap_interval(before, after) == (low, high)
    with pytest.raises(ValueError, match="Before has 1"):
        bootstrap_interval([True], [])


def test_interval_of_a_perplexity() -> None:
    before = [2.0, 3.0, 2.5, 2.2] * 5
    low, high = bootstrap_interval(before, [loss + 0.1 for loss in before], math.exp)
    assert 0 < low < high
    assert bootstrap_interval(before, before, math.exp) == (0.0, 0.0)


def test_interval_of_a_ratio() -> None:
    assert ratio_interval(2.0, [0.1]) is None
    interval = ratio_interval(2.0, [-0.1, 0.0, 0.1])
    assert interval is not None
    assert interval == pytest.approx((2 * math.exp(-4.303 * 0.1 / math.sqrt(3)), 2 * math.exp(4.303 * 0.1 / math.sqrt(3))))


def test_students_quantiles() -> None:
    assert [student(freedom) for freedom in (1, 2, 9)] == [12.706, 4.303, 2.262]
    assert [student(freedom) for freedom in (10, 30, 10**6)] == pytest.approx([2.228, 2.042, 1.960], abs=3e-3)
