"""Run a recipe: load, prepare, train with transformers' Trainer, keep checkpoints to resume from, write the adapter.

output/recipe.yaml                      the options, all of them
output/corda.safetensors                plan and options of the adapter, from before the first step
output/checkpoint-N/                    the Trainer's; whole once it holds corda.safetensors too
output/adapter_*, output/training.json  at the end: the adapter (``corda_core.load``), the losses and what was kept
"""

import dataclasses
import errno
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from corda_core import AdapterPlan, attachment_of, lora_layers, save
from corda_core.files import write_whole
from corda_core.layers import from_first_process, num_processes, process_rank
from corda_core.linears import base_of, check_quantizable
from corda_core.lora import whole_modules
from corda_core.store import ATTACHMENT, read_attachment, save_attachment
from corda_vlm.adapted import attached_as
from corda_vlm.context import Sources, draw_contexts
from corda_vlm.data.items import Items
from corda_vlm.failures import is_disk_full
from corda_vlm.outputs import alone_in
from corda_vlm.prepare import attach_plan, plan_contexts
from corda_vlm.towers import has_two_towers, is_open_clip, modules_of, select_layers
from corda_vlm.training.arguments import training_arguments
from corda_vlm.training.bound import DriftCallback
from corda_vlm.training.contexts import items_of, read_context
from corda_vlm.training.contrastive import check_pairs
from corda_vlm.training.keep import Keep, KeepCallback, KeepOptions, Kept
from corda_vlm.training.models import load_base, network_only_if
from corda_vlm.training.recipe import Recipe
from corda_vlm.training.resume import WholeCheckpoints, claim, has_ended, last_whole, restore_
from corda_vlm.training.train import NotFiniteError, losses_of, trainer_for

logger = logging.getLogger(__name__)

SUMMARY = "training.json"
FINGERPRINTS = "samples"
"""Key of a plan's provenance: digests of the samples that its run is trained and measured on."""


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a run came to."""

    output: Path
    losses: list[tuple[int, float]]
    """(step, mean loss since the last one), nats a token, or of a pair."""

    evaluation: list[tuple[int, float]]
    """(step, loss on the held-out samples)."""

    seconds: float
    kept: Kept | None
    """What was kept, where the recipe has ``keep``."""

    drift: float | None
    """That of the outputs on the context after the last step, where the recipe has ``training.max_drift``."""

    num_broken: int
    """How many samples were skipped, as their images could not be read."""

    num_long: int
    """How many were skipped, as they are too long."""

    num_cut: int
    """How many were cut, as they are too long."""


def run_recipe(recipe: Recipe, *, resume: bool = False) -> RunSummary:
    """Run a recipe and write the adapter into its output folder.

    Under ``accelerate launch`` (DDP or FSDP2) all processes call; the samples are the same whatever their number.

    Args:
        recipe: What to do.
        resume: Resume from the last whole checkpoint, or start if there is none: with the same data order, optimiser, schedule, random
            state and frozen start, so that the losses are those of a run that was never stopped.

    Raises:
        FileExistsError: If the output holds another run and ``resume`` is not set.
        NotFiniteError: If loss, gradients or weights are no longer finite.
        OSError: If the disk is full; what was whole before still is.
        ValueError: If an option, a sample, a file or the model is not right.
    """
    start = time.time()
    with _own_output(recipe, resume) as (output, arguments):
        adapted, processor, samples = _prepare(recipe, arguments, output)
        keep = keeping(recipe, samples.get("keep"), processor)
        trainer = recipe_trainer(
            adapted, processor, samples, recipe, arguments, [*([] if keep is None else [keep]), WholeCheckpoints(adapted)]
        )
        with _naming_what_is_kept(trainer, output):
            _train_(trainer, output, resume, keep)
            if "evaluation" in samples and recipe.training.evaluate_every is None:
                trainer.evaluate()
            save(trainer.model, output)
        summary = RunSummary(
            output,
            losses_of(trainer),
            [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry],
            round(time.time() - start, 1),
            None if keep is None else keep.kept,
            next((entry["drift"] for entry in reversed(trainer.state.log_history) if "drift" in entry), None),
            samples["data"].num_broken,
            samples["data"].num_long,
            samples["data"].num_cut,
        )
        if process_rank() == 0:
            record = dataclasses.asdict(summary) | {"output": str(output), "num_processes": num_processes()}
            write_whole(output / SUMMARY, json.dumps(record, indent=1).encode())
    return summary


def prepare_recipe(recipe: Recipe) -> AdapterPlan:
    """Do what ``run_recipe`` does before its first step, and return the adapter plan; ``run_recipe(recipe, resume=True)`` does the rest.

    Raises:
        FileExistsError: If the output holds a run already.
        ValueError: If an option, a sample, a file or the model is not right.
    """
    with _own_output(recipe, resume=False) as (output, arguments):
        return attachment_of(_prepare(recipe, arguments, output)[0]).plan


@contextmanager
def _own_output(recipe: Recipe, resume: bool) -> Iterator[tuple[Path, TrainingArguments]]:
    """Keep a recipe's output for this run alone.

    Yields:
        The output, and the Trainer's arguments.
    """
    output = Path(recipe.output)
    with network_only_if(recipe.model.download):
        arguments = training_arguments(recipe)  # before all else: joins the group of processes
        with alone_in(output):
            claim(recipe, output, resume)
            yield output, arguments


def keeping(recipe: Recipe, samples: Any, processor: Any) -> KeepCallback | None:
    """Return what holds the training to the base on these samples, if the recipe asks for it."""
    if recipe.keep is None:
        return None
    options = {field.name: getattr(recipe.keep, field.name) for field in dataclasses.fields(KeepOptions)}
    return KeepCallback(Keep(samples, **options), processor)


def recipe_trainer(
    adapted: PeftModel,
    processor: Any,
    samples: Mapping[str, Any],
    recipe: Recipe,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """Return the Trainer of a recipe, for the samples "data" and perhaps "evaluation"; with these callbacks and the recipe's own bound.

    Raises:
        ValueError: If there are fewer pairs than one batch.
    """
    options = recipe.training
    if not has_two_towers(base_of(adapted)):  # the mean over samples, whatever batches they come in; a contrastive loss is one of batches
        arguments.per_device_eval_batch_size = 1
    rates = {"projector": options.projector_learning_rate, "vision": options.vision_learning_rate}
    bounding = [] if options.max_drift is None else [DriftCallback(options.max_drift)]
    set_seed(recipe.seed)  # preparing draws too, and is left out on resuming
    return trainer_for(
        adapted,
        samples["data"],
        processor,
        arguments,
        evaluation=samples.get("evaluation"),
        rates={part: rate for part, rate in rates.items() if rate is not None},
        callbacks=[*bounding, *callbacks],
    )


def _train_(trainer: Trainer, output: Path, resume: bool, keep: KeepCallback | None) -> None:
    """Train; with ``resume`` from the last whole checkpoint."""
    checkpoint = from_first_process(last_whole(output) if resume and process_rank() == 0 else None)
    if checkpoint is not None and has_ended(checkpoint):
        restore_(trainer, checkpoint)
        if keep is not None:
            with trainer.compute_loss_context_manager():  # in the precision that it was trained in
                keep.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
                keep.on_train_end(trainer.args, trainer.state, trainer.control)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


@contextmanager
def _naming_what_is_kept(trainer: Trainer, output: Path) -> Iterator[None]:
    """Add the last whole checkpoint to what stops a training: values that are not finite, or a full disk."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}; the last whole checkpoint is {last_whole(output) or 'none yet'}.") from error
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk of {output} is full at step {trainer.state.global_step}; the last whole checkpoint is "
            f"{last_whole(output) or 'none yet'}: make room and run again with --resume",
        ) from error


def _prepare(recipe: Recipe, arguments: TrainingArguments, output: Path) -> tuple[PeftModel, Any, dict[str, Items]]:
    """Return the model with its adapter at its start, its processor, and the samples on which the losses depend."""
    set_seed(recipe.seed)
    model, processor = load_base(recipe.model)
    sources = {"data": recipe.data, "evaluation": recipe.evaluation, "keep": None if recipe.keep is None else recipe.keep.samples}
    samples = {name: items_of(source, recipe, model, processor) for name, source in sources.items() if source is not None}
    check_fits(model, recipe, arguments, samples)
    if recipe.model.quantize is None:  # else it is there already
        model.to(arguments.device)
    context = Sources((), None)
    if not from_first_process((output / ATTACHMENT).exists()) or (recipe.keep is not None and "keep" not in samples):
        context = read_context(recipe, model, processor, samples["data"], output)
    if recipe.keep is not None and "keep" not in samples:
        kept: Any = context.samples  # there are some: the recipe refuses files alone
        samples["keep"] = kept
    return _adapted(model, processor, samples, context, recipe, output), processor, samples


def check_fits(model: nn.Module, recipe: Recipe, arguments: TrainingArguments, samples: Mapping[str, Any]) -> None:
    """Refuse, before hours of preparation, what would fail or silently train something else after it.

    Raises:
        ValueError: If options do not go together, or a batch has more pairs than there are.
    """
    corda, options = recipe.corda, recipe.training
    modules_of(model, corda.train_fully)
    if has_two_towers(model):
        if arguments.gradient_accumulation_steps > 1:
            raise ValueError(
                "training.micro_batch_size splits a batch of pairs, each of which is told apart from all others: another loss; leave it "
                "out."
            )
        for name in samples.keys() - {"keep"}:
            check_pairs(len(samples[name]), options.batch_size, name)
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
    if options.gradient_checkpointing and is_open_clip(model):
        raise ValueError("training.gradient_checkpointing is for models of transformers; leave it out for open_clip.")


def _adapted(model: nn.Module, processor: Any, samples: Mapping[str, Items], context: Sources, recipe: Recipe, output: Path) -> PeftModel:
    """Return the model with its adapter at its start: that of the run which is resumed, or a new one, which is written first."""
    fingerprints = from_first_process({name: items.fingerprint() for name, items in samples.items()} if process_rank() == 0 else {})
    if from_first_process((output / ATTACHMENT).exists()):
        attachment = read_attachment(output / ATTACHMENT)[0]
        _check_same_samples(attachment.plan.provenance.get(FINGERPRINTS), fingerprints, output)
        adapted = attached_as(model, attachment)
    else:
        plan = plan_contexts(model, draw_contexts(context, recipe.corda), recipe.corda, processor)
        plan = dataclasses.replace(plan, provenance={**plan.provenance, FINGERPRINTS: fingerprints})
        adapted = attach_plan(model, plan, recipe.corda)
        if process_rank() == 0:
            save_attachment(attachment_of(adapted), output / ATTACHMENT)
    raise_what_trains_whole_(adapted, recipe)
    logger.info(
        "%d adapters, %d parameters train", len(lora_layers(adapted)), sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    )
    return adapted


def raise_what_trains_whole_(adapted: PeftModel, recipe: Recipe) -> None:
    """Give what trains whole float32 copies where the recipe computes in bfloat16, as PEFT gives adapters."""
    if recipe.training.bf16:
        for wrapper in whole_modules(adapted).values():
            wrapper.modules_to_save.float()


def _check_same_samples(recorded: Mapping[str, str] | None, present: Mapping[str, str], output: Path) -> None:
    """Refuse to resume on other samples than a run began with: their fingerprints differ."""
    if recorded is None:  # of corda-vlm 0.1.0
        logger.warning(
            "%s does not tell what its run was trained on: whether the data are still the same is not known.", output / ATTACHMENT
        )
        return
    changed = [name for name in present if recorded.get(name) != present[name]]
    if changed:
        raise ValueError(
            f"{changed[0]}: the samples are not those that the run in {output} began with (rows that on_broken: skip leaves out change "
            "them too); put those back to resume it, or name another output to begin anew."
        )
