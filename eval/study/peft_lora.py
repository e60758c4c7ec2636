"""PEFT's LoRA variants on the layers of a task, and on no others."""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from corda_core.linears import is_shared, weight_shape
from corda_core.lora import lora_config, lora_layers
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count


def clipped_ranks(model: nn.Module, layers: tuple[str, ...], rank: int) -> dict[str, int]:
    """Return each layer's rank: the one asked for, or min(m, n) where that is smaller, as in ``corda_core.plan``.

    Raises:
        ValueError: If the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected at least 1.")
    return {name: min(rank, *weight_shape(model, name)) for name in layers}


def config_for(task: Task, rank: int, alpha: float | None = None) -> LoraConfig:
    """Return the config of a plain LoRA on the task's layers: rank ``min(rank, m, n)``, scaling ``alpha / rank`` (None: 1) in each."""
    return lora_config(task.model, clipped_ranks(task.model, task.layers, rank), rank, 1.0 if alpha is None else alpha / rank)


def attach_variant(task: Task, config: LoraConfig) -> PeftModel:
    """Return the task's model with what the config says on the task's layers.

    Raises:
        ValueError: If PEFT adapts other layers than the task's.
    """
    model = get_peft_model(task.model, config)
    wrong = lora_layers(model).keys() ^ set(task.layers)
    if wrong:
        raise ValueError(f"PEFT and the task differ in whether {min(wrong)} is adapted; please report this model's layer names.")
    return model


@dataclass(frozen=True)
class PeftVariant:
    """Options of a method that is one of PEFT's variants of LoRA and nothing more."""

    rank: Count

    changes = MappingProxyType[str, Any]({})
    """What the variant changes in LoRA's config."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with the variant on the task's layers.

        Raises:
            ValueError: If PEFT cannot adapt these layers.
        """
        return Adapted(attach_variant(task, replace(config_for(task, self.rank), **self.changes)))


def refuse_shared(task: Task, method: str) -> None:
    """Refuse layers whose weight another module uses too, for methods that write into the base.

    Raises:
        ValueError: If there is one.
    """
    weights = {name: task.model.get_parameter(f"{name}.weight") for name in task.layers}
    shared = [name for name, weight in weights.items() if is_shared(task.model, weight)]
    if shared:
        raise ValueError(f"{method} would change {shared[0]}, whose weight another module uses too; leave it out of the task's layers.")
