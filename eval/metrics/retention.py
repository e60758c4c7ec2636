"""What was gained and what was kept, in one figure; all scores are such that more is better."""

from collections.abc import Sequence


def o_average(kept: Sequence[float], target: Sequence[float]) -> float:
    """Return O = (S + T) / 2, with S the mean score of the kept tasks and T that of the targets.

    Raises:
        ValueError: If either has no scores.
    """
    return (_mean(kept, "kept") + _mean(target, "target")) / 2


def h_average(kept: Sequence[float], target: Sequence[float]) -> float:
    """Return the harmonic mean H = 2 S T / (S + T) of the same two; 0 if both are 0.

    Raises:
        ValueError: If either has no scores, or has a negative one.
    """
    if min([*kept, *target], default=0) < 0:
        raise ValueError(f"kept is {list(kept)} and target {list(target)}; expected no negative scores: a harmonic mean has none.")
    source, reached = _mean(kept, "kept"), _mean(target, "target")
    return 2 * source * reached / (source + reached) if source + reached else 0.0


def _mean(values: Sequence[float], name: str) -> float:
    if not values:
        raise ValueError(f"{name} has no scores; expected at least one task.")
    return sum(values) / len(values)
