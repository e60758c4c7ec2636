"""Forgetting over other draws of the items that it was measured on: how much of it is the luck of the questions.

A run's record has each item's loss of each thing in thousandths of a nat (``scores[name]["losses"]``). The same items are drawn, with
replacement, for the base and for every run, so that what makes an item hard cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from corda_eval.metrics.intervals import DRAWS
from corda_eval.study.frontier import Run, forgettable

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Drawn:
    """One run's forgetting on other draws of items."""

    forgetting: Array
    """(DRAWS,), nats, as ``forgetting_of``."""

    error: float
    """Its standard error over the items, nats."""


def drawn_forgetting(runs: Sequence[Run], base: Run) -> dict[tuple[str, float, int], Drawn]:
    """Return by arm, rate and seed what the runs forget on 2,000 draws of each kept thing's items, from a fixed seed.

    Without the runs whose items are not noted, or are not as many as the base's; all of them if the base's are not.
    """
    before = {name: _losses(base, name) for name in forgettable(base)}
    if not before or any(losses is None for losses in before.values()):
        return {}
    generator = np.random.default_rng(0)
    shares = {
        name: generator.multinomial(len(a), np.full(len(a), 1 / len(a)), DRAWS) / len(a) for name, a in before.items() if a is not None
    }
    drawn = {}
    for run in runs:
        after = {name: None if run.diverged else _losses(run, name) for name in before}
        rises = [
            b - a for a, b in zip(before.values(), after.values(), strict=True) if a is not None and b is not None and len(a) == len(b)
        ]
        if len(rises) == len(before):
            means = [share @ rise for share, rise in zip(shares.values(), rises, strict=True)]
            error = math.sqrt(sum(rise.var() / len(rise) for rise in rises)) / len(rises)
            drawn[run.arm, run.rate, run.seed] = Drawn(np.maximum(means, 0.0).mean(axis=0), error)
    return drawn


def drawn_at(drawn: dict[tuple[str, float, int], Drawn], seeds: Sequence[Run]) -> Drawn | None:
    """Return the mean over an arm's seeds at one rate; None if one has no items. The seeds share them: more make no smaller error."""
    these = [drawn.get((run.arm, run.rate, run.seed)) for run in seeds]
    known = [one for one in these if one is not None]
    if len(known) < len(these):
        return None
    return Drawn(np.mean([one.forgetting for one in known], axis=0), mean(one.error for one in known))


def _losses(run: Run, name: str) -> Array | None:
    """Return the items' losses in nats; None where they are not noted."""
    losses = run.result["scores"][name].get("losses")
    return np.asarray(losses, dtype=float) / 1000 if losses else None
