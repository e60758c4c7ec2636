"""What was gained and what was forgotten: the base's scores against the tuned model's, example by example."""

import math
from collections.abc import Callable, Sequence

import numpy as np


def paired_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """Return the 95 % interval of ``after − before`` in points of accuracy, by paired bootstrap over the examples.

    Raises:
        ValueError: If the two do not have the same number of examples, at least one.
    """
    low, high = bootstrap_interval(before, after)
    return round(100 * low, 2), round(100 * high, 2)


def perplexity_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the change of perplexity, by paired bootstrap over windows of one length.

    Args:
        before: Mean loss of each window, in nats a token.
        after: The same of the tuned model.

    Raises:
        ValueError: If the two do not have the same number of windows, at least one.
    """
    low, high = bootstrap_interval(before, after, math.exp)
    return round(low, 2), round(high, 2)


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
    draws = [metric(mine) - metric(base) for base, mine in means.T]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def drop(before: float, after: float, *, higher_is_better: bool = True) -> float:
    """Return what was lost, in the score's own units; negative where the score got better."""
    return before - after if higher_is_better else after - before
