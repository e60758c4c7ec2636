"""What was gained and what was forgotten: the base's scores against the tuned model's, example by example."""

from collections.abc import Sequence

import numpy as np


def paired_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """Return the 95 % interval of ``after − before`` in points of accuracy, by paired bootstrap over the examples.

    Raises:
        ValueError: If the two do not have the same number of examples, at least one.
    """
    drawn = _resample(before, after)
    return _interval(100 * (drawn[1] - drawn[0]))


def perplexity_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the change of perplexity, by paired bootstrap over windows of one length.

    Args:
        before: Mean loss of each window, in nats a token.
        after: The same of the tuned model.

    Raises:
        ValueError: If the two do not have the same number of windows, at least one.
    """
    drawn = np.exp(_resample(before, after))
    return _interval(drawn[1] - drawn[0])


def _resample(before: Sequence[float], after: Sequence[float]) -> np.ndarray:
    """Return the means (2, 2000) of both over the same examples drawn with replacement, from a fixed seed."""
    if len(before) != len(after) or not before:
        raise ValueError(f"Before has {len(before)} examples, after {len(after)}: a paired comparison needs the same ones, at least one.")
    values = np.asarray([before, after], dtype=float)
    chosen = np.random.default_rng(0).integers(len(before), size=(2000, len(before)))
    return values[:, chosen].mean(axis=2)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return round(float(low), 2), round(float(high), 2)


def drop(before: float, after: float, *, higher_is_better: bool = True) -> float:
    """Return what was lost, in the score's own units; negative where the score got better."""
    return before - after if higher_is_better else after - before
