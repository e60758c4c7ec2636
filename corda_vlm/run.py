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
import math
import shutil
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
import yaml
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from corda_core import AdapterPlan, attachment_of, lora_layers, save
from corda_core.adapter import whole_modules
from corda_core.checkpoint import ATTACHMENT, WEIGHTS, load_attachment, save_attachment
from corda_core.distributed import from_first_process, num_processes, process_rank
from corda_core.files import PARTIAL, is_disk_full, write_whole
from corda_core.quantize import check_quantizable
from corda_vlm.adapted import attached_as
from corda_vlm.context import draw_contexts
from corda_vlm.items import Items, load_items
from corda_vlm.models import load_base, network_only_if
from corda_vlm.prepare import attach_plan, plan_contexts
from corda_vlm.processes import processes
from corda_vlm.recipe import RECIPE, Recipe
from corda_vlm.sources import DataConfig
from corda_vlm.towers import has_two_towers, is_open_clip, modules_of, select_layers
from corda_vlm.train import losses_of, trainer_for

logger = logging.getLogger(__name__)

SUMMARY = "training.json"


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
        FloatingPointError: If the loss is no longer finite.
        OSError: If the disk is full; what was whole before still is.
        ValueError: If an option, a sample, a file or the model is not right.
    """
    with network_only_if(recipe.model.download):
        return _train(recipe, resume)


def _train(recipe: Recipe, resume: bool) -> Trained:
    output = Path(recipe.output)
    arguments = training_arguments(recipe)  # before all else: joins the group of processes
    _claim(recipe, output, resume)
    start = time.time()
    model, processor, items = _loaded(recipe, arguments)
    evaluation = None if recipe.evaluation is None else _items(recipe.evaluation, recipe, model)
    if not has_two_towers(model):  # the mean over samples, whatever batches they come in; a contrastive loss is one of batches
        arguments.per_device_eval_batch_size = 1
    else:
        arguments.dataloader_drop_last = True  # a smaller batch would be another loss
    adapted = _adapted(model, processor, items, recipe, output)
    rates = {
        part: rate
        for part, rate in (("projector", recipe.training.projector_learning_rate), ("vision", recipe.training.vision_learning_rate))
        if rate is not None
    }
    set_seed(recipe.seed)  # preparing draws too, and is left out on resuming
    trainer = trainer_for(adapted, items, processor, arguments, evaluation=evaluation, rates=rates, callbacks=[_WholeCheckpoints(adapted)])
    try:
        trainer.train(resume_from_checkpoint=from_first_process(_last_whole(output)) if resume else None)
        if evaluation is not None and recipe.training.evaluate_every is None:
            trainer.evaluate()
        save(trainer.model, output)
    except Exception as error:
        if is_disk_full(error):
            kept = _last_whole(output)
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
        _claim(recipe, output, resume=False)
        model, processor, items = _loaded(recipe, arguments)
        return attachment_of(_adapted(model, processor, items, recipe, output)).plan


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe.

    Raises:
        ModuleNotFoundError: If the log asked for needs a package that is not installed.
        ValueError: If the batch cannot be shared out over the processes.
    """
    options, world = recipe.training, processes().num_processes
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = (
        "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    )  # renamed on the way to 6
    share, rest = divmod(options.batch_size, world)
    micro = options.micro_batch_size or share
    if rest or not share or share % micro:
        raise ValueError(
            f"training.batch_size is {options.batch_size} for {world} process(es) of micro_batch_size {options.micro_batch_size}; "
            "expected a multiple of their product."
        )
    _require_log(options.log_to)
    return TrainingArguments(
        output_dir=recipe.output,
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,  # below 1 it is a part of the steps
        max_grad_norm=options.max_grad_norm,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),
        # Reentrant checkpoints drop the gradients of a vision tower whose inputs need none.
        **({checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": False}} if options.gradient_checkpointing else {}),
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=options.keep_checkpoints,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="no" if options.evaluate_every is None or recipe.evaluation is None else "steps",
        eval_steps=options.evaluate_every,
        prediction_loss_only=True,
        report_to=[] if options.log_to == "none" else [options.log_to],
        remove_unused_columns=False,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=True if world > 1 else None,  # a batch without images leaves the vision tower's adapters out
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def _loaded(recipe: Recipe, arguments: TrainingArguments) -> tuple[nn.Module, Any, Items]:
    """Return base, processor and training data."""
    set_seed(recipe.seed)
    model, processor = load_base(recipe.model)
    items = _items(recipe.data, recipe, model)
    _check_fits(model, recipe, arguments, len(items))
    if recipe.model.quantize is None:  # else it is where it is to be
        model.to(arguments.device)
    return model, processor, items


def _check_fits(model: nn.Module, recipe: Recipe, arguments: TrainingArguments, num_samples: int) -> None:
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
    if has_two_towers(model) and num_samples < options.batch_size:
        raise ValueError(f"There are {num_samples} pairs to learn, but training.batch_size is {options.batch_size}; make it smaller.")
    if options.gradient_checkpointing and is_open_clip(model):
        raise ValueError("training.gradient_checkpointing is for models of transformers; leave it out for open_clip.")


def _items(data: DataConfig, recipe: Recipe, model: nn.Module) -> Items:
    return load_items(data, download=recipe.model.download, needs_images=has_two_towers(model))


def _adapted(model: nn.Module, processor: Any, items: Items, recipe: Recipe, output: Path) -> PeftModel:
    """Return the model with its adapter at its start: that of the run which is gone on with, or a new one, which is written first."""
    if from_first_process((output / ATTACHMENT).exists()):
        adapted = attached_as(model, load_attachment(output / ATTACHMENT))
    else:
        contexts = draw_contexts(items if recipe.context is None else _items(recipe.context, recipe, model), recipe.corda)
        adapted = attach_plan(model, plan_contexts(model, contexts, recipe.corda, processor), recipe.corda)
        if process_rank() == 0:
            save_attachment(attachment_of(adapted), output / ATTACHMENT)
    if recipe.training.bf16:  # what trains whole gets float32 copies, as PEFT gives adapters
        for wrapper in whole_modules(adapted).values():
            wrapper.modules_to_save.float()
    logger.info(
        "%d adapters, %d parameters train", len(lora_layers(adapted)), sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    )
    return adapted


def _claim(recipe: Recipe, output: Path, resume: bool) -> None:
    """Write the recipe into an output of its own; or check that what is there is a run of this recipe, and drop what is half written.

    Raises:
        FileExistsError: If there is another run, or what another program wrote.
        ValueError: If the run that is to be gone on with has another recipe.
    """
    asked = yaml.safe_load(yaml.safe_dump(_plain(recipe)))
    has_begun = from_first_process((output / ATTACHMENT).exists() and (output / RECIPE).exists())
    foreign = from_first_process(
        sorted(file.name for file in output.glob("*") if file.name.startswith(("checkpoint-", "adapter_", "corda.")))
    )
    if not has_begun:
        if foreign:
            raise FileExistsError(f"{output} holds {foreign[0]}, which no run of a recipe left there; name another output.")
        if resume:
            logger.warning("%s holds no run to go on with: starting one.", output)
    elif not resume:
        raise FileExistsError(f"{output} holds a run already; go on with it (--resume), or name another output.")
    else:
        found = yaml.safe_load((output / RECIPE).read_text())
        different = _first_difference(found, asked)
        if different:
            raise ValueError(
                f"{output / RECIPE} has another {different}, on which plan or losses depend; resume with the recipe that was started, or "
                "name another output."
            )
    processes().wait_for_everyone()
    if process_rank() == 0:
        write_whole(output / RECIPE, yaml.safe_dump(asked, sort_keys=False).encode())
        partial = [*output.glob(f"{PARTIAL}*"), *output.glob(f"checkpoint-*/{PARTIAL}*")]
        half = [checkpoint for checkpoint in output.glob("checkpoint-*") if not _is_whole(checkpoint)]
        for left in (*partial, *half):  # by a process that died while it wrote or removed them
            shutil.rmtree(left, ignore_errors=True)
    processes().wait_for_everyone()


FREE = {
    *("output", "data.on_broken", "context.on_broken", "evaluation.on_broken", "model.download", "training.workers", "training.log_to"),
    *("training.micro_batch_size", "training.keep_checkpoints", "training.save_every", "training.gradient_checkpointing"),
}
"""Options that may be others when a run is gone on with: the losses stay the same, but for what is skipped, or up to rounding."""


def _last_whole(output: Path) -> str | None:
    """Return the newest checkpoint that was written to its end; under several processes the first one's answer counts."""
    whole = [folder for folder in output.glob("checkpoint-*") if _is_whole(folder)]
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end, and none of it removed since."""
    names = (ATTACHMENT, "trainer_state.json", "scheduler.pt", WEIGHTS)
    # What torch saves is a zip file, whose end tells that it is whole.
    return all((checkpoint / name).exists() for name in names) and all(map(is_zipfile, checkpoint.glob("*.pt")))


class _WholeCheckpoints(TrainerCallback):
    """Stops at a loss that is not finite, and marks checkpoints as whole by the last file that goes into them."""

    def __init__(self, model: PeftModel) -> None:
        self.attachment = attachment_of(model)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Refuse to go on from NaN; checkpoints come after the log, so none holds such weights."""
        logs = logs or {}
        for key in ("loss", "eval_loss", "grad_norm"):
            if not math.isfinite(logs.get(key, 0.0)):
                raise FloatingPointError(
                    f"{key} is {logs[key]} at step {state.global_step}, learning rate {logs.get('learning_rate')}: lower the rate, or look "
                    f"at the samples of that step; the last whole checkpoint is {_last_whole(Path(str(args.output_dir))) or 'none yet'}."
                )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the loss before the last checkpoint too, which the Trainer writes whatever the step."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what ``load`` needs beside the Trainer's files, when all processes have written theirs."""
        processes().wait_for_everyone()
        if state.is_world_process_zero:
            save_attachment(self.attachment, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / ATTACHMENT)


def _plain(value: Any) -> Any:
    """Return a recipe as what YAML holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _first_difference(found: Any, asked: Any, at: str = "") -> str:
    """Return the name of the first option in which two recipes differ, or nothing."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in {**asked, **found}:
            name = _first_difference(found.get(key), asked.get(key), f"{at}.{key}" if at else key)
            if name:
                return name
        return ""
    return "" if found == asked or at in FREE else f"{at} ({found!r}, asked for is {asked!r})"


def _require_log(log_to: str) -> None:
    package = {"tensorboard": "tensorboard", "wandb": "wandb"}.get(log_to)
    if package is not None and find_spec(package) is None:
        raise ModuleNotFoundError(
            f"training.log_to is {log_to}, which is not installed; run: pip install 'corda-vlm[train]' ({package}), or set it to none."
        )
