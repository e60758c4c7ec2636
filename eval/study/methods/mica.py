"""MiCA (arXiv 2604.01694), PEFT's: B = the last r left singular vectors of W, frozen; A trains from 0."""

from dataclasses import dataclass, replace

from corda_eval.study.method import Adapted
from corda_eval.study.peft_lora import attach_variant, config_for
from corda_eval.study.task import Task
from corda_vlm.options import Count


@dataclass(frozen=True)
class Mica:
    """Options of MiCA."""

    rank: Count

    def adapt(self, task: Task) -> Adapted:
        """Return the model with MiCA on the task's layers; it starts as the base.

        Raises:
            ValueError: If PEFT cannot adapt these layers.
        """
        return Adapted(attach_variant(task, replace(config_for(task, self.rank), init_lora_weights="mica")))
