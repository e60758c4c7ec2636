"""LoRA (arXiv 2106.09685), PEFT's: A Kaiming, B = 0, alpha = rank. With ``weight_decay`` the baseline "LoRA + weight decay"."""

from dataclasses import dataclass

from corda_eval.study.peft_lora import attach_variant, config_for
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count, NotNegative


@dataclass(frozen=True)
class Lora:
    """Options of LoRA."""

    rank: Count
    weight_decay: NotNegative = 0.0

    def adapt(self, task: Task) -> Adapted:
        """Return the model with LoRA on the task's layers."""
        return Adapted(attach_variant(task, config_for(task, self.rank)), weight_decay=self.weight_decay)
