"""Is the size of the change all that counts? Forgetting against how far each run moved: its outputs on the context, and its predictions.

A line in the logarithms through LoRA's runs says what a change of a size costs when nothing protects; what an arm is below it, it has not
from moving less.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from corda_eval.study.frontier import BASELINE, Run, between, by_arm, curve_of, forgetting_of
from corda_eval.study.reading import RESOLUTION, mean_kl

SIZES: dict[str, tuple[str, Callable[[Run], float | None]]] = {
    "change on the context": ("percent", lambda run: None if (change := run.result["change_on_context"]) is None else 100 * change),
    "KL(base ‖ it)": ("nats", mean_kl),
}
"""Units and measures by name."""


@dataclass(frozen=True)
class Sized:
    """What forgetting has to do with one measure of size, over a setting's runs that stayed finite."""

    measure: str
    unit: str
    points: dict[str, list[tuple[float, float]]]
    """By arm, (size, forgetting in nats) of each run."""

    correlation: float | None
    """Of ranks (Spearman), over all runs; None where they are all of one size."""

    line: tuple[float, float] | None
    """Slope and intercept in natural logarithms, through LoRA's runs; None where they are all of one size."""

    below: dict[str, float]
    """By how many times each arm forgets less than the line says, the geometric mean over its runs up to its largest gain."""


def sizes_of(runs: Sequence[Run], base: Run) -> list[Sized]:
    """Return what there is to say by each measure of ``SIZES`` that LoRA's runs and others tell.

    LoRA's interpolations with the base count as LoRA's runs of another size; those of other arms are left out.
    """
    measured = []
    for name, (unit, measure) in SIZES.items():
        told = [run for run in runs if run.arm != base.arm and not run.diverged and (measure(run) or 0) > 0]
        whole = [run for run in told if between(run.arm) is None]
        lora = [_point(run, measure, base) for run in told if BASELINE in (run.arm, between(run.arm))]
        if len(whole) > 2 and lora:
            of_arms, line = by_arm(whole), _line(lora)
            points = {arm: [_point(run, measure, base) for run in of_arm] for arm, of_arm in of_arms.items()}
            below = {arm: _below(curve_of(of_arm, base).runs, measure, base, line) for arm, of_arm in of_arms.items()} if line else {}
            correlation = rank_correlation([point for of_arm in points.values() for point in of_arm])
            measured.append(Sized(name, unit, points, correlation, line, below))
    return measured


def sentence(sized: Sequence[Sized], named: Sequence[str]) -> str:
    """Return what the figure of sizes shows, by numbers; empty where no run tells its size."""
    correlations = [
        f"{one.correlation:.2f} with the {one.measure} ({sum(map(len, one.points.values()))} runs)"
        for one in sized
        if one.correlation is not None
    ]
    told = f"Rank correlation of forgetting: {' and '.join(correlations)}." if correlations else ""
    for one in sized:
        parts = [f"{arm} {times(one.below[arm])}" for arm in named if arm in one.below and arm != BASELINE]
        if parts:
            told += f" Against the line through LoRA's runs, at their own {one.measure}, forget: {', '.join(parts)}."
    return told.strip()


def times(below: float) -> str:
    """Return a factor by which something is less, or more, as people read it."""
    factor, word = (below, "less") if below >= 1 else (1 / below, "more")
    return "as much" if factor < 1.05 else f"{factor:.{1 if factor < 10 else 0}f} times {word}"


def rank_correlation(points: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's coefficient; None where either value is the same for all."""
    first, second = (_ranks(values) for values in zip(*points, strict=True))
    return None if min(np.ptp(first), np.ptp(second)) == 0 else float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 0; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _point(run: Run, measure: Callable[[Run], float | None], base: Run) -> tuple[float, float]:
    return measure(run) or 0.0, forgetting_of(run.result["scores"], base)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    size, lost = np.log(np.maximum(points, RESOLUTION * np.array([0, 1]))).T
    if np.ptp(size) < math.log(1.5):
        return None
    slope, intercept = np.polyfit(size, lost, 1)
    return float(slope), float(intercept)


def _below(curve: Sequence[Sequence[Run]], measure: Callable[[Run], float | None], base: Run, line: tuple[float, float]) -> float:
    points = [_point(run, measure, base) for seeds in curve for run in seeds]
    return math.exp(mean(line[0] * math.log(size) + line[1] - math.log(max(RESOLUTION, lost)) for size, lost in points))
