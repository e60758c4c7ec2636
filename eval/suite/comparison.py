"""Base against tuned, task by task: what was gained, what was forgotten, how sure that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from corda_eval.metrics import h_average, o_average
from corda_eval.metrics.intervals import bootstrap_interval
from corda_eval.records import TaskResult

PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics of which less is better."""


@dataclass(frozen=True)
class Row:
    """One task before and after."""

    task: str
    role: str
    """"target": it was trained; "kept": it should not suffer."""
    metric: str
    num_examples: int
    before: float
    after: float
    interval: tuple[float, float] | None
    """95 % of ``after − before``, by paired bootstrap over the examples; None where they do not add up to the metric."""
    higher_is_better: bool

    @property
    def drop(self) -> float:
        """What was lost, in the metric's unit; negative if it got better."""
        return self.before - self.after if self.higher_is_better else self.after - self.before

    @property
    def retention(self) -> float | None:
        """What fraction of the score is left: after / before, of perplexities before / after; None where that is 0."""
        whole, rest = (self.before, self.after) if self.higher_is_better else (self.after, self.before)
        return rest / whole if whole else None


@dataclass(frozen=True)
class Measured:
    """A base and what was tuned from it, on the tasks of a suite."""

    results: Mapping[str, Sequence[TaskResult]]
    """By model; the base's are the first."""
    rows: Mapping[str, Sequence[Row]]
    """By tuned model."""
    changes: Mapping[str, float]
    """By what fraction its weights changed, of each tuned model of which that is known."""
    facts: Mapping[str, str]
    """What was run, by label."""
    seconds: float


@dataclass(frozen=True)
class Averages:
    """Over the tasks whose scores are fractions; in percent."""

    gain: float | None
    """Mean of after − before over target tasks."""
    kept_drop: float | None
    """Mean of before − after over kept tasks."""
    worst_drop: float | None
    o_average: float | None
    """(S + T) / 2, S the mean of kept and T of target scores after training."""
    h_average: float | None
    """2 S T / (S + T)."""


def compare(before: Sequence[TaskResult], after: Sequence[TaskResult], roles: Mapping[str, str]) -> list[Row]:
    """Return the rows of the tasks, targets first.

    Args:
        before: The base's results.
        after: The tuned model's, of the same tasks and examples.
        roles: "target" or "kept" by task.

    Raises:
        ValueError: If the two are not of the same tasks, or of other examples.
    """
    tuned = {result.task: result for result in after}
    if tuned.keys() != {result.task for result in before}:
        missing = sorted(tuned.keys() ^ {result.task for result in before})
        raise ValueError(f"The task {missing[0]} was done with one of base and tuned model only; do it with both.")
    rows = []
    for base in before:
        after_training = tuned[base.task]
        asked, answered = ([record["id"] for record in result.records] for result in (base, after_training))
        if asked != answered:
            raise ValueError(
                f"{base.task} asked the base and the tuned model other examples ({len(asked)} and {len(answered)}); do it anew."
            )
        rows.append(_row(base, after_training, roles[base.task]))
    return sorted(rows, key=lambda row: row.role != "target")


def averages(rows: Sequence[Row]) -> Averages:
    """Return the averages of rows whose metric is a fraction."""
    target = [row for row in rows if row.role == "target" and row.higher_is_better]
    kept = [row for row in rows if row.role == "kept" and row.higher_is_better]
    both = bool(target and kept)
    after = [[100 * row.after for row in group] for group in (kept, target)]
    return Averages(
        gain=100 * _mean([-row.drop for row in target]) if target else None,
        kept_drop=100 * _mean([row.drop for row in kept]) if kept else None,
        worst_drop=100 * max(row.drop for row in kept) if kept else None,
        o_average=o_average(*after) if both else None,
        h_average=h_average(*after) if both else None,
    )


def _row(base: TaskResult, tuned: TaskResult, role: str) -> Row:
    before, after = base.metrics[base.headline], tuned.metrics[tuned.headline]
    name = base.headline.partition(",")[0]
    # F1, recall by class and perplexities a word do not follow from the mean of the examples' scores: no interval then.
    candidates = (float, _of_losses, _of_likelihoods)
    metric = next((of_mean for of_mean in candidates if math.isclose(of_mean(_mean(base.scores)), before, rel_tol=1e-6)), None)
    interval = None if metric is None else bootstrap_interval(base.scores, tuned.scores, metric)
    return Row(base.task, role, base.headline, base.num_examples, before, after, interval, name not in PERPLEXITIES)


def _of_losses(mean: float) -> float:
    """Return the perplexity of a mean loss in nats."""
    return math.exp(min(mean, 700.0))


def _of_likelihoods(mean: float) -> float:
    """Return the perplexity of a mean log-likelihood."""
    return _of_losses(-mean)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
