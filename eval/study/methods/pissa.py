"""PiSSA (arXiv 2404.02948), PEFT's: ``B = U_r √Σ_r``, ``A = √Σ_r V_rᵀ`` from the top r of ``SVD(W)``, the base becomes ``W − B A``."""

from types import MappingProxyType

from corda_eval.study.peft_lora import PeftVariant, refuse_shared
from corda_eval.study.task import Adapted, Task


class Pissa(PeftVariant):
    """Options of PiSSA; base weights are written, the function stays, up to rounding."""

    changes = MappingProxyType({"init_lora_weights": "pissa"})

    def adapt(self, task: Task) -> Adapted:
        """Return the model with PiSSA on the task's layers.

        Raises:
            ValueError: If another module shares a layer's weight, or PEFT cannot adapt these layers.
        """
        refuse_shared(task, "PiSSA")
        return super().adapt(task)
