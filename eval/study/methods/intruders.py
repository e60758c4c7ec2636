"""LoRA, and after its training PEFT's ``reduce_intruder_dimension`` (arXiv 2410.21228).

Among the first ``top_k`` left singular vectors of ``W + ΔW`` those that no singular vector of W resembles are intruders: of their part
of ``W + ΔW``, ``1 − mitigation`` is taken off, and what is left of ΔW is brought back to LoRA's rank.
"""

from dataclasses import dataclass, replace

from peft.tuners.lora.intruders import reduce_intruder_dimension

from corda_eval.study.methods.lora import Lora
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count, NotNegative, Positive


@dataclass(frozen=True)
class Intruders:
    """Options of LoRA with fewer intruders; all but the rank are PEFT's own and as there."""

    rank: Count
    top_k: Count = 10
    epsilon: Positive = 0.5
    """The least cosine with a singular vector of W of what is no intruder."""
    mitigation: NotNegative = 0.75
    """What is left of an intruder."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with LoRA on the task's layers, and what reduces its intruders after the last step."""
        adapted = Lora(self.rank).adapt(task)

        def finish() -> dict[str, float]:
            said: list[str] = []
            reduce_intruder_dimension(
                adapted.model,
                top_k=self.top_k,
                threshold_epsilon=self.epsilon,
                mitigation_lambda=self.mitigation,
                logging_sink=said.append,
            )
            return {"layers_with_intruders": float(sum("Intruders:" in line for line in said))}

        return replace(adapted, finish=finish)
