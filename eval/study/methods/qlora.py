"""QLoRA (arXiv 2305.14314): the base weights of the task's layers in nf4 with doubly quantised scales, PEFT's LoRA on them.

The function at the start is that of the quantised weights, not the base's.
"""

from dataclasses import dataclass
from typing import Any

from corda_core.linears import quantize_linears_
from corda_eval.study.peft_lora import attach_variant, config_for
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count


@dataclass(frozen=True)
class Qlora:
    """Options of QLoRA."""

    rank: Count

    def adapt(self, task: Task) -> Adapted:
        """Return the model with LoRA on the task's layers, which bitsandbytes holds in 4 bits from here on.

        Raises:
            ModuleNotFoundError: If bitsandbytes is not installed; names the extra that brings it.
            ValueError: If a layer cannot be held in 4 bits.
        """
        base: Any = task.model
        config = config_for(task, self.rank)
        quantize_linears_(base, task.layers, "nf4")
        for name in task.layers:
            # bitsandbytes' own switch: else some CPUs pack the weights anew when they are measured, and no gradient passes them then.
            base.get_submodule(name).support_avx512bf16_for_cpu = False
        base.is_loaded_in_4bit = True  # where PEFT looks for whether to take its own layers for them
        model = attach_variant(task, config)
        base.is_loaded_in_4bit = False  # transformers would look for its own quantiser
        return Adapted(model)
