"""Curves of losses over steps."""

import math
from collections.abc import Sequence


def steps_to(curve: Sequence[Sequence[float]], target: float) -> float:
    """Return the step at which a curve of pairs (step, loss) first comes down to the target; infinity if it never does."""
    if curve[0][1] <= target:
        return float(curve[0][0])
    for (before, high), (after, low) in zip(curve, curve[1:], strict=False):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return math.inf
