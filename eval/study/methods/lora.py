"""LoRA (arXiv 2106.09685), PEFT's: A Kaiming, B = 0, alpha = rank. With ``weight_decay`` the baseline "LoRA + weight decay".

With ``freeze_a`` LoRA-FA (arXiv 2308.03303): A stays as it was drawn. With ``warmup`` the peak rate is reached later than after the study's
3 % of the steps.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from corda_core.lora import lora_layers
from corda_eval.study.peft_lora import attach_variant, config_for
from corda_eval.study.task import WARMUP, Adapted, Task
from corda_vlm.options import Count, NotNegative


@dataclass(frozen=True)
class Lora:
    """Options of LoRA."""

    rank: Count
    weight_decay: NotNegative = 0.0
    freeze_a: bool = False
    warmup: Annotated[float, Field(ge=0, lt=1)] = WARMUP
    """Part of the steps after which the peak rate is reached."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with LoRA on the task's layers."""
        model = attach_variant(task, config_for(task, self.rank))
        if self.freeze_a:
            for layer in lora_layers(model).values():
                layer.lora_A["default"].requires_grad_(False)
        return Adapted(model, weight_decay=self.weight_decay, warmup=self.warmup)
