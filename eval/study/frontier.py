"""What a study's runs say: gain, forgetting, and each arm's curve of the two over its rates.

Gain: the fall of the loss of what is learned, in nats, from the base's, or from a guesser's where that is lower (``Task.guessing``); on the
validation samples for choosing and on the test samples for reporting.
Forgetting: the mean over the kept things of the rise of their loss, in nats; where one fell, that counts as 0 and makes up for no other.
A thing of which the base knows no more than a guesser (``kept_guessing`` of its record) cannot be forgotten: it counts for nothing.
Tuned: the smallest rate whose validation gain, the mean over the seeds that ran, is at least ``NEARLY`` of the arm's best.
Matched: the smallest rate whose validation gain is at least ``NEARLY`` of LoRA's best: where the other seeds run (``grid``). What an arm
forgets at LoRA's gain is read off its curve (``reading``).
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
ALPHA = ", α = "
"""Stands between the name of an arm and how much of it is left in an interpolation with the base."""
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
        # What the whole run is off the base (KL) nobody measured half-way.
        result = {key: value for key, value in run.result.items() if key not in ("kl", "finish")}
        for alpha, scores in run.result.get("interpolated", {}).items():
            last = run.result["validation_losses"][-1][0]
            here = {
                "scores": {name: score for name, score in scores.items() if name != "validation"},
                "validation_losses": [[last, scores["validation"]]],
                "change": float(alpha) * run.result["change"],
                "change_on_context": float(alpha) * run.result["change_on_context"],
            }
            with_between.append(Run(f"{run.arm}{ALPHA}{alpha}", run.rate, run.seed, result | here))
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


def between(arm: str) -> str | None:
    """Return the arm whose interpolation with the base this is (``with_interpolations``); None if it is none."""
    whole, alpha, _ = arm.partition(ALPHA)
    return whole if alpha else None


def kept_scores(base: Run) -> dict[str, Any]:
    """Return the base's scores of the things that are to be kept."""
    return {name: score for name, score in base.result["scores"].items() if name not in (TARGET, *base.result.get("learned", ()))}


def kept_losses(base: Run) -> dict[str, float]:
    """Return the base's losses of the things that are to be kept."""
    return {name: score["loss"] for name, score in kept_scores(base).items() if score["loss"] is not None}


def forgettable(base: Run) -> dict[str, float]:
    """Return ``kept_losses`` without the things of which the base knows no more than a guesser."""
    guessing = base.result.get("kept_guessing") or {}
    return {name: loss for name, loss in kept_losses(base).items() if loss < guessing.get(name, math.inf)}


def forgetting_of(scores: Mapping[str, Any], base: Run) -> float:
    """Return the mean rise of the losses of what can be forgotten, in nats; a fall counts as 0."""
    return mean(max(0.0, scores[name]["loss"] - loss) for name, loss in forgettable(base).items())


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


@dataclass(frozen=True)
class Curve:
    """An arm by rising rate, up to its largest test gain."""

    runs: tuple[tuple[Run, ...], ...]
    """At each rate the seeds whose loss stayed finite."""

    gains: tuple[float, ...]
    """Their mean test gain at each rate, nats; the last is the largest."""


def curve_of(runs: Sequence[Run], base: Run) -> Curve:
    """Return an arm's curve; without points if all its runs diverged."""
    whole = [run for run in runs if not run.diverged]
    by_rate = [tuple(run for run in whole if run.rate == rate) for rate in sorted({run.rate for run in whole})]
    gains = [mean(gain_on_test(run, base) for run in seeds) for seeds in by_rate]
    end = 1 + max(range(len(gains)), key=lambda place: gains[place], default=-1)
    return Curve(tuple(by_rate[:end]), tuple(gains[:end]))


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
    """One arm at its tuned rate: means over the seeds, and (lowest, highest)."""

    arm: str
    rate: float
    num_seeds: int
    gain: Spread
    """Test gain, nats."""
    accuracy: float | None
    """Of what was learned, percent."""
    forgetting: Spread
    """Nats."""
    kept: dict[str, float]
    """Rise of each kept thing's loss, nats; below 0 where it fell."""
    accuracy_drops: dict[str, float]
    """Points of accuracy lost, of kept things that have one."""
    still_right: dict[str, float]
    """Percent of the kept items that the base had right which are right now, where each item's answer is noted."""
    change_on_context: float | None
    """None where it is not measured, as ``change``."""
    change: float | None
    steps_to_baseline: float
    """Part of the steps of LoRA at its tuned rate after which the validation loss is at LoRA's final one; infinity if never."""
    parameters: int
    seconds: float
    """Of preparing and of training, each the least of all the arm's runs: others shared the machine, or collected the context too."""
    memory_gb: float


def summarise(runs: Sequence[Run], base: Run, baseline: Mapping[int, Run], rate: float) -> Summary:
    """Return the summary of an arm's runs at a rate; ``baseline`` are LoRA's at its tuned rate by seed."""
    whole = [run for run in runs if not run.diverged]
    chosen = [run for run in whole if run.rate == rate]
    accuracies = [run.result["scores"][TARGET]["accuracy"] for run in chosen]
    steps = [_part_of_steps(run, baseline[run.seed]) for run in chosen if run.seed in baseline]
    return Summary(
        arm=runs[0].arm,
        rate=rate,
        num_seeds=len(chosen),
        gain=spread([gain_on_test(run, base) for run in chosen]),
        accuracy=None if None in accuracies else mean(accuracies),
        forgetting=spread([forgetting_of(run.result["scores"], base) for run in chosen]),
        kept={name: mean(run.result["scores"][name]["loss"] - loss for run in chosen) for name, loss in kept_losses(base).items()},
        accuracy_drops={
            name: mean(score["accuracy"] - run.result["scores"][name]["accuracy"] for run in chosen)
            for name, score in kept_scores(base).items()
            if score["accuracy"] is not None
        },
        still_right=still_right(chosen, base),
        change_on_context=_mean_of(chosen, "change_on_context"),
        change=_mean_of(chosen, "change"),
        steps_to_baseline=mean(steps) if steps else math.inf,
        parameters=chosen[0].result["trainable_parameters"],
        seconds=sum(min(run.result["seconds"][part] for run in whole) for part in ("prepare", "train")),
        memory_gb=max(run.result["peak_memory_gb"] for run in chosen),
    )


def _mean_of(runs: Sequence[Run], what: str) -> float | None:
    """Return a mean over runs; None where one does not tell it."""
    values = [run.result[what] for run in runs]
    return None if None in values else mean(values)


def still_right(runs: Sequence[Run], base: Run) -> dict[str, float]:
    """Return by kept thing what part of the items that the base had right are right in the runs, percent, the mean over them.

    Things whose items' answers are not noted, of the base or of a run, and those of which the base had none right are left out.
    """
    parts = {}
    for name, score in kept_scores(base).items():
        known = [place for place, right in enumerate(score.get("right") or ()) if right]
        answers = [run.result["scores"][name].get("right") or () for run in runs]
        if known and all(len(each) == len(score["right"]) for each in answers):
            parts[name] = 100 * mean(mean(each[place] for place in known) for each in answers)
    return parts


def summaries(runs: Sequence[Run], base: Run) -> dict[str, Summary]:
    """Return the arms at their tuned rates; without those that learned nothing."""
    of_arms = by_arm(runs)
    tuned = {arm: rate for arm, of_arm in of_arms.items() if (rate := tuned_rate(of_arm, base)) is not None}
    baseline = {run.seed: run for run in of_arms[BASELINE] if run.rate == tuned[BASELINE] and not run.diverged}
    return {arm: summarise(of_arms[arm], base, baseline, rate) for arm, rate in tuned.items()}


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs by arm, without the base's."""
    return {arm: [run for run in runs if run.arm == arm] for arm in dict.fromkeys(run.arm for run in runs) if arm != BASE}


def spread(values: Sequence[float]) -> Spread:
    """Return mean, lowest and highest."""
    return mean(values), min(values), max(values)
