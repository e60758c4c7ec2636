"""Gain, drop and their intervals."""

import pytest

from corda_eval.metrics.intervals import drop, paired_interval, perplexity_interval


def test_paired_interval() -> None:
    before, after = [True] * 60 + [False] * 40, [True] * 40 + [False] * 60
    low, high = paired_interval(before, after)
    assert low < -20 < high < 0
    assert paired_interval(before, before) == (0.0, 0.0)
    assert paired_interval(before, after) == paired_interval(before, after)
    with pytest.raises(ValueError, match="Before has 1"):
        paired_interval([True], [])


def test_perplexity_interval() -> None:
    before = [2.0, 3.0, 2.5, 2.2] * 5
    low, high = perplexity_interval(before, [loss + 0.1 for loss in before])
    assert 0 < low < high
    assert perplexity_interval(before, before) == (0.0, 0.0)


def test_drop() -> None:
    assert drop(90, 70) == 20
    assert drop(14, 20, higher_is_better=False) == 6
