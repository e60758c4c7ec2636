"""Train what a method has made ready: AdamW, cosine, the same batches in the same order for all methods."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from corda_eval.study.precision import cast_once
from corda_eval.study.task import Adapted, Task
from corda_vlm.context import progress_bar

VALIDATIONS = 10
"""How often what was learned is measured on the way."""


@dataclass(frozen=True)
class TrainingRun:
    """How a training went."""

    training_losses: list[float]
    """Of each step, in nats, without penalties."""

    validation_losses: list[tuple[int, float]]
    """(steps done, loss) from step 0 on."""

    seconds: float
    """Of the steps alone."""

    diverged: bool
    """Whether a loss was not finite; the training then ends."""

    finish: Mapping[str, float] = field(default_factory=dict)
    """What ``Adapted.finish`` returned."""


def train(adapted: Adapted, task: Task, rate: float) -> TrainingRun:
    """Train on each batch once. The peak rate is reached after ``adapted.warmup`` of the steps; gradients are clipped to the norm 1."""
    with cast_once(adapted.model, task.casting):
        trained = _trained(adapted, task, rate)
    if trained.diverged:
        return trained
    finish = {} if adapted.finish is None else adapted.finish()
    last = task.validate(adapted.model)
    validation = [*trained.validation_losses, (len(task.batches), last)]
    return replace(trained, validation_losses=validation, diverged=not math.isfinite(last), finish=finish)


def _trained(adapted: Adapted, task: Task, rate: float) -> TrainingRun:
    """Return how the steps went, without what is done and measured after the last."""
    trainable = [parameter for parameter in adapted.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=adapted.weight_decay)
    count = len(task.batches)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(adapted.warmup * count)), count)
    every = max(1, count // VALIDATIONS)
    losses: list[float] = []
    validation = [(0, task.validate(adapted.model))]
    seconds = 0.0
    for step, batch in enumerate(progress_bar(task.batches, "train"), 1):
        start = time.perf_counter()
        adapted.model.train()
        loss = task.loss(adapted.model, batch)
        losses.append(loss.item())
        penalty = None if adapted.penalty is None else adapted.penalty()
        (loss if penalty is None else loss + penalty).backward()
        norm = nn.utils.clip_grad_norm_(trainable, 1.0)
        if not torch.isfinite(norm):
            return TrainingRun(losses, validation, seconds, diverged=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if adapted.after_step is not None:
            adapted.after_step()
        seconds += time.perf_counter() - start
        if step % every == 0 and step < count:
            validation.append((step, task.validate(adapted.model)))
    return TrainingRun(losses, validation, seconds, diverged=False)
