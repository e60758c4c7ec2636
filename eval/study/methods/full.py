"""Full fine-tuning: the weights of the task's layers train themselves; biases, norms and embeddings stay, as with all other methods."""

from dataclasses import dataclass

from corda_eval.study.peft_lora import refuse_shared
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import NotNegative


@dataclass(frozen=True)
class Full:
    """Options of full fine-tuning."""

    weight_decay: NotNegative = 0.0

    def adapt(self, task: Task) -> Adapted:
        """Return the model itself, the weights of the task's layers taking gradients.

        Raises:
            ValueError: If another module shares a layer's weight.
        """
        refuse_shared(task, "Full fine-tuning")
        for name in task.layers:
            task.model.get_parameter(f"{name}.weight").requires_grad_(True)
        return Adapted(task.model, weight_decay=self.weight_decay)
