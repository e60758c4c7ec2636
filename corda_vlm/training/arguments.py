"""What a recipe means to transformers' Trainer."""

import dataclasses
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments

from corda_vlm.outputs import processes
from corda_vlm.training.recipe import Recipe, TrainingConfig


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe.

    Raises:
        ModuleNotFoundError: If the log asked for needs a package that is not installed.
        ValueError: If the batch cannot be shared out over the processes.
    """
    options, world = recipe.training, processes().num_processes
    micro_batch, num_micro_batches = _shares(options, world)
    return TrainingArguments(
        output_dir=recipe.output,
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=num_micro_batches,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,  # below 1 it is a fraction of the steps
        max_grad_norm=options.max_grad_norm,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),
        **_checkpointing() if options.gradient_checkpointing else {},
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=options.keep_checkpoints,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="no" if options.evaluate_every is None or recipe.evaluation is None else "steps",
        eval_steps=options.evaluate_every,
        prediction_loss_only=True,
        report_to=_loggers(options.log_to),
        remove_unused_columns=False,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=True if world > 1 else None,  # a batch without images leaves the vision tower's adapters out
        seed=recipe.seed,
        data_seed=recipe.seed,
    )


def _shares(options: TrainingConfig, world: int) -> tuple[int, int]:
    """Return how many samples a process takes through the model at once, and how often in one step."""
    share, rest = divmod(options.batch_size, world)
    micro_batch = options.micro_batch_size or share
    if rest or not share or share % micro_batch:
        raise ValueError(
            f"training.batch_size is {options.batch_size} for {world} process(es) of micro_batch_size {options.micro_batch_size}; "
            "expected a multiple of their product."
        )
    return micro_batch, share // micro_batch


def _checkpointing() -> dict[str, Any]:
    """Return the arguments for activation checkpointing, whose names change before transformers 6."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}  # else towers whose inputs need no gradient get none


def _loggers(log_to: str) -> list[str]:
    """Return the names of the Trainer's loggers, whose packages must be there."""
    if log_to == "none":
        return []
    if find_spec(log_to) is None:
        raise ModuleNotFoundError(
            f"training.log_to is {log_to}, which is not installed; run: pip install 'corda-vlm[train]' ({log_to}), or set it to none."
        )
    return [log_to]
