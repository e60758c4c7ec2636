"""What was gained and what was forgotten: the base's scores against the tuned model's, example by example."""

from collections.abc import Sequence

import numpy as np


def paired_interval(before: Sequence[bool], after: Sequence[bool], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of ``after − before`` in points of accuracy, by paired bootstrap over the examples.

    Raises:
        ValueError: If the two do not have the same number of examples, at least one.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"Before has {len(before)} examples, after {len(after)}: a paired comparison needs the same ones, at least one.")
    change = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    generator = np.random.default_rng(seed)
    means = 100 * change[generator.integers(len(change), size=(draws, len(change)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return round(float(low), 2), round(float(high), 2)


def drop(before: float, after: float, *, higher_is_better: bool = True) -> float:
    """Return what was lost, in the score's own units; negative where the score got better."""
    return before - after if higher_is_better else after - before
