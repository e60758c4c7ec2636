"""Hold the drift of a model's outputs on the context at or below a bound, in any of transformers' Trainers."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from corda_core import Covariance
from corda_core.drift import DriftBound
from corda_core.lora import active_adapter


class DriftCallback(TrainerCallback):
    """Holds an adapter's drift at or below ``max_drift``: ``callbacks=[DriftCallback(0.02)]``, in TRL's Trainers too.

    After each optimiser step, however many micro-batches it has, an adapter above is taken back (``corda_core.drift.DriftBound``). Logs
    gain ``drift``. A training that is resumed needs nothing but its weights.

    Note:
        Under DDP and FSDP2 too; not with DeepSpeed, which steps on copies of the weights and would overwrite what is taken back.
    """

    def __init__(self, max_drift: float, covariances: Mapping[str, Covariance] | None = None) -> None:
        """Take the bound, and for adapters whose plan does not do (``protect="start"``, plain LoRA) the context's covariances."""
        self.max_drift, self.covariances = max_drift, covariances
        self.bound: DriftBound | None = None
        self.last: float | None = None
        """The drift after the last step."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make ready.

        Raises:
            ValueError: If the bound is not positive, too little is known of the context, or the Trainer steps on copies of the weights.
        """
        if args.deepspeed:
            raise ValueError("max_drift takes weights back after each step, but DeepSpeed steps on copies of them; use DDP or FSDP2.")
        self.bound = DriftBound(kwargs["model"], self.max_drift, self.covariances, active_adapter(kwargs["model"]))

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take back what is above."""
        assert self.bound is not None, "the Trainer calls on_train_begin first"
        self.last = self.bound.hold_()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the drift to a log of the training."""
        if logs is not None and "loss" in logs and self.last is not None:
            logs["drift"] = self.last
            state.log_history[-1]["drift"] = self.last
