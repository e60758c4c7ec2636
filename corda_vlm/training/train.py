"""Fine-tune an adapted model with transformers' Trainer, on questions and answers or on images and captions."""

import copy
import inspect
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from corda_core.linears import base_of, evaluating, hold_statistics_
from corda_vlm.context import collator_for
from corda_vlm.data.pairs import PairCollator
from corda_vlm.data.rows import Item, Numbered
from corda_vlm.data.samples import Collator
from corda_vlm.towers import family_of
from corda_vlm.training.bound import DriftCallback
from corda_vlm.training.contrastive import ContrastiveTrainer, check_pairs
from corda_vlm.training.keep import Keep, KeepCallback

logger = logging.getLogger(__name__)


def fine_tune(
    model: nn.Module,
    items: Sequence[Item],
    processor: Any,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    keep: Keep | None = None,
    max_drift: float | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[tuple[int, float]]:
    """Train what is trainable on the items, and return the loss of each step.

    The loss is the cross-entropy of the responses (nats per token); for models with two towers the contrastive loss
    (``corda_vlm.training.contrastive``) of images and captions.

    AdamW without weight decay, cosine decay after 3 % warm-up, gradients clipped to norm 1: the papers' recipe. The order of
    the items depends on ``seed`` and their number only, so methods that are compared see the same data.

    Args:
        model: The adapted model; trained in place, left in evaluation mode.
        items: As ``images_texts`` of ``prepare``; each needs a response, or for two towers an image and a caption, and then at least
            ``batch_size`` are needed.
        processor: The model's processor or tokenizer; for open_clip ``OpenClipPairs(preprocess, tokenizer)``.
        steps: Optimiser steps.
        batch_size: Items a step.
        learning_rate: Peak rate.
        seed: Of the order of the items.
        keep: Samples that the model is held to its base on; what was kept is logged (``KeepCallback`` among ``callbacks`` tells it too).
        max_drift: Hold the drift of the outputs on the context at or below this, such as 0.02 (``DriftCallback``).
        callbacks: The Trainer's.

    Raises:
        NotFiniteError: If loss, gradients or weights are no longer finite; a ``FloatingPointError`` and a ``ValueError``.
        ValueError: If an item has no response, there are fewer pairs than one batch, or ``keep`` is not right.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            save_strategy="no",
            report_to=[],
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=0.0,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(0.03 * steps)),
            logging_steps=1,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
            data_seed=seed,
        )
        keeping = [] if keep is None else [KeepCallback(keep, processor)]
        bounding = [] if max_drift is None else [DriftCallback(max_drift)]
        trainer = trainer_for(model, items, processor, arguments, callbacks=[*keeping, *bounding, *callbacks])
        trainer.train()
    model.eval()
    for callback in keeping:
        logger.info("%s", callback.kept)
    return losses_of(trainer)


def trainer_for(
    model: nn.Module,
    items: Any,
    processor: Any,
    arguments: TrainingArguments,
    *,
    evaluation: Any = None,
    rates: Mapping[str, float] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Return transformers' Trainer for the loss of this model, with a bar that shows the loss and the time left.

    Args:
        model: The adapted model.
        items: As in ``fine_tune``; a ``torch.utils.data.Dataset`` of such will do.
        processor: As in ``fine_tune``.
        arguments: The Trainer's.
        evaluation: Held-out items, or None.
        rates: Peak learning rate of what trains in each part ("vision", "projector"); all else has that of the arguments.
        callbacks: The Trainer's.

    Raises:
        ValueError: If there are fewer pairs than one batch.

    Note:
        The contrastive loss is that of whole batches, of held-out pairs too: a smaller last batch is dropped.
    """
    base = base_of(model)
    collate: Callable[[Sequence[Item]], dict[str, Any]] = collator_for(base, processor)
    kind: type[Trainer] = ContrastiveTrainer if isinstance(collate, PairCollator) else ResponseTrainer
    if isinstance(collate, Collator):
        trims = "logits_to_keep" in inspect.signature(base.forward).parameters
        collate = replace(collate, with_labels=True, trim_logits=trims)
    if isinstance(collate, PairCollator):
        arguments = _of_whole_batches(arguments, items, evaluation)
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    groups = parameter_groups(model, rates or {}, arguments.weight_decay)
    trainer = kind(
        model,
        arguments,
        train_dataset=Numbered(items, "items"),
        eval_dataset=None if evaluation is None else Numbered(evaluation, "evaluation"),
        data_collator=partial(collate),  # the Trainer would save a collator's own tokenizer, which open_clip's cannot
        optimizer_cls_and_kwargs=(optimizer, options | {"params": groups}),
    )
    trainer.remove_callback(ProgressCallback)
    for callback in (FiniteLosses(), *callbacks, _LossBar()):
        trainer.add_callback(callback)
    # What adds to a log comes before what writes it.
    trainer.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, KeepCallback | DriftCallback))
    return trainer


def _of_whole_batches(arguments: TrainingArguments, items: Any, evaluation: Any) -> TrainingArguments:
    """Return the arguments with smaller batches dropped: a pair with fewer others to be told apart from has another loss."""
    check_pairs(len(items), arguments.train_batch_size * arguments.world_size, "items")
    if evaluation is not None:
        check_pairs(len(evaluation), arguments.eval_batch_size * arguments.world_size, "evaluation")
    arguments = copy.copy(arguments)
    arguments.dataloader_drop_last = True
    return arguments


def parameter_groups(model: nn.Module, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Return what trains as groups for an optimiser: parts of the model with their own rates, biases and norms without decay."""
    family = family_of(base_of(model))
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = family.part_of(name.removeprefix("base_model.model."))
            groups.setdefault((rates.get(part or ""), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0} | ({} if rate is None else {"lr": rate})
        for (rate, decays), parameters in groups.items()
    ]


def losses_of(trainer: Trainer) -> list[tuple[int, float]]:
    """Return the losses that a Trainer logged: (step, mean since the last one)."""
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


class ResponseTrainer(Trainer):
    """transformers' Trainer, whose held-out loss is the mean of its batches' means.

    The Trainer weights by tokens within what all processes read at once, so its held-out loss depends on their number.
    """

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the loss of a batch."""
        hold_statistics_(model)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch if model.training else None)

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return what the Trainer does, with 4-bit layers in the mode they train in: else bitsandbytes repacks them on CPUs."""
        with evaluating(base_of(model)):
            return super().prediction_step(model, *args, **kwargs)


class NotFiniteError(FloatingPointError, ValueError):
    """Training came to infinite values or NaN."""


class FiniteLosses(TrainerCallback):
    """Stops training at a loss, a gradient or weights that are not finite, before a checkpoint is written."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the last step too, after which weights are kept."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Refuse to continue; before weights are kept, which a checkpoint does after its log, look at those too."""
        logs = logs or {}
        wrong = [f"{key} is {logs[key]}" for key in ("loss", "eval_loss", "grad_norm") if not math.isfinite(logs.get(key, 0.0))]
        if not wrong and (control.should_save or state.global_step >= state.max_steps):
            wrong = [f"{name} has weights that are not finite" for name in _not_finite(kwargs["model"])]
        if wrong:
            rate = f", learning rate {logs['learning_rate']}" if "learning_rate" in logs else ""
            raise NotFiniteError(f"{wrong[0]} at step {state.global_step}{rate}: lower the rate, or look at the samples of that step")


def _not_finite(model: nn.Module) -> list[str]:
    """Return the names of what trains and is not finite, in the part that this process holds of it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    local = {name: parameter.to_local() if isinstance(parameter, DTensor) else parameter for name, parameter in trained.items()}
    return [name for name, value in local.items() if not value.isfinite().all()]


class _LossBar(ProgressCallback):
    """The Trainer's bar with the time left, showing the loss beside it instead of a line a step."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show what was last measured."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix({name: logs[name] for name in ("loss", "keep_kl", "keep_loss", "drift") if name in logs})


def attach_lora(model: nn.Module, names: Sequence[str], rank: int) -> PeftModel:
    """Return the model with PEFT's plain LoRA (A Kaiming, B = 0, alpha = rank) on the named layers: the baseline."""
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names), lora_dropout=0.0))
