"""PiSSA (arXiv 2404.02948), PEFT's: ``B = U_r √Σ_r``, ``A = √Σ_r V_rᵀ`` from the top r of ``SVD(W)``, the base becomes ``W − B A``."""

from dataclasses import dataclass, replace

from corda_eval.study.method import Adapted
from corda_eval.study.peft_lora import attach_variant, config_for, refuse_shared
from corda_eval.study.task import Task
from corda_vlm.options import Count


@dataclass(frozen=True)
class Pissa:
    """Options of PiSSA."""

    rank: Count

    def adapt(self, task: Task) -> Adapted:
        """Return the model with PiSSA on the task's layers; base weights are written, the function stays, up to rounding.

        Raises:
            ValueError: If another module shares a layer's weight, or PEFT cannot adapt these layers.
        """
        refuse_shared(task, "PiSSA")
        return Adapted(attach_variant(task, replace(config_for(task, self.rank), init_lora_weights="pissa")))
