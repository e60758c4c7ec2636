"""How sure a difference is: the base's scores against the tuned model's, example by example, and ratios seed by seed."""

import math
from collections.abc import Callable, Sequence
from statistics import stdev

import numpy as np

DRAWS = 2000
"""Of a bootstrap."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t by degrees of freedom, from 1."""


def bootstrap_interval(before: Sequence[float], after: Sequence[float], metric: Callable[[float], float] = float) -> tuple[float, float]:
    """Return the 95 % interval of ``metric(mean(after)) − metric(mean(before))``.

    By paired bootstrap: 2,000 times as many examples are drawn with replacement, the same of both, from a fixed seed.

    Raises:
        ValueError: If the two do not have the same number of examples, at least one.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"Before has {len(before)} examples, after {len(after)}: a paired comparison needs the same ones, at least one.")
    values = np.asarray([before, after], dtype=float)
    chosen = np.random.default_rng(0).integers(len(before), size=(DRAWS, len(before)))
    means = values[:, chosen].mean(axis=2)
    draws = [metric(tuned) - metric(base) for base, tuned in means.T]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def ratio_interval(ratio: float, logarithms: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of a ratio whose logarithm was seen several times, by Student's t; None if fewer than twice.

    ``ratio · exp(± t s / √n)``, with s the standard deviation of the n logarithms.
    """
    if len(logarithms) < 2:
        return None
    half = student(len(logarithms) - 1) * stdev(logarithms) / math.sqrt(len(logarithms))
    return ratio * math.exp(-half), ratio * math.exp(half)


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t; beyond nine degrees of freedom by its expansion about the normal's, right to 0.003."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
