"""One run on a user's own task: the base measured, or an arm trained by the product's Trainer and measured.

Learned: the samples of ``data`` that are not held out. Validation and test: those of ``evaluation`` in turns, or without it some of
``data``. Kept: samples of the context (or of ``keep.samples``, where the context holds none) that neither covariances nor keeping sees;
their own loss, and ``KL(base ‖ arm)``. The same samples are held out in every run; a seed draws the order of the training and the context.
"""

import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Subset
from transformers import set_seed
from transformers.trainer_utils import SaveStrategy

from corda_core import weight_change
from corda_core.bases import base_digest
from corda_core.linears import base_of, evaluating
from corda_eval.records import peak_memory_gb
from corda_eval.study.methods.keep import numbers_of
from corda_eval.study.own_arms import CONTEXT, Arm
from corda_eval.study.task import TARGET, Score, plain_scores
from corda_vlm.context import Sources, collator_for, draw_contexts, is_keep_file, model_inputs
from corda_vlm.data.samples import Collator
from corda_vlm.data.sources import DataConfig
from corda_vlm.prepare import attach_plan, plan_contexts
from corda_vlm.selfwritten import read_self_context, self_context
from corda_vlm.towers import has_two_towers, select_layers
from corda_vlm.training.arguments import training_arguments
from corda_vlm.training.contexts import Joined, items_of
from corda_vlm.training.contrastive import contrastive_loss, features_of
from corda_vlm.training.divergence import context_kl
from corda_vlm.training.models import load_base, network_only_if
from corda_vlm.training.recipe import SELF, Recipe, read_recipe
from corda_vlm.training.run import check_fits, keeping, raise_what_trains_whole_, recipe_trainer
from corda_vlm.training.train import NotFiniteError, losses_of

HELD_OUT = 64
"""How many samples are measured at most: for validation, for the test, and of what is kept, each."""
PART = 5
"""At most one in so many samples of a source is held out."""


@dataclass(frozen=True)
class Samples:
    """What a run learns, keeps and is measured on."""

    training: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    context: Sources
    """For covariances."""
    keep: Sequence[Any]
    """For a loss."""
    kept: Sequence[Any]
    """Measured."""


def run_own(setting: Mapping[str, Any], arm: Arm | None, rate: float, seed: int, cache: Path) -> dict[str, Any]:
    """Return what one run found, as ``corda_eval.study.worker`` records it; without an arm the base's scores.

    Raises:
        ValueError: If the recipe, a sample or the model is not right, or there are too few samples to hold some out.
    """
    asked = read_recipe(Path(setting["recipe"]))
    steps = int(setting["steps"])
    with tempfile.TemporaryDirectory() as scratch, network_only_if(asked.model.download):
        recipe = replace(asked if arm is None else arm.applied(asked, rate, steps, seed), output=scratch)
        set_seed(seed)
        arguments = training_arguments(recipe)
        arguments.save_strategy = SaveStrategy.NO
        model, processor = load_base(recipe.model)
        if recipe.model.quantize is None:
            model.to(arguments.device)
        layers = select_layers(model, parts=recipe.corda.parts, targets=recipe.corda.targets, exclude=recipe.corda.exclude)
        about = {"base_digest": base_digest(model, layers)}
        samples = split(asked, model, processor, about["base_digest"], cache)  # as the user's recipe has them: the same for all arms
        if arm is None:
            validation = fmean(item_losses(model, processor, recipe, samples.validation))
            measured = scores(model, processor, recipe, samples)
            if not all(math.isfinite(loss) for loss in (validation, *(score["loss"] for score in measured.values()))):
                raise ValueError("The base's loss on held-out samples is not finite; look at the samples, or at model.dtype.")
            return about | {"scores": measured, "validation": validation, "learned": [], "guessing": None}
        return about | _trained(model, processor, recipe, arguments, samples)


def _trained(model: nn.Module, processor: Any, recipe: Recipe, arguments: Any, samples: Samples) -> dict[str, Any]:
    """Prepare, train and measure an arm."""
    check_fits(model, recipe, arguments, {"data": samples.training})
    start = time.perf_counter()
    plan = plan_contexts(model, draw_contexts(samples.context, recipe.corda), recipe.corda, processor)
    adapted = attach_plan(model, plan, recipe.corda)
    raise_what_trains_whole_(adapted, recipe)
    prepared = time.perf_counter() - start
    keep = keeping(recipe, samples.keep, processor)
    trainer = recipe_trainer(adapted, processor, {"data": samples.training}, recipe, arguments, [] if keep is None else [keep])
    start = time.perf_counter()
    diverged = False
    try:
        trainer.train()
    except NotFiniteError:
        diverged = True
    result = {
        "trainable_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "diverged": diverged,
        "training_losses": [round(loss, 5) for _, loss in losses_of(trainer)],
        "validation_losses": [],
        "seconds": {"prepare": round(prepared, 2), "train": round(time.perf_counter() - start, 2)},
        "peak_memory_gb": round(peak_memory_gb(), 3),
    }
    if diverged:
        return result
    told = {} if keep is None or keep.kept is None else {"finish": numbers_of(asdict(keep.kept))}
    return result | told | _measured(adapted, processor, recipe, samples)


def _measured(adapted: PeftModel, processor: Any, recipe: Recipe, samples: Samples) -> dict[str, Any]:
    """Return what a trained arm came to; that it diverged where a loss is not finite."""
    validation = fmean(item_losses(adapted, processor, recipe, samples.validation))
    measured = scores(adapted, processor, recipe, samples)
    if not all(math.isfinite(loss) for loss in (validation, *(score["loss"] for score in measured.values()))):
        return {"diverged": True}
    sizes = weight_change(adapted)
    return {
        "validation_losses": [[recipe.training.steps, round(validation, 5)]],
        "scores": measured,
        "interpolated": {},
        "change": sum(sizes.values()) / len(sizes),
        "change_on_context": None,
        "kl": {CONTEXT: kl(adapted, processor, recipe, samples.kept)},
    }


def split(recipe: Recipe, model: nn.Module, processor: Any, base: str, cache: Path) -> Samples:
    """Return the recipe's samples, some of each held out.

    Args:
        recipe: The run's.
        model: The untouched base.
        processor: The model's.
        base: Digest of the base, under which the samples that it writes itself are kept.
        cache: Folder for those.

    Raises:
        ValueError: If there are too few samples, or none of what is to be kept.
    """
    data = items_of(recipe.data, recipe, model, processor)
    if recipe.evaluation is None:
        held, rest = held_out(len(data), 2 * HELD_OUT, "data")
        measured, training = _some(data, held), _some(data, rest)
    else:
        measured, training = items_of(recipe.evaluation, recipe, model, processor), _some(data, range(len(data)))
        if len(measured) < 2:
            raise ValueError(f"evaluation has {len(measured)} sample(s); expected at least one to choose by and one to report.")
    files, context = _context(recipe, model, processor, training, f"{base[:12]}-{data.fingerprint()[:12]}-{len(training)}", cache)
    keep = None if recipe.keep is None or recipe.keep.samples is None else items_of(recipe.keep.samples, recipe, model, processor)
    source = keep if context is None else context
    if source is None:
        raise ValueError("The context holds keep files alone, which nothing can be measured on; name samples beside them, or keep.samples.")
    kept, rest = held_out(len(source), HELD_OUT, "context")
    others = _some(source, rest)
    places = range(min(len(measured), 2 * HELD_OUT))
    if has_two_towers(model) and min(len(places) // 2, len(kept)) < 2:
        raise ValueError(
            f"There are {len(places) // 2} pair(s) to choose by and {len(kept)} of the context to measure, but a pair is told from others: "
            f"expected 2 of each; give at least {4 * PART} of data and {2 * PART} of context."
        )
    kept_apart: Any = keep if keep is not None and context is not None and keep.fingerprint() != context.fingerprint() else None
    return Samples(
        training=training,
        validation=_some(measured, places[::2]),
        test=_some(measured, places[1::2]),
        context=Sources(files, None if context is None else others),
        keep=others if kept_apart is None else kept_apart,
        kept=_some(source, kept),
    )


def _some(samples: Any, places: Sequence[int]) -> Any:
    return Subset(samples, places)


def held_out(total: int, count: int, name: str) -> tuple[list[int], list[int]]:
    """Return the places that are measured, the same in every run, and all others.

    Raises:
        ValueError: If there are too few.
    """
    number = min(count, total // PART)
    if number < 2:
        raise ValueError(f"{name} has {total} sample(s), of which one in {PART} may be held out; give at least {2 * PART}.")
    held = set(random.Random(0).sample(range(total), number))
    return sorted(held), [place for place in range(total) if place not in held]


def _context(
    recipe: Recipe, model: nn.Module, processor: Any, training: Any, written_for: str, cache: Path
) -> tuple[tuple[Path, ...], Any]:
    """Return the keep files of a recipe's context, and its samples if there are any."""
    if isinstance(recipe.context, DataConfig):
        return (), items_of(recipe.context, recipe, model, processor)
    files = tuple(Path(name) for name in recipe.context_names if is_keep_file(name))
    named = [name for name in recipe.context_names if not is_keep_file(name)]
    parts = [
        _written(recipe, model, processor, training, written_for, cache)
        if name == SELF
        else items_of(DataConfig(name), recipe, model, processor)
        for name in named
    ]
    return files, Joined(parts) if parts else None


def _written(recipe: Recipe, model: nn.Module, processor: Any, training: Any, written_for: str, cache: Path) -> Any:
    """Return what the base wrote itself, on pictures of what is trained; from the cache where it is there."""
    count, seed = recipe.corda.num_samples * recipe.corda.num_candidates, recipe.corda.seed
    path = cache / f"own-{written_for}-{count}-{seed}.jsonl"
    if not path.exists():
        self_context(model, processor, training, count=count, seed=seed).save(path)
    return read_self_context(path, training)


def scores(model: nn.Module, processor: Any, recipe: Recipe, samples: Samples) -> dict[str, Any]:
    """Return the losses of what is learned and of what is kept, with each sample's in thousandths of a nat."""
    measured = {TARGET: samples.test, CONTEXT: samples.kept}
    return plain_scores({name: Score.of(item_losses(model, processor, recipe, items)) for name, items in measured.items()})


def item_losses(model: nn.Module, processor: Any, recipe: Recipe, items: Sequence[Any]) -> list[float]:
    """Return each sample's loss in nats: a token of its responses, or of all its text where it has none; of two towers each batch's."""
    base, device = base_of(model), next(model.parameters()).device
    collate: Any = collator_for(base, processor)
    towers = has_two_towers(base)
    if isinstance(collate, Collator):
        collate = replace(collate, with_labels=True, whole_texts=True)
    size = min(recipe.training.batch_size, len(items)) if towers else 1
    losses = []
    with evaluating(model), torch.no_grad(), _casting(recipe, device):
        for start in range(0, len(items) - size + 1, size):
            batch = collate([items[place] for place in range(start, start + size)])
            inputs = model_inputs(base, False, batch)
            loss = contrastive_loss(features_of(model, inputs)) if towers else model(**inputs, labels=batch["labels"].to(device)).loss
            losses.append(float(loss))
    return losses


def kl(model: PeftModel, processor: Any, recipe: Recipe, items: Sequence[Any]) -> float:
    """Return ``KL(base ‖ arm)`` on samples, in nats: a mean over predicted tokens, or pairs."""
    collate = collator_for(base_of(model), processor)
    size = min(recipe.training.batch_size, len(items)) if has_two_towers(base_of(model)) else 1
    with _casting(recipe, next(model.parameters()).device):
        batches = (collate([items[place] for place in range(start, start + size)]) for start in range(0, len(items) - size + 1, size))
        return context_kl(model, batches)


def _casting(recipe: Recipe, device: torch.device) -> torch.autocast:
    """Return the precision that the recipe trains in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.training.bf16)
