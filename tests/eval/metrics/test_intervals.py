"""Intervals of what was gained or lost."""

import math

import pytest

from corda_eval.metrics.intervals import bootstrap_interval


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
