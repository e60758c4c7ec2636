"""One run of a study, in a process of its own: ``python -m corda_eval.study.worker SPEC.json RESULT.json CACHE``."""

import dataclasses
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from corda_core import Covariance
from corda_core.bases import base_digest
from corda_eval.records import library_versions, peak_memory_gb, write_sealed
from corda_eval.study import own_arms, sequence
from corda_eval.study.change import interpolated, kl_from_base, linear_copies, relative_changes
from corda_eval.study.methods import METHODS
from corda_eval.study.named import options_of
from corda_eval.study.own_run import run_own
from corda_eval.study.settings import SETTINGS
from corda_eval.study.task import Adapted, Task, plain_scores
from corda_eval.study.train import train
from corda_vlm.options import NotNegative, Options, Seed


@dataclass(frozen=True)
class RunSpec(Options):
    """All that decides a run's outcome."""

    setting: Mapping[str, Any]
    """``kind`` and its options."""

    method: Mapping[str, Any] | None
    """``method`` and its options; None measures the base."""

    rate: NotNegative
    """Peak learning rate."""

    seed: Seed
    alphas: Sequence[float]
    """Interpolations with the base that are measured too (WiSE-FT)."""


def run(spec: RunSpec, cache: Path) -> dict[str, Any]:
    """Return what one run found: scores, size of the change, losses on the way, parameters, seconds and memory.

    Raises:
        ValueError: If setting or method are unknown, or their options wrong.
    """
    torch.manual_seed(spec.seed)
    kind = spec.setting.get("kind")
    if kind in (own_arms.KIND, sequence.KIND):
        return {"spec": dataclasses.asdict(spec), "versions": _versions(), **_of_another_kind(spec, cache)}
    task = options_of(spec.setting, "kind", SETTINGS, "setting").task(spec.seed, cache)
    about = {"spec": dataclasses.asdict(spec), "base_digest": base_digest(task.model, task.layers), "versions": _versions()}
    if spec.method is None:
        scores = plain_scores(task.measure(task.model))
        measured = {"scores": scores, "validation": task.validate(task.model), "learned": list(task.learned)}
        guessing = task.guessing if math.isfinite(task.guessing) else None
        return about | measured | {"guessing": guessing, "kept_guessing": dict(task.kept_guessing)}
    originals = linear_copies(task.model, task.layers)
    kept = task.covariances(*task.default_context("kpm"))  # of the base: cannot be collected once it is adapted
    start = time.perf_counter()
    adapted: Adapted = options_of(spec.method, "method", METHODS, "method").adapt(task)
    prepared = time.perf_counter() - start
    trained = train(adapted, task, spec.rate)
    result = about | {
        "trainable_parameters": sum(p.numel() for p in adapted.model.parameters() if p.requires_grad),
        "diverged": trained.diverged,
        "training_losses": [round(loss, 5) for loss in trained.training_losses],
        "validation_losses": [[step, round(loss, 5)] for step, loss in trained.validation_losses],
        "seconds": {"prepare": round(prepared, 2), "train": round(trained.seconds, 2)},
        "peak_memory_gb": round(peak_memory_gb(), 3),
        **({"finish": dict(trained.finish)} if trained.finish else {}),
    }
    return result if trained.diverged else result | _measured(adapted, task, originals, kept, spec.alphas)


def _of_another_kind(spec: RunSpec, cache: Path) -> dict[str, Any]:
    """Return what a run found on a user's own task, or on tasks in a row."""
    if spec.setting["kind"] == own_arms.KIND:
        arm = None if spec.method is None else own_arms.arm_of(spec.method)
        return run_own(spec.setting, arm, spec.rate, spec.seed, cache)
    setting = options_of(spec.setting, "kind", {sequence.KIND: sequence.InTurn}, "setting")
    return sequence.run_in_turn(setting, spec.method, spec.rate, spec.seed, cache)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **library_versions()}


def _measured(
    adapted: Adapted, task: Task, originals: Mapping[str, torch.nn.Linear], kept: Mapping[str, Covariance], alphas: Sequence[float]
) -> dict[str, Any]:
    """Return the scores of the trained model, of its interpolations with the base, and the size of the change."""
    scores = plain_scores(task.measure(adapted.model))
    between = {}
    for alpha in alphas:
        with interpolated(adapted.model, originals, alpha):
            between[str(alpha)] = plain_scores(task.measure(adapted.model), items=False) | {"validation": task.validate(adapted.model)}
    on_context, plain = relative_changes(adapted.model, originals, kept)
    measured = {"scores": scores, "interpolated": between, "change_on_context": on_context, "change": plain}
    with task.casting():
        kl = {name: kl_from_base(adapted.model, originals, batches) for name, batches in task.held_out.items()}
    if task.kept_kl is not None:
        kl |= task.kept_kl(adapted.model)
    return measured | ({"kl": kl} if kl else {})


def main(spec: Path, result: Path, cache: Path) -> None:
    """Run what a JSON file specifies and write the result whole."""
    write_sealed(result, run(RunSpec(**json.loads(spec.read_text())), cache))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
