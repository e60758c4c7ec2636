"""What is tried on a user's own task: a recipe's lines for LoRA, ``strict``, and LoRA that is held to the base."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from corda_core import Mode
from corda_core.attach import Residual
from corda_core.lora import Protect
from corda_eval.study.frontier import BASELINE
from corda_vlm.config import CordaConfig, Variant
from corda_vlm.options import Count, Options, Positive
from corda_vlm.training.keep import KeepOptions
from corda_vlm.training.recipe import KeepConfig, Recipe, TrainingConfig
from corda_vlm.yaml import from_mapping

KIND, CONTEXT = "own", "context"
"""What a study's config calls such a setting, and the name of what is kept in it."""
HELD = "lora_keep"
"""The arm that is held to the base."""


@dataclass(frozen=True)
class Arm(Options):
    """What of a recipe an arm changes."""

    start: Literal["lora", "strict", "recipe"]
    """Plain LoRA, A frozen away from the context, or what the recipe asks for."""

    rank: Count
    keep: Mapping[str, Any] | None = None
    """Options of ``keep`` in a recipe."""
    max_drift: Positive | None = None
    """``training.max_drift``."""

    def applied(self, recipe: Recipe, rate: float, steps: int, seed: int) -> Recipe:
        """Return the recipe of one run of this arm."""
        training = replace(
            at_rate(recipe.training, rate),
            steps=steps,
            max_drift=self.max_drift,
            save_every=recipe.training.log_every,
            evaluate_every=None,
            log_to="none",
        )
        keep = None if self.keep is None else KeepConfig(**self.keep, samples=None if recipe.keep is None else recipe.keep.samples)
        corda = replace(self.adapter(recipe.corda), seed=seed)
        return replace(recipe, corda=corda, training=training, keep=keep, evaluation=None, seed=seed)

    def adapter(self, corda: CordaConfig) -> CordaConfig:
        """Return how the adapter is prepared: on the layers that the recipe names, in its precision."""
        if self.start == "recipe":
            return replace(corda, residual=Residual.OFFSET)  # the same function, of a base that can be run without it
        alpha = None if corda.alpha is None else corda.alpha * self.rank / corda.rank  # the same scaling
        if self.start == "strict":
            return replace(corda, mode=Mode.KPM, rank=self.rank, alpha=alpha, protect=Protect.STRICT, residual=Residual.OFFSET)
        return replace(
            corda,
            mode=Mode.LORA,
            rank=self.rank,
            alpha=alpha,
            protect=None,
            residual=Residual.OFFSET,
            variant=Variant.CORDA,
            candidates=None,
            budget=None,
            min_rank=1,
            max_rank=None,
            tokens="all",
        )


def at_rate(training: TrainingConfig, rate: float) -> TrainingConfig:
    """Return the options with another peak rate, those of the parts in the same ratio to it as before."""
    times = rate / training.learning_rate
    parts = (training.projector_learning_rate, training.vision_learning_rate)
    projector, vision = (None if part is None else part * times for part in parts)
    return replace(training, learning_rate=rate, projector_learning_rate=projector, vision_learning_rate=vision)


def arms_for(recipe: Recipe) -> dict[str, Arm]:
    """Return what is tried, by name.

    Plain LoRA; ``strict`` with twice its rank (as many parameters), by itself and with its drift bounded; LoRA held to the base by its KL
    every fourth step; and what the recipe asks for, where it is none of these.
    """
    strict = recipe.corda.protection is Protect.STRICT
    rank = max(1, recipe.corda.rank // 2) if strict else recipe.corda.rank
    held = {} if recipe.keep is None else {field.name: getattr(recipe.keep, field.name) for field in dataclasses.fields(KeepOptions)}
    arms = {
        BASELINE: Arm("lora", rank),
        "strict": Arm("strict", 2 * rank),
        "strict_bound": Arm("strict", 2 * rank, max_drift=recipe.training.max_drift or 0.02),
        HELD: Arm("lora", rank, keep={"every": 4} | held | {"kind": "distill"}),
    }
    mine = Arm("recipe", recipe.corda.rank, None if recipe.keep is None else held, recipe.training.max_drift)
    known = [_trained(arm, recipe) for arm in arms.values()]
    return arms if _trained(mine, recipe) in known else arms | {"recipe": mine}


def _trained(arm: Arm, recipe: Recipe) -> tuple[Any, ...]:
    """Return all that tells an arm from another."""
    corda = arm.adapter(recipe.corda)
    return replace(corda, protect=corda.protection), arm.keep, arm.max_drift


def arm_of(options: Mapping[str, Any]) -> Arm:
    """Return the arm that a study's options tell of.

    Raises:
        ValueError: If they are not those of one.
    """
    return from_mapping({key: value for key, value in options.items() if key not in ("method", "rates")}, Arm, "arm")
