"""Gained and forgotten: scores before and after, and the measures of continual learning.

R[i][j] is the score on task j after training on task i, b_j that of the base. All scores are such that more is better.
"""

from collections.abc import Mapping, Sequence


def drops(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return before − after of each task, in the scores' own units; negative where a task got better.

    Raises:
        ValueError: If the two do not name the same tasks.
    """
    _check_same(before, after)
    return {task: before[task] - after[task] for task in before}


def retained(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return after / before of each task; a task with a score of 0 before has nothing to retain and is left out.

    Raises:
        ValueError: If the two do not name the same tasks.
    """
    _check_same(before, after)
    return {task: after[task] / before[task] for task in before if before[task]}


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


def retention_summary(before: Mapping[str, float], after: Mapping[str, float], *, target: Sequence[str]) -> dict[str, float]:
    """Return what was gained and forgotten in one table.

    ``gain`` is the mean of after − before over the targets; ``mean_drop``, ``worst_drop``, ``mean_retention`` and ``worst_retention`` go
    over all other tasks; ``o_average`` and ``h_average`` over both. Retention is absent if every kept task scored 0 before.

    Args:
        before: Score of each task before training, measured by the same code.
        after: The same after it.
        target: Which of the tasks were trained.

    Raises:
        ValueError: If the tasks differ, a target is not among them, or there is no target or no other task.
    """
    lost, shares = drops(before, after), retained(before, after)
    unknown = sorted(set(target) - set(before))
    if unknown:
        raise ValueError(f"target names {unknown}, but the tasks are {sorted(before)}; name tasks among them.")
    kept = [task for task in before if task not in target]
    summary = {
        "gain": -_mean([lost[task] for task in target], "target"),
        "mean_drop": _mean([lost[task] for task in kept], "kept"),
        "worst_drop": max(lost[task] for task in kept),
        "o_average": o_average([after[task] for task in kept], [after[task] for task in target]),
        "h_average": h_average([after[task] for task in kept], [after[task] for task in target]),
    }
    shares_of_kept = [shares[task] for task in kept if task in shares]
    if shares_of_kept:
        summary |= {"mean_retention": _mean(shares_of_kept, "kept"), "worst_retention": min(shares_of_kept)}
    return summary


def backward_transfer(scores: Sequence[Sequence[float]]) -> float:
    """Return BWT = mean over j < T of R[T][j] − R[j][j] (Lopez-Paz and Ranzato 2017): negative where tasks were forgotten.

    Note:
        The mean of the paper, over T − 1 tasks; its code divides by T, here and in FWT.

    Raises:
        ValueError: If the scores are no square of at least two tasks.
    """
    last = _last(scores)
    return _mean([scores[last][task] - scores[task][task] for task in range(last)], "scores")


def forward_transfer(scores: Sequence[Sequence[float]], base: Sequence[float]) -> float:
    """Return FWT = mean over j ≥ 2 of R[j − 1][j] − b_j: what a task gained before it was trained.

    Raises:
        ValueError: If the scores are no square of at least two tasks, or the base has another number.
    """
    last = _last(scores)
    if len(base) != last + 1:
        raise ValueError(f"base has {len(base)} scores; expected {last + 1}, one a task.")
    return _mean([scores[task - 1][task] - base[task] for task in range(1, last + 1)], "scores")


def forgetting(scores: Sequence[Sequence[float]]) -> float:
    """Return the mean over j < T of max_{l < T} R[l][j] − R[T][j] (Chaudhry et al. 2018).

    Raises:
        ValueError: If the scores are no square of at least two tasks.
    """
    last = _last(scores)
    return _mean([max(scores[stage][task] for stage in range(last)) - scores[last][task] for task in range(last)], "scores")


def _last(scores: Sequence[Sequence[float]]) -> int:
    lengths = {len(row) for row in scores}
    if len(scores) < 2 or lengths != {len(scores)}:
        raise ValueError(f"scores has {len(scores)} stages with {sorted(lengths)} tasks; expected as many tasks as stages, at least two.")
    return len(scores) - 1


def _check_same(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    if set(before) != set(after):
        raise ValueError(f"before has the tasks {sorted(before)}, after {sorted(after)}; expected the same; measure both by the same code.")


def _mean(values: Sequence[float], name: str) -> float:
    if not values:
        raise ValueError(f"{name} has no scores; expected at least one task.")
    return sum(values) / len(values)
