"""How sure a difference is: the base's scores against the tuned model's, example by example."""

from collections.abc import Callable, Sequence

import numpy as np


def bootstrap_interval(before: Sequence[float], after: Sequence[float], metric: Callable[[float], float] = float) -> tuple[float, float]:
    """Return the 95 % interval of ``metric(mean(after)) − metric(mean(before))``.

    By paired bootstrap: 2,000 times as many examples are drawn with replacement, the same of both, from a fixed seed.

    Raises:
        ValueError: If the two do not have the same number of examples, at least one.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"Before has {len(before)} examples, after {len(after)}: a paired comparison needs the same ones, at least one.")
    values = np.asarray([before, after], dtype=float)
    chosen = np.random.default_rng(0).integers(len(before), size=(2000, len(before)))
    means = values[:, chosen].mean(axis=2)
    draws = [metric(tuned) - metric(base) for base, tuned in means.T]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
