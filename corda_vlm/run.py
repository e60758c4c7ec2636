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
import re
import shutil
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from corda_core import AdapterPlan, attachment_of, lora_layers, save
from corda_core.checkpoint import ATTACHMENT, load_attachment, save_attachment
from corda_core.distributed import from_first_process, num_processes, process_rank
from corda_core.files import write_whole
from corda_vlm.adapted import attached_as
from corda_vlm.context import draw_contexts
from corda_vlm.models import load_base
from corda_vlm.prepare import attach_plan, plan_contexts
from corda_vlm.recipe import Recipe
from corda_vlm.sources import Items, load_items
from corda_vlm.towers import has_two_towers
from corda_vlm.train import losses_of, trainer_for

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
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
    output = Path(recipe.output)
    arguments = training_arguments(recipe)  # before all else: joins the group of processes
    _claim(recipe, output, resume)
    start = time.time()
    model, processor, items = _loaded(recipe, arguments)
    evaluation = None if recipe.evaluation is None else load_items(recipe.evaluation, download=recipe.model.download)
    if not has_two_towers(model):  # the mean over samples, whatever batches they come in; a contrastive loss is one of batches
        arguments.per_device_eval_batch_size = 1
    adapted = _adapted(model, processor, items, recipe, output)
    rates = {
        part: rate
        for part, rate in (("projector", recipe.training.projector_learning_rate), ("vision", recipe.training.vision_learning_rate))
        if rate is not None
    }
    set_seed(recipe.seed)  # preparing draws too, and is left out on resuming
    trainer = trainer_for(adapted, items, processor, arguments, evaluation=evaluation, rates=rates, callbacks=[_WholeCheckpoints(adapted)])
    try:
        trainer.train(resume_from_checkpoint=_last_whole(output) if resume else None)
        if evaluation is not None and recipe.training.evaluate_every is None:
            trainer.evaluate()
        save(trainer.model, output)
    except Exception as error:
        if _is_disk_full(error):
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
    options, world = recipe.training, _processes().num_processes
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
        dataloader_drop_last=recipe.model.library == "open_clip",
        ddp_find_unused_parameters=True if world > 1 else None,  # a batch without images leaves the vision tower's adapters out
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def _loaded(recipe: Recipe, arguments: TrainingArguments) -> tuple[nn.Module, Any, Items]:
    """Return base, processor and training data."""
    set_seed(recipe.seed)
    items = load_items(recipe.data, download=recipe.model.download)
    model, processor = load_base(recipe.model)
    if recipe.model.quantize is None:  # else it is where it is to be
        model.to(arguments.device)
    return model, processor, items


def context_items(recipe: Recipe, items: Items) -> Items:
    """Return the samples of context: the recipe's, or for IPM the training data."""
    return items if recipe.context is None else load_items(recipe.context, download=recipe.model.download)


def _adapted(model: nn.Module, processor: Any, items: Items, recipe: Recipe, output: Path) -> PeftModel:
    """Return the model with its adapter at its start: that of the run which is gone on with, or a new one, which is written first."""
    if (output / ATTACHMENT).exists():
        adapted = attached_as(model, load_attachment(output / ATTACHMENT))
    else:
        contexts = draw_contexts(context_items(recipe, items), recipe.corda)
        adapted = attach_plan(model, plan_contexts(model, contexts, recipe.corda, processor), recipe.corda)
        if process_rank() == 0:
            save_attachment(attachment_of(adapted), output / ATTACHMENT)
    if recipe.training.bf16:  # what trains whole gets float32 copies, as PEFT gives adapters
        for module in adapted.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.modules_to_save.float()
    logger.info(
        "%d adapters, %d parameters train", len(lora_layers(adapted)), sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    )
    return adapted


def _claim(recipe: Recipe, output: Path, resume: bool) -> None:
    """Write the recipe into an empty output; or check that what is there is this recipe's run.

    Raises:
        FileExistsError: If there is another run.
        ValueError: If the run that is to be gone on with has another recipe.
    """
    asked = yaml.safe_load(yaml.safe_dump(_plain(recipe)))
    is_new = from_first_process(not (output / RECIPE).exists())  # before that one writes it
    if is_new:
        if resume:
            logger.warning("%s holds no run to go on with: starting one.", output)
        if process_rank() == 0:
            write_whole(output / RECIPE, yaml.safe_dump(asked, sort_keys=False).encode())
    elif not resume:
        raise FileExistsError(f"{output} holds a run already; go on with it (--resume), or name another output.")
    else:
        found = yaml.safe_load((output / RECIPE).read_text())
        different = _first_difference(found, asked)
        if different:
            raise ValueError(f"{output / RECIPE} has another {different}; resume with the recipe that was started, or name another output.")
    _processes().wait_for_everyone()
    if process_rank() == 0:
        for checkpoint in output.glob("checkpoint-*"):  # left half written when the process died
            if not (checkpoint / ATTACHMENT).exists():
                shutil.rmtree(checkpoint)
    _processes().wait_for_everyone()


def _processes() -> PartialState:
    """Return the group of processes, which the first call joins; on CPUs it must be told that there is nothing else."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _last_whole(output: Path) -> str | None:
    """Return the newest checkpoint that was written to its end."""
    whole = [folder for folder in output.glob("checkpoint-*") if (folder / ATTACHMENT).exists()]
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))) if whole else None


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

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what ``load`` needs beside the Trainer's files."""
        if state.is_world_process_zero:
            save_attachment(self.attachment, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / ATTACHMENT)


def _is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or what it came from, says that a disk is full."""
    seen: BaseException | None = error
    while seen is not None:
        # Words: safetensors has an error of its own for it, and torch.save one of its container's writer.
        if getattr(seen, "errno", None) == errno.ENOSPC or re.search("No space left on device|inline_container|StreamWriter", str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


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
    return "" if found == asked else f"{at} ({found!r}, asked for is {asked!r})"


def _require_log(log_to: str) -> None:
    package = {"tensorboard": "tensorboard", "wandb": "wandb"}.get(log_to)
    if package is not None and find_spec(package) is None:
        raise ModuleNotFoundError(
            f"training.log_to is {log_to}, which is not installed; run: pip install 'corda-vlm[train]' ({package}), or set it to none."
        )
