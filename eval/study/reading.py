"""What an arm forgets of what LoRA forgets at the same gain, read off the curves of both.

A curve goes through an arm's rates up to its largest test gain, in the logarithm of the forgetting; below its first rate it is a line to
zero, and above its last it is nowhere. The gains are LoRA's own, at its tuned rate, and 90 % and 80 % of it; an arm that learns less is
read at its own largest. So no rate has to hit a gain, and a near miss costs nothing.

Two 95 % intervals: from the seeds, by Student's t on the logarithms of the ratio (``_Arm.deviations``); and from the items, by a paired
bootstrap, where the runs have each item's loss.
Forgetting below ``RESOLUTION``, or below its own standard error over the items, is no number: it is read as a bound.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from corda_eval.metrics.intervals import ratio_interval
from corda_eval.study.frontier import BASELINE, Curve, Run, between, by_arm, curve_of, forgetting_of, gain_on_test, tuned_rate
from corda_eval.study.items import Drawn, drawn_at, drawn_forgetting
from corda_eval.study.task import TARGET

FRACTIONS = (1.0, 0.9, 0.8)
"""Of LoRA's gain: where the curves are read."""
RESOLUTION = 1e-3
"""Nats: less forgetting than this is none that can be told."""
Interval = tuple[float, float]


@dataclass(frozen=True)
class Place:
    """A gain's place on a curve."""

    weights: tuple[float, ...]
    """Of each of the curve's points; they add up to 1."""

    part: float = 1.0
    """Below the first point, the gain over that point's gain."""

    def read(self, values: Any, floor: float = RESOLUTION) -> Any:
        """Return the value there of what the points (first axis) have, straight in its logarithm; less than ``floor`` counts as that."""
        return self.part * np.exp(np.tensordot(self.weights, np.log(np.maximum(values, floor)), axes=1))


def place_of(gain: float, gains: Sequence[float]) -> Place | None:
    """Return the place of a positive gain among a curve's; None if the curve does not get there."""
    above = next((number for number, reached in enumerate(gains) if reached >= gain), None)
    if above is None:
        return None
    weights = [0.0] * len(gains)
    if above == 0:
        weights[0] = 1.0
        return Place(tuple(weights), gain / gains[0])
    share = (gain - gains[above - 1]) / (gains[above] - gains[above - 1])
    weights[above - 1], weights[above] = 1 - share, share
    return Place(tuple(weights))


@dataclass(frozen=True)
class Reading:
    """An arm at one gain."""

    fraction: float
    """The gain, over LoRA's."""

    rates: tuple[float, ...]
    """The rate, or the two, that it is read from."""

    below: bool
    """Whether the gain is below that of the arm's first rate, or LoRA's: read from the line to zero, which such curves stay under."""

    forgetting: float
    """Nats; an upper bound if it is not ``resolved``."""

    resolved: bool
    ratio: float | None
    """Over LoRA's at that gain; an upper bound if it is not ``resolved``; None where LoRA's is not."""

    seeds: Interval | None
    items: Interval | None
    num_seeds: int
    """That the arm and LoRA have in common."""

    right: float | None
    """Percent right of what was learned; None below the first rate, or where there are no answers."""

    kl: float | None
    """KL(base ‖ it), nats, the mean over the kept things on held-out inputs: it cannot be negative, as a loss's rise can."""

    change_on_context: float | None
    """As ``kl``, None where a run does not tell it."""


@dataclass(frozen=True)
class ArmReading:
    """What an arm's curve says."""

    arm: str
    learned: float
    """Its largest test gain, over LoRA's."""

    readings: tuple[Reading, ...]
    """At the ``FRACTIONS`` that it reaches, the largest first, or at its largest gain if it reaches none; none if it learns nothing."""

    def at(self, fraction: float) -> Reading | None:
        """Return the reading at a fraction of LoRA's gain; None where the arm does not reach it."""
        return next((reading for reading in self.readings if reading.fraction == fraction), None)

    @property
    def order(self) -> tuple[bool, float]:
        """What arms are ordered by: the ratio at the largest gain read; those that reach none of the ``FRACTIONS`` come last."""
        if self.learned < min(FRACTIONS) or self.readings[0].ratio is None:
            return True, -self.learned
        return False, self.readings[0].ratio


@dataclass(frozen=True)
class _Arm:
    """An arm's curve with what its points have."""

    curve: Curve
    losses: tuple[float, ...]
    """Forgetting at each rate, nats, the mean over the seeds."""

    drawn: tuple[Drawn | None, ...]
    base: Run

    def deviations(self, gain: float, place: Place) -> dict[int, float]:
        """Return by how much, in the logarithm of the forgetting, each seed's curve is off the arm's at a gain.

        A seed's curve is the arm's, moved by what the seed is off the mean in gain and in forgetting, at the rate nearest to the gain of
        those at which several seeds ran; empty if there is none.
        """
        several = [number for number, seeds in enumerate(self.curve.runs) if len(seeds) > 1]
        if not several:
            return {}
        nearest = min(several, key=lambda number: abs(self.curve.gains[number] - gain))
        middle, lost, slope = self.curve.gains[nearest], max(RESOLUTION, self.losses[nearest]), self._slope_at(gain, place)
        return {
            run.seed: math.log(max(RESOLUTION, forgetting_of(run.result["scores"], self.base)) / lost)
            - slope * (gain_on_test(run, self.base) - middle)
            for run in self.curve.runs[nearest]
        }

    def _slope_at(self, gain: float, place: Place) -> float:
        """Return how fast the logarithm of the forgetting rises with the gain, 1 / nats."""
        upper = max(number for number, weight in enumerate(place.weights) if weight)
        if upper == 0:
            return 1 / gain
        low, high = np.log(np.maximum(self.losses[upper - 1 : upper + 1], RESOLUTION))
        return float((high - low) / (self.curve.gains[upper] - self.curve.gains[upper - 1]))

    def forgetting_at(self, place: Place) -> tuple[float, bool]:
        """Return the forgetting at a place, and True; or a bound that it is hardly above, and False."""
        value, error = float(place.read(self.losses)), self._error_at(place)
        resolved = value > max(RESOLUTION * (1 + 1e-9), error)  # rounding alone makes none of nothing
        return (value if resolved else max(RESOLUTION, value + 2 * error)), resolved

    def items_at(self, place: Place) -> Any | None:
        """Return the forgetting at a place on other draws of items (DRAWS,); None where items are not noted."""
        used = self._drawn_at(place)
        if not used:
            return None
        inner = Place(tuple(weight for weight, _ in used), place.part)
        return inner.read(np.stack([drawn.forgetting for _, drawn in used]))

    def _error_at(self, place: Place) -> float:
        """Return the standard error over the items; 0 where they are not noted."""
        return place.part * sum(weight * drawn.error for weight, drawn in self._drawn_at(place))

    def _drawn_at(self, place: Place) -> list[tuple[float, Drawn]]:
        """Return the points that count with their weights; none if one has no items."""
        used = [(weight, drawn) for weight, drawn in zip(place.weights, self.drawn, strict=True) if weight]
        known = [(weight, drawn) for weight, drawn in used if drawn is not None]
        return known if len(known) == len(used) else []

    def measure_at(self, place: Place, measure: Callable[[Run], float | None]) -> float | None:
        """Return what else was measured, at a place; None where a run of its points does not tell it."""
        used = [(weight, seeds) for weight, seeds in zip(place.weights, self.curve.runs, strict=True) if weight]
        told = [[value for run in seeds if (value := measure(run)) is not None] for _, seeds in used]
        if any(len(values) < len(seeds) for values, (_, seeds) in zip(told, used, strict=True)):
            return None
        return float(Place(tuple(weight for weight, _ in used), place.part).read(list(map(mean, told)), floor=1e-9))


def read_study(runs: Sequence[Run], base: Run) -> tuple[float, dict[str, ArmReading]]:
    """Return LoRA's test gain at its tuned rate, nats, and what the arms' curves say, in the order of the report.

    Raises:
        ValueError: If LoRA learned nothing, on the validation or on the test samples.
    """
    of_arms = by_arm(runs)
    gain = baseline_gain(runs, base)
    if gain <= 0:
        raise ValueError("LoRA learned nothing; expected a gain that others can be held against: train longer, or at other rates.")
    drawn = drawn_forgetting(runs, base)
    arms = {arm: _arm(of_arm, base, drawn) for arm, of_arm in of_arms.items()}
    readings = [_reading_of(name, arm, arms[BASELINE], gain) for name, arm in arms.items()]
    return gain, {reading.arm: reading for reading in sorted(readings, key=lambda reading: reading.order)}


def baseline_gain(runs: Sequence[Run], base: Run) -> float:
    """Return LoRA's mean test gain at its tuned rate, nats; 0 if it learned nothing."""
    baseline = [run for run in runs if run.arm == BASELINE]
    rate = tuned_rate(baseline, base)
    return max(0.0, mean(gain_on_test(run, base) for run in baseline if run.rate == rate)) if rate is not None else 0.0


def worth_showing(readings: Mapping[str, ArmReading]) -> list[str]:
    """Return the arms that tables show; of interpolations with the base those that forget less than their arm and LoRA at that gain."""
    shown = []
    for arm, reading in readings.items():
        whole, here = between(arm), reading.readings[0] if reading.readings else None
        if whole is None:
            shown.append(arm)
        elif here is not None and here.fraction in FRACTIONS and here.ratio is not None:
            other = readings[whole].at(here.fraction)
            if here.ratio < min(1.0, math.inf if other is None or other.ratio is None else other.ratio):
                shown.append(arm)
    return shown


def _arm(runs: Sequence[Run], base: Run, drawn: dict[tuple[str, float, int], Drawn]) -> _Arm:
    curve = curve_of(runs, base)
    losses = [mean(forgetting_of(run.result["scores"], base) for run in seeds) for seeds in curve.runs]
    return _Arm(curve, tuple(losses), tuple(drawn_at(drawn, seeds) for seeds in curve.runs), base)


def _reading_of(name: str, arm: _Arm, lora: _Arm, gain: float) -> ArmReading:
    largest = arm.curve.gains[-1] if arm.curve.gains else 0.0
    fractions = [fraction for fraction in FRACTIONS if largest >= fraction * gain]
    if not fractions and largest > 0:
        fractions = [largest / gain]
    return ArmReading(name, max(0.0, largest / gain), tuple(_read(arm, lora, gain, fraction) for fraction in fractions))


def _read(arm: _Arm, lora: _Arm, gain: float, fraction: float) -> Reading:
    """Return an arm's reading at a part of LoRA's gain that both reach."""
    wanted = min(fraction * gain, arm.curve.gains[-1])
    place, reference = place_of(wanted, arm.curve.gains), place_of(wanted, lora.curve.gains)
    if place is None or reference is None:
        raise ValueError(f"{fraction} of LoRA's gain is on no curve of an arm that reached it; this is a defect: report it.")
    forgetting, resolved = arm.forgetting_at(place)
    of_lora, comparable = lora.forgetting_at(reference)
    ratio = forgetting / of_lora if comparable else None
    off, off_of_lora = arm.deviations(wanted, place), lora.deviations(wanted, reference)
    logarithms = [off[seed] - off_of_lora[seed] for seed in off if seed in off_of_lora]
    items, items_of_lora = arm.items_at(place), lora.items_at(reference)
    sure = resolved and comparable and arm is not lora
    used = [seeds for weight, seeds in zip(place.weights, arm.curve.runs, strict=True) if weight]
    return Reading(
        fraction=fraction,
        rates=tuple(seeds[0].rate for seeds in used),
        below=min(place.part, reference.part) < 1,
        forgetting=forgetting,
        resolved=resolved,
        ratio=ratio,
        seeds=ratio_interval(ratio, logarithms) if sure and ratio is not None else None,
        items=_percentiles(items / items_of_lora) if sure and items is not None and items_of_lora is not None else None,
        num_seeds=len(logarithms),
        right=None if place.part < 1 else arm.measure_at(place, lambda run: run.result["scores"][TARGET]["accuracy"]),
        kl=arm.measure_at(place, mean_kl),
        change_on_context=arm.measure_at(place, lambda run: run.result["change_on_context"]),
    )


def mean_kl(run: Run) -> float | None:
    """Return a run's KL(base ‖ it), nats, the mean over what is kept; None where it is not noted."""
    kl = run.result.get("kl")
    return mean(kl.values()) if kl else None


def _percentiles(draws: Any) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
