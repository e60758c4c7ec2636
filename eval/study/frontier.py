"""What a study's runs say: gain, forgetting, and forgetting at matched gain.

Gain: the fall of the loss of what is learned, in nats, from the base's, or from a guesser's where that is lower (``Task.guessing``); on the
validation samples for choosing and on the test samples for reporting.
Forgetting: the mean over the kept things of the rise of their loss, in nats; where one fell, that counts as 0 and makes up for no other.
Tuned: the smallest rate whose validation gain, the mean over the seeds that ran, is at least ``NEARLY`` of the arm's best.
Matched: the smallest rate whose validation gain is at least ``NEARLY`` of LoRA's best. So an arm's forgetting at matched gain is that of
runs which were really made, and no kept thing was looked at to choose them.
At its own gain: an arm's forgetting over what LoRA's would be at that very gain, on the line through LoRA's runs of all rates: rates are
coarse, and LoRA may forget much less at a little less gain.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from corda_eval.metrics.curves import steps_to
from corda_eval.study.task import TARGET

NEARLY = 0.95
Spread = tuple[float, float, float]
"""Mean, lowest and highest."""
BASE, BASELINE = "base", "lora"
"""The arms that all others are held against: the untouched model, and LoRA."""


@dataclass(frozen=True)
class Run:
    """One finished run."""

    arm: str
    rate: float
    seed: int
    result: Mapping[str, Any]

    @property
    def diverged(self) -> bool:
        """Whether its loss was not finite."""
        return bool(self.result.get("diverged"))


def with_interpolations(runs: Iterable[Run]) -> list[Run]:
    """Return the runs, and the interpolations of each with the base as runs of arms of their own: "lora, α = 0.5" (WiSE-FT)."""
    with_between = []
    for run in runs:
        with_between.append(run)
        for alpha, scores in run.result.get("interpolated", {}).items():
            last = run.result["validation_losses"][-1][0]
            result = {
                **run.result,
                "scores": {name: score for name, score in scores.items() if name != "validation"},
                "validation_losses": [[last, scores["validation"]]],
                "change": float(alpha) * run.result["change"],
                "change_on_context": float(alpha) * run.result["change_on_context"],
            }
            with_between.append(Run(f"{run.arm}, α = {alpha}", run.rate, run.seed, result))
    return with_between


def base_run(runs: Iterable[Run]) -> Run | None:
    """Return the measurement of the base, if there is one."""
    return next((run for run in runs if run.arm == BASE), None)


def gain_of(run: Run, base: Run) -> float:
    """Return the fall of the loss on the validation samples, in nats; minus infinity for a run that diverged."""
    return -math.inf if run.diverged else _start(base, base.result["validation"]) - run.result["validation_losses"][-1][1]


def gain_on_test(run: Run, base: Run) -> float:
    """Return the fall of the loss on the test samples, in nats."""
    return _start(base, base.result["scores"][TARGET]["loss"]) - run.result["scores"][TARGET]["loss"]


def _start(base: Run, loss: float) -> float:
    """Return the loss that gains count from: the base's, or a guesser's where that is lower."""
    guessing = base.result.get("guessing")
    return loss if guessing is None else min(loss, guessing)


def kept_scores(base: Run) -> dict[str, Any]:
    """Return the base's scores of the things that are to be kept."""
    return {name: score for name, score in base.result["scores"].items() if name not in (TARGET, *base.result.get("learned", ()))}


def kept_losses(base: Run) -> dict[str, float]:
    """Return the base's losses of the things that are to be kept."""
    return {name: score["loss"] for name, score in kept_scores(base).items() if score["loss"] is not None}


def forgetting_of(scores: Mapping[str, Any], base: Run, names: Iterable[str] | None = None) -> float:
    """Return the mean rise of the kept things' losses, of all or of some, in nats; a fall counts as 0."""
    before = kept_losses(base)
    return mean(max(0.0, scores[name]["loss"] - before[name]) for name in (before if names is None else names))


def gains_by_rate(runs: Sequence[Run], base: Run) -> dict[float, float]:
    """Return an arm's validation gain by rate: the mean over the seeds, so minus infinity where one diverged."""
    return {rate: mean(gain_of(run, base) for run in runs if run.rate == rate) for rate in sorted({run.rate for run in runs})}


def tuned_rate(runs: Sequence[Run], base: Run) -> float | None:
    """Return the arm's tuned rate; None if no run learned anything."""
    gains = gains_by_rate(runs, base)
    best = max(gains.values(), default=-math.inf)
    return min(rate for rate, gain in gains.items() if gain >= NEARLY * best) if best > 0 else None


def gain_to_match(baseline: Sequence[Run], base: Run) -> float:
    """Return the validation gain that is nearly LoRA's best, in nats; infinity if LoRA has not run."""
    return NEARLY * max(gains_by_rate(baseline, base).values(), default=math.inf)


def matched_rate(runs: Sequence[Run], base: Run, baseline: Sequence[Run]) -> float | None:
    """Return the smallest rate at which the arm learns nearly as much as LoRA; None if it never does."""
    wanted = gain_to_match(baseline, base)
    return min((rate for rate, gain in gains_by_rate(runs, base).items() if gain >= wanted), default=None)


def unmatched(runs: Sequence[Run], base: Run) -> dict[str, float]:
    """Return the arms that never learn nearly as much as LoRA, and what part of LoRA's best gain they reach."""
    by_arm = _by_arm(runs)
    best = {arm: max(gains_by_rate(of_arm, base).values(), default=-math.inf) for arm, of_arm in by_arm.items()}
    return {arm: max(0.0, gain / best[BASELINE]) for arm, gain in best.items() if matched_rate(by_arm[arm], base, by_arm[BASELINE]) is None}


def gains_and_forgetting(runs: Sequence[Run], base: Run) -> list[tuple[float, float]]:
    """Return (test gain, forgetting) of an arm by rising rate up to its largest gain: means over the seeds."""
    points = points_by_rate(runs, base)
    return [(gain[0], lost[0]) for gain, lost in points[: num_rising(points)]]


def points_by_rate(runs: Sequence[Run], base: Run) -> list[tuple[Spread, Spread]]:
    """Return test gain and forgetting of an arm by rising rate, over the seeds whose loss stayed finite."""
    points = []
    for rate in sorted({run.rate for run in runs if not run.diverged}):
        seeds = [run for run in runs if run.rate == rate and not run.diverged]
        gains = [gain_on_test(run, base) for run in seeds]
        points.append((spread(gains), spread([forgetting_of(run.result["scores"], base) for run in seeds])))
    return points


def num_rising(points: Sequence[tuple[Spread, Spread]]) -> int:
    """Return how many of an arm's points by rate there are up to its largest mean gain."""
    return 1 + max(range(len(points)), key=lambda place: points[place][0][0], default=-1)


def forgetting_at(gain: float, points: Sequence[tuple[float, float]]) -> float:
    """Return the forgetting at a gain on the line through an arm's points (``gains_and_forgetting``).

    Between two points it is straight in the logarithm of the forgetting; below the first it falls to 0 with the gain, and beyond the last
    it is the last one's.
    """
    first_gain, first = points[0]
    if gain <= first_gain:
        return first * max(0.0, gain) / first_gain
    for (low_gain, low), (high_gain, high) in zip(points, points[1:], strict=False):
        if gain <= high_gain:
            if min(low, high) <= 0:
                return low + (high - low) * (gain - low_gain) / (high_gain - low_gain)
            return low * (high / low) ** ((gain - low_gain) / (high_gain - low_gain))
    return points[-1][1]


def steps_at_equal_rates(runs: Sequence[Run]) -> dict[str, dict[float, float]]:
    """Return by arm and rate the part of LoRA's steps after which the validation loss is at LoRA's final one of the same rate and seed.

    Means over the seeds that both have run, infinity if a seed never gets there; runs of LoRA that diverged are left out.
    """
    baseline = {(run.rate, run.seed): run for run in runs if run.arm == BASELINE and not run.diverged}
    parts: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        reference = baseline.get((run.rate, run.seed))
        if run.arm not in (BASE, BASELINE) and reference is not None:
            part = math.inf if run.diverged else _part_of_steps(run, reference)
            parts.setdefault(run.arm, {}).setdefault(run.rate, []).append(part)
    return {arm: {rate: mean(of_seeds) for rate, of_seeds in sorted(rates.items())} for arm, rates in parts.items()}


def _part_of_steps(run: Run, reference: Run) -> float:
    """Return the part of the reference's steps after which a run is at the reference's final validation loss."""
    steps, target = reference.result["validation_losses"][-1]
    return steps_to(run.result["validation_losses"], target) / steps


@dataclass(frozen=True)
class Summary:
    """One arm at one of its rates: means over the seeds, and (lowest, highest)."""

    arm: str
    rate: float
    num_seeds: int
    gain: Spread
    """Test gain, nats."""
    accuracy: float | None
    """Of what was learned, percent."""
    forgetting: Spread
    """Nats."""
    ratio: Spread | None
    """Its forgetting over LoRA's at matched gain, seed by seed."""
    ratio_at_gain: float | None
    """Its forgetting over LoRA's at this arm's own gain, of means over the seeds."""
    kept: dict[str, float]
    """Rise of each kept thing's loss, nats; below 0 where it fell."""
    accuracy_drops: dict[str, float]
    """Points of accuracy lost, of kept things that have one."""
    change_on_context: float
    change: float
    steps_to_baseline: float
    """Part of LoRA's steps after which the validation loss is at LoRA's final one; infinity if never."""
    parameters: int
    seconds: float
    """Of preparing and of training, each the least of all the arm's runs: others shared the machine, or collected the context too."""
    memory_gb: float


def summarise(
    runs: Sequence[Run], base: Run, baseline: Mapping[int, Run], line: Sequence[tuple[float, float]], arm: str, rate: float
) -> Summary:
    """Return the summary of an arm at a rate; ``baseline`` are LoRA's runs at matched gain by seed, ``line`` its points of all rates."""
    of_arm = [run for run in runs if run.arm == arm and not run.diverged]
    chosen = [run for run in of_arm if run.rate == rate]
    lost = {run.seed: forgetting_of(run.result["scores"], base) for run in chosen}
    reference = {seed: forgetting_of(run.result["scores"], base) for seed, run in baseline.items()}
    ratios = [lost[seed] / reference[seed] for seed in lost if reference.get(seed, 0) > 0]
    accuracies = [run.result["scores"][TARGET]["accuracy"] for run in chosen]
    gains = [gain_on_test(run, base) for run in chosen]
    expected = forgetting_at(mean(gains), line)
    steps = [_part_of_steps(run, baseline[run.seed]) for run in chosen if run.seed in baseline]
    return Summary(
        arm=arm,
        rate=rate,
        num_seeds=len(chosen),
        gain=spread(gains),
        accuracy=None if None in accuracies else mean(accuracies),
        forgetting=spread(list(lost.values())),
        ratio=spread(ratios) if ratios else None,
        ratio_at_gain=mean(lost.values()) / expected if expected > 0 else None,
        kept={name: mean(run.result["scores"][name]["loss"] - loss for run in chosen) for name, loss in kept_losses(base).items()},
        accuracy_drops={
            name: mean(score["accuracy"] - run.result["scores"][name]["accuracy"] for run in chosen)
            for name, score in kept_scores(base).items()
            if score["accuracy"] is not None
        },
        change_on_context=mean(run.result["change_on_context"] for run in chosen),
        change=mean(run.result["change"] for run in chosen),
        steps_to_baseline=mean(steps) if steps else math.inf,
        parameters=chosen[0].result["trainable_parameters"],
        seconds=sum(min(run.result["seconds"][part] for run in of_arm) for part in ("prepare", "train")),
        memory_gb=max(run.result["peak_memory_gb"] for run in chosen),
    )


def summaries(runs: Sequence[Run], base: Run) -> tuple[dict[str, Summary], dict[str, Summary]]:
    """Return the arms at their tuned rates, and those that learn as much as LoRA at their matched rates."""
    by_arm = _by_arm(runs)
    reference = matched_rate(by_arm[BASELINE], base, by_arm[BASELINE])
    baseline = {run.seed: run for run in by_arm[BASELINE] if run.rate == reference and not run.diverged}
    line = gains_and_forgetting(by_arm[BASELINE], base)
    tuned = {arm: rate for arm, of_arm in by_arm.items() if (rate := tuned_rate(of_arm, base)) is not None}
    matched = {arm: rate for arm, of_arm in by_arm.items() if (rate := matched_rate(of_arm, base, by_arm[BASELINE])) is not None}

    def summaries_at(rates: Mapping[str, float]) -> dict[str, Summary]:
        return {arm: summarise(runs, base, baseline, line, arm, rate) for arm, rate in rates.items()}

    return summaries_at(tuned), summaries_at(matched)


def _by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {arm: [run for run in runs if run.arm == arm] for arm in dict.fromkeys(run.arm for run in runs) if arm != BASE}


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (gain, forgetting) that no other beats in both, by rising gain."""
    front: list[tuple[float, float]] = []
    for gain, forgetting in sorted(points, key=lambda point: (-point[0], point[1])):
        if not front or forgetting < front[-1][1]:
            front.append((gain, forgetting))
    return front[::-1]


def spread(values: Sequence[float]) -> Spread:
    """Return mean, lowest and highest."""
    return mean(values), min(values), max(values)
