"""DoRA (arXiv 2402.09353), PEFT's: ``W' = diag(μ) (W + B A) / ‖W + B A‖_row``, μ (m,) from ``‖W‖_row``, A Kaiming, B = 0, all three train.

The norms are taken over each output's weights and pass no gradient (section 4.3 of the paper).
"""

from dataclasses import dataclass, replace

from corda_eval.study.method import Adapted
from corda_eval.study.peft_lora import attach_variant, config_for
from corda_eval.study.task import Task
from corda_vlm.options import Count


@dataclass(frozen=True)
class Dora:
    """Options of DoRA."""

    rank: Count

    def adapt(self, task: Task) -> Adapted:
        """Return the model with DoRA on the task's layers; it starts as the base, up to rounding.

        Raises:
            ValueError: If PEFT cannot adapt these layers.
        """
        return Adapted(attach_variant(task, replace(config_for(task, self.rank), use_dora=True)))
