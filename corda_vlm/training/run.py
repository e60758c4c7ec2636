"""Run a recipe: load, prepare, train with transformers' Trainer, keep what can be gone on from, write the adapter.

output/recipe.yaml                      the options, all of them
output/corda.safetensors                plan and options of the adapter, from before the first step
output/checkpoint-N/                    the Trainer's; whole once it holds corda.safetensors too
output/adapter_*, output/training.json  at the end: the adapter (``corda_core.load``) and the losses
"""

import dataclasses
import errno
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments, set_seed

from corda_core import AdapterPlan, attachment_of, lora_layers, save
from corda_core.files import write_whole
from corda_core.layers import from_first_process, num_processes, process_rank
from corda_core.lora import whole_modules
from corda_core.quantize import check_quantizable
from corda_core.store import ATTACHMENT, load_attachment, save_attachment
from corda_vlm.adapted import attached_as
from corda_vlm.context import draw_contexts, image_reader
from corda_vlm.data.items import Items, load_items
from corda_vlm.data.sources import DataConfig
from corda_vlm.outputs import is_disk_full
from corda_vlm.prepare import attach_plan, plan_contexts
from corda_vlm.towers import has_two_towers, is_open_clip, modules_of, select_layers
from corda_vlm.training.arguments import training_arguments
from corda_vlm.training.contrastive import check_pairs
from corda_vlm.training.models import load_base, network_only_if
from corda_vlm.training.recipe import Recipe
from corda_vlm.training.resume import WholeCheckpoints, alone_in, claim, has_ended, last_whole, restore_
from corda_vlm.training.train import NotFiniteError, losses_of, trainer_for

logger = logging.getLogger(__name__)

SUMMARY = "training.json"
FINGERPRINTS = "samples"
"""Where a plan's provenance has digests of what its run is trained and measured on."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training run came to."""

    output: Path
    losses: list[tuple[int, float]]
    """(step, mean loss since the last one), nats a token, or of a pair."""

    evaluation: list[tuple[int, float]]
    """(step, loss on the held-out samples)."""

    seconds: float
    num_broken: int
    """How many samples were skipped, as their images could not be read."""


def train(recipe: Recipe, *, resume: bool = False) -> Trained:
    """Run a recipe and write the adapter into its output folder.

    Under ``accelerate launch`` (DDP or FSDP2) all processes call; the samples are the same whatever their number.

    Args:
        recipe: What to do.
        resume: Go on from the last whole checkpoint, or from the start if there is none: with the same data order, optimiser, schedule,
            random state and frozen start, so that the losses are those of a run that was never stopped.

    Raises:
        FileExistsError: If the output holds another run and ``resume`` is not set.
        NotFiniteError: If loss, gradients or weights are no longer finite.
        OSError: If the disk is full; what was whole before still is.
        ValueError: If an option, a sample, a file or the model is not right.
    """
    with network_only_if(recipe.model.download):
        return _train(recipe, resume)


def _train(recipe: Recipe, resume: bool) -> Trained:
    arguments = training_arguments(recipe)  # before all else: joins the group of processes
    output = Path(recipe.output)
    with alone_in(output):
        claim(recipe, output, resume)
        return _trained(recipe, arguments, output, resume)


def _trained(recipe: Recipe, arguments: TrainingArguments, output: Path, resume: bool) -> Trained:
    """Train in an output that is this run's own."""
    start = time.time()
    model, processor, samples = _loaded(recipe, arguments)
    items, evaluation = samples["data"], samples.get("evaluation")
    if not has_two_towers(model):  # the mean over samples, whatever batches they come in; a contrastive loss is one of batches
        arguments.per_device_eval_batch_size = 1
    adapted = _adapted(model, processor, samples, recipe, output)
    rates = {
        part: rate
        for part, rate in (("projector", recipe.training.projector_learning_rate), ("vision", recipe.training.vision_learning_rate))
        if rate is not None
    }
    set_seed(recipe.seed)  # preparing draws too, and is left out on resuming
    trainer = trainer_for(adapted, items, processor, arguments, evaluation=evaluation, rates=rates, callbacks=[WholeCheckpoints(adapted)])
    try:
        checkpoint = from_first_process(last_whole(output) if resume and process_rank() == 0 else None)
        if checkpoint is not None and has_ended(checkpoint):
            restore_(trainer, checkpoint)
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if evaluation is not None and recipe.training.evaluate_every is None:
            trainer.evaluate()
        save(trainer.model, output)
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}; the last whole checkpoint is {last_whole(output) or 'none yet'}.") from error
    except Exception as error:
        if is_disk_full(error):
            kept = last_whole(output)
            raise OSError(
                errno.ENOSPC,
                f"The disk of {output} is full at step {trainer.state.global_step}; the last whole checkpoint is "
                f"{kept or 'none yet'}: make room and run again with --resume",
            ) from error
        raise
    trained = Trained(
        output,
        losses_of(trainer),
        [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry],
        round(time.time() - start, 1),
        items.num_broken,
    )
    if process_rank() == 0:
        summary = dataclasses.asdict(trained) | {"output": str(output), "num_processes": num_processes()}
        write_whole(output / SUMMARY, json.dumps(summary, indent=1).encode())
    return trained


def prepare(recipe: Recipe) -> AdapterPlan:
    """Do what ``train`` does before its first step, and return the adapter plan; ``train(recipe, resume=True)`` goes on from there.

    Raises:
        FileExistsError: If the output holds a run already.
        ValueError: If an option, a sample, a file or the model is not right.
    """
    output = Path(recipe.output)
    with network_only_if(recipe.model.download):
        arguments = training_arguments(recipe)
        with alone_in(output):
            claim(recipe, output, resume=False)
            model, processor, samples = _loaded(recipe, arguments)
            return attachment_of(_adapted(model, processor, samples, recipe, output)).plan


def _loaded(recipe: Recipe, arguments: TrainingArguments) -> tuple[nn.Module, Any, dict[str, Items]]:
    """Return base, processor and what the losses depend on: the training data, and the held-out samples if there are any."""
    set_seed(recipe.seed)
    model, processor = load_base(recipe.model)
    sources = {"data": recipe.data} | ({} if recipe.evaluation is None else {"evaluation": recipe.evaluation})
    samples = {name: _items(source, recipe, model, processor) for name, source in sources.items()}
    _check_fits(model, recipe, arguments, {name: len(items) for name, items in samples.items()})
    if recipe.model.quantize is None:  # else it is where it is to be
        model.to(arguments.device)
    return model, processor, samples


def _check_fits(model: nn.Module, recipe: Recipe, arguments: TrainingArguments, num_samples: Mapping[str, int]) -> None:
    """Refuse, before hours of preparation, what would fail or silently train something else after it.

    Raises:
        ValueError: If options do not go with each other or with the model.
    """
    corda, options = recipe.corda, recipe.training
    modules_of(model, corda.train_fully)
    if has_two_towers(model) and arguments.gradient_accumulation_steps > 1:
        raise ValueError(
            "training.micro_batch_size splits a batch of pairs, each of which is told apart from all others: another loss; leave it out."
        )
    if corda.train_fully and recipe.model.dtype != "float32" and not options.bf16:
        raise ValueError(
            f"corda.train_fully trains weights of {recipe.model.dtype}, which small steps do not move; set training.bf16 to true (then "
            "they are kept in float32), or model.dtype to float32."
        )
    if recipe.model.quantize is not None and (corda.quantize is not None or corda.residual == "subtract" or corda.train_fully):
        raise ValueError(
            "model.quantize loads the base in 4 bits, but corda.quantize, residual: subtract and train_fully need its float weights; use "
            "corda.quantize instead, or leave them out."
        )
    if corda.quantize is not None:
        check_quantizable(model, select_layers(model, parts=corda.parts, targets=corda.targets, exclude=corda.exclude))
    if has_two_towers(model):
        for name, count in num_samples.items():
            check_pairs(count, options.batch_size, name)
    if options.gradient_checkpointing and is_open_clip(model):
        raise ValueError("training.gradient_checkpointing is for models of transformers; leave it out for open_clip.")


def _items(data: DataConfig, recipe: Recipe, model: nn.Module, processor: Any) -> Items:
    return load_items(data, download=recipe.model.download, needs_images=has_two_towers(model), accepts=image_reader(processor))


def _adapted(model: nn.Module, processor: Any, samples: Mapping[str, Items], recipe: Recipe, output: Path) -> PeftModel:
    """Return the model with its adapter at its start: that of the run which is resumed, or a new one, which is written first."""
    fingerprints = from_first_process({name: its.fingerprint() for name, its in samples.items()} if process_rank() == 0 else {})
    if from_first_process((output / ATTACHMENT).exists()):
        attachment = load_attachment(output / ATTACHMENT)
        _check_same_samples(attachment.plan.provenance.get(FINGERPRINTS), fingerprints, output)
        adapted = attached_as(model, attachment)
    else:
        contexts = draw_contexts(
            samples["data"] if recipe.context is None else _items(recipe.context, recipe, model, processor), recipe.corda
        )
        plan = plan_contexts(model, contexts, recipe.corda, processor)
        plan = dataclasses.replace(plan, provenance={**plan.provenance, FINGERPRINTS: fingerprints})
        adapted = attach_plan(model, plan, recipe.corda)
        if process_rank() == 0:
            save_attachment(attachment_of(adapted), output / ATTACHMENT)
    if recipe.training.bf16:  # what trains whole gets float32 copies, as PEFT gives adapters
        for wrapper in whole_modules(adapted).values():
            wrapper.modules_to_save.float()
    logger.info(
        "%d adapters, %d parameters train", len(lora_layers(adapted)), sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    )
    return adapted


def _check_same_samples(recorded: Mapping[str, str] | None, found: Mapping[str, str], output: Path) -> None:
    """Refuse to resume on other samples than a run began with.

    Raises:
        ValueError: If their fingerprints differ; the text says of which.
    """
    if recorded is None:  # of corda-vlm 0.1.0
        logger.warning(
            "%s does not tell what its run was trained on: whether the data are still the same is not known.", output / ATTACHMENT
        )
        return
    changed = [name for name in found if recorded.get(name) != found[name]]
    if changed:
        raise ValueError(
            f"{changed[0]}: the samples are not those that the run in {output} began with (rows that on_broken: skip leaves out change "
            "them too); put those back to resume it, or name another output to begin anew."
        )
