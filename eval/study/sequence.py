"""One task after another: each is learned by an adapter, which is merged before the next is prepared.

What each method may know of the past is its own: nothing (LoRA); what the base writes itself (a context ``self``); or the covariances
of the base's context and of all past tasks, as keep files hold them (a context ``files``), no sample of which is looked at again.
After each task all are measured, which gives a matrix R (tasks + 1, tasks), row 0 the base's. From it, as in arXiv 1706.08840:
average ``mean_j R[T, j]``, backward transfer ``mean_(j < T) R[T, j] − R[j, j]``.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import PeftModel
from torch import nn

from corda_core import Covariance, merge
from corda_core.bases import base_digest
from corda_eval.records import peak_memory_gb
from corda_eval.study.methods import METHODS
from corda_eval.study.named import options_of
from corda_eval.study.settings import SETTINGS
from corda_eval.study.task import TARGET, Score, Task, plain_scores
from corda_eval.study.train import train

KIND = "sequence"
"""What a study's config calls such a setting."""


@dataclass(frozen=True)
class InTurn:
    """Options of the setting."""

    tasks: Sequence[Mapping[str, Any]]
    """Settings of one base model, in the order in which they are learned: ``kind`` and its options. What is to be kept of the base is what
    the first of them keeps."""

    def __post_init__(self) -> None:
        """Refuse a sequence of one.

        Raises:
            ValueError: If there are fewer than two tasks.
        """
        if len(self.tasks) < 2:
            raise ValueError(f"tasks has {len(self.tasks)} entries; expected at least two settings, one to be learned after the other.")

    def drawn(self, seed: int, cache: Path) -> list[Task]:
        """Return the tasks, each on a base of its own."""
        return [options_of(options, "kind", SETTINGS, "setting").task(seed, cache) for options in self.tasks]


@dataclass
class History:
    """What became of a model that learns one task after another."""

    model: nn.Module
    rows: list[list[Score]]
    """R: of each task after each stage, before the first too."""
    remembered: list[Mapping[str, Covariance]] = field(default_factory=list)
    """Covariances of the base's context, and of each past task."""
    seconds: float = 0.0
    parameters: int = 0
    training_losses: list[float] = field(default_factory=list)


def run_in_turn(setting: InTurn, method: Mapping[str, Any] | None, rate: float, seed: int, cache: Path) -> dict[str, Any]:
    """Return what one run found, as ``corda_eval.study.worker`` records it; without a method the base's scores.

    ``scores`` has under ``TARGET`` the mean over all tasks in the end, and what is to be kept of the base; ``matrix`` R.

    Raises:
        ValueError: If a task or the method is unknown, an option wrong, or a method leaves no adapter that can be merged.
    """
    tasks = setting.drawn(seed, cache)
    first = tasks[0]
    about = {"base_digest": base_digest(first.model, first.layers)}
    history = History(first.model, [_targets(first.model, tasks)])
    if method is None:
        return (
            about
            | _measured(history, tasks)
            | {
                "validation": _validated(first.model, tasks),
                "learned": [],
                "guessing": _guessing(tasks, history.rows[0]),
                "kept_guessing": dict(first.kept_guessing),
            }
        )
    history.remembered.append(first.covariances(*first.default_context("kpm")))
    for task in tasks:
        if not _learned(replace(task, model=history.model, remembered=tuple(history.remembered)), method, rate, history):
            return about | _costs(history) | {"diverged": True, "validation_losses": []}
        history.remembered.append(replace(task, model=history.model).covariances(TARGET))
        history.rows.append(_targets(history.model, tasks))
    steps = sum(len(task.batches) for task in tasks)
    ends = {"diverged": False, "validation_losses": [[steps, round(_validated(history.model, tasks), 5)]], "interpolated": {}}
    sizes = {"change": None, "change_on_context": None}
    return about | _costs(history) | _measured(history, tasks) | ends | sizes


def _learned(task: Task, method: Mapping[str, Any], rate: float, history: History) -> bool:
    """Learn one task and merge what was learned; return whether the loss stayed finite."""
    start = time.perf_counter()
    adapted = options_of(method, "method", METHODS, "method").adapt(task)
    if not isinstance(adapted.model, PeftModel):
        raise ValueError(f"The method {method.get('method')!r} leaves no adapter to merge before the next task; take another.")
    history.parameters = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    trained = train(adapted, task, rate)
    history.training_losses += [round(loss, 5) for loss in trained.training_losses]
    history.seconds += time.perf_counter() - start
    if trained.diverged:
        return False
    history.model = merge(adapted.model).eval().requires_grad_(False)
    return True


def _targets(model: nn.Module, tasks: Sequence[Task]) -> list[Score]:
    return [task.measure(model)[TARGET] for task in tasks]


def _validated(model: nn.Module, tasks: Sequence[Task]) -> float:
    return fmean(task.validate(model) for task in tasks)


def _guessing(tasks: Sequence[Task], base: Sequence[Score]) -> float | None:
    """Return what gains count from: the mean of each task's guesser, or of its base's loss where that is lower."""
    mean = fmean(min(task.guessing, math.inf if score.loss is None else score.loss) for task, score in zip(tasks, base, strict=True))
    return mean if math.isfinite(mean) else None


def _measured(history: History, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return the scores of the end, the mean over the tasks as what was learned, and the matrix."""
    last = history.rows[-1]
    losses = [score.loss for score in last if score.loss is not None]
    right = [score.accuracy for score in last if score.accuracy is not None]
    mean = Score(fmean(losses), fmean(right) if len(right) == len(last) else None)
    kept = {name: score for name, score in tasks[0].measure(history.model).items() if name not in (TARGET, *tasks[0].learned)}
    plain = plain_scores({TARGET: mean} | kept, items=False)
    return {"scores": plain, "matrix": [[[score.loss, score.accuracy] for score in row] for row in history.rows]}


def _costs(history: History) -> dict[str, Any]:
    return {
        "trainable_parameters": history.parameters,
        "training_losses": history.training_losses,
        "seconds": {"prepare": 0.0, "train": round(history.seconds, 2)},
        "peak_memory_gb": round(peak_memory_gb(), 3),
    }


def average(matrix: Sequence[Sequence[Sequence[float]]], place: int = 1) -> float:
    """Return the mean over all tasks in the end: of losses (``place`` 0, nats) or of accuracies (1, percent)."""
    return fmean(score[place] for score in matrix[-1])


def backward_transfer(matrix: Sequence[Sequence[Sequence[float]]], place: int = 1) -> float:
    """Return how much the earlier tasks changed from when each had just been learned to the end; below 0 where accuracies were lost."""
    count = len(matrix) - 1
    return fmean(matrix[-1][task][place] - matrix[task + 1][task][place] for task in range(count - 1))
