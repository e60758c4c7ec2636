"""A user's own task as a setting of a study: what is tried on it, and which lines of a recipe follow.

Each arm is trained by the Trainer that ``corda-vlm train`` uses, with the recipe's own options but for the adapter, the rate and the number
of steps, so that what is found holds for the recipe. What is measured is in no training and no context (``corda_eval.study.own_run``).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from corda_core.files import json_digest
from corda_eval.study.frontier import BASE, Run, base_run, gain_of
from corda_eval.study.grid import StudyConfig
from corda_eval.study.own_arms import CONTEXT, HELD, KIND, Arm, arm_of, arms_for, at_rate
from corda_vlm.config import CordaConfig
from corda_vlm.data.sources import DataConfig
from corda_vlm.training.estimate import estimate
from corda_vlm.training.models import LOCAL
from corda_vlm.training.recipe import Recipe, values_of, write_recipe

SETTING = "task"
"""The setting's name."""
FROZEN_BEARS = 3.0
"""How much higher a rate an adapter with a frozen A is tried at: what it learns best at on the models of our own studies."""
SPREAD = 10**0.5
"""Between the rates that are tried."""


@dataclass(frozen=True)
class OwnTask:
    """A recipe and the study of its task."""

    recipe: Recipe
    study: StudyConfig

    @staticmethod
    def of(recipe: Recipe, results: Path, steps: int, rates: Sequence[float], seeds: int) -> "OwnTask":
        """Return the study of a recipe's own task.

        Args:
            recipe: The user's.
            results: Folder of the finished runs; those of another recipe, or of files that have changed since, are not taken.
            steps: Of each run.
            rates: LoRA's, by default three around the recipe's; those of arms with a frozen A are ``FROZEN_BEARS`` times as high.
            seeds: Of each arm and rate.

        Raises:
            ValueError: If the recipe does not say what is to be kept.
        """
        if recipe.context is None or recipe.corda.mode == "ipm":
            raise ValueError(
                "The recipe has no context of what is to be kept (corda.mode: kpm or lora), by which arms could be judged; name some "
                "samples, or context: self for some that the base writes."
            )
        own_rate = recipe.training.learning_rate
        rates = rates or [float(f"{own_rate / SPREAD:.1e}"), own_rate, float(f"{own_rate * SPREAD:.1e}")]
        digest = json_digest({"recipe": values_of(replace(recipe, output="")), "files": _states(recipe)})
        arms = {}
        for name, arm in arms_for(recipe).items():
            times = FROZEN_BEARS if arm.start == "strict" else 1.0
            arms[name] = {"method": KIND, **dataclasses.asdict(arm), "rates": [float(f"{rate * times:.3g}") for rate in rates]}
        setting = {"kind": KIND, "recipe": str(results / f"recipe-{digest[:12]}.yaml"), "steps": steps}
        threads = torch.get_num_threads()
        return OwnTask(recipe, StudyConfig({SETTING: setting}, arms, rates, seeds, climb=False, threads=threads, results=str(results)))

    def write_recipe(self) -> None:
        """Write the recipe where the runs read it."""
        write_recipe(self.recipe, Path(self.study.settings[SETTING]["recipe"]))

    def cost(self) -> str:
        """Return what the study will take, for a terminal: reads no weights.

        Raises:
            ValueError: If the model is not here, or an option does not fit it.
        """
        steps, lines, total, count = self.study.settings[SETTING]["steps"], [], 0.0, 0
        for name, options in self.study.arms.items():
            rates: Sequence[float] = options["rates"]
            taken = estimate(arm_of(options).applied(self.recipe, rates[0], steps, 0))
            seconds = (taken.context_flops + taken.decomposition_flops + (taken.training_flops or 0.0)) / taken.flops_per_second
            count, total = count + len(rates) * self.study.seeds, total + seconds * len(rates) * self.study.seeds
            named = ", ".join(f"{rate:g}" for rate in rates)
            lines.append(f"  {name}: rates {named}; {taken.num_trainable:,} parameters train; {_time(seconds)} a run")
        return "\n".join(
            [f"{count} runs of {steps} steps, and the base: about {_time(total)} of matrix products, without measuring", *lines]
        )

    def advice(self, runs: Sequence[Run], max_kl: float) -> tuple[str, Recipe | None]:
        """Return what to train, in words and as a recipe; no recipe where no run was finite.

        It is the arm and rate that gain most at a KL to the base of at most ``max_kl`` nats on held-out samples of the context; where none
        is within, LoRA that is held to it as a budget, at the rate at which it gains most.

        Raises:
            ValueError: If the base has not been measured.
        """
        points = points_of(runs)
        within = [point for point in points if point.kl <= max_kl]
        if within:
            best = max(within, key=lambda point: (point.gain, -point.kl))
            arm = arm_of(self.study.arms[best.arm])
            says = f"Of what forgets at most {max_kl:g} nats, {best} learns most."
        elif points:
            least = min(points, key=lambda point: point.kl)
            best = max((point for point in points if point.arm == HELD), key=lambda point: point.gain, default=least)
            held = arm_of(self.study.arms[HELD])
            arm = replace(held, keep={**(held.keep or {}), "budget": max_kl})
            says = f"Nothing stays within {max_kl:g} nats; the least is {least}. LoRA held to that budget:"
        else:
            return "No run was finite: try lower --rates.", None
        return f"{says}\n{_lines(arm, arm.adapter(self.recipe.corda), best.rate)}", self._with(arm, best.rate)

    def _with(self, arm: Arm, rate: float) -> Recipe:
        """Return the recipe with an arm's options put in; of the steps it says what it said."""
        applied = arm.applied(self.recipe, rate, 1, self.recipe.seed)
        training = replace(at_rate(self.recipe.training, rate), max_drift=arm.max_drift)
        return replace(self.recipe, corda=arm.adapter(self.recipe.corda), keep=applied.keep, training=training)


@dataclass(frozen=True)
class Point:
    """What an arm at a rate came to: means over the seeds."""

    arm: str
    rate: float
    gain: float
    """Nats, on the validation samples."""
    kl: float
    """To the base, on held-out samples of the context, nats."""

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.arm} at {self.rate:g} (gain {self.gain:.3f} nats, KL to the base {self.kl:.4f})"


def points_of(runs: Sequence[Run]) -> list[Point]:
    """Return all arms at all rates at which every seed's loss was finite.

    Raises:
        ValueError: If the base has not been measured.
    """
    base = base_run(runs)
    if base is None:
        raise ValueError("The base has not been measured; run compare without --only-report.")
    points = []
    for arm, rate in sorted({(run.arm, run.rate) for run in runs if run.arm != BASE}):
        seeds = [run for run in runs if (run.arm, run.rate) == (arm, rate)]
        if not any(run.diverged for run in seeds):
            points.append(Point(arm, rate, mean(gain_of(run, base) for run in seeds), mean(run.result["kl"][CONTEXT] for run in seeds)))
    return points


def _lines(arm: Arm, corda: CordaConfig, rate: float) -> str:
    """Return the lines of a recipe that an arm decides."""
    lines: dict[str, Any] = {
        "corda": {"mode": str(corda.mode), "rank": corda.rank, "protect": str(corda.protection)},
        "training": {"learning_rate": rate} | ({} if arm.max_drift is None else {"max_drift": arm.max_drift}),
    }
    if arm.keep is not None:
        lines["keep"] = {name: str(value) if name == "kind" else value for name, value in arm.keep.items() if value is not None}
    return yaml.safe_dump(lines, sort_keys=False, default_flow_style=None).rstrip()


def _states(recipe: Recipe) -> dict[str, list[int]]:
    """Return size and time of the files that a recipe reads samples and weights from, but for pictures."""
    sources = [recipe.data, recipe.evaluation, None if recipe.keep is None else recipe.keep.samples]
    names = [*recipe.context_names, *(data.source for data in sources if data is not None), recipe.model.path]
    names += [recipe.context.source] if isinstance(recipe.context, DataConfig) else []
    names += [recipe.model.weights] if recipe.model.weights is not None else []
    places = [Path(name.removeprefix(LOCAL)).expanduser() for name in names]
    files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place]) if file.is_file()]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
