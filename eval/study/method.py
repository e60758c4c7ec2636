"""What a study asks of a method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from corda_eval.study.task import Task


@dataclass(frozen=True)
class Adapted:
    """A model made ready for training by a method."""

    model: nn.Module
    """What is trained and called: all its parameters that take gradients. The layers of the task are in ``base_of(model)`` under their
    names, and each is still linear in its input, apart from its bias."""

    penalty: Callable[[], Tensor] | None = None
    """Added to the loss of each step."""

    weight_decay: float = 0.0
    """AdamW's."""


class Method(Protocol):
    """A way to fine-tune: a frozen dataclass of its options, in a file of ``corda_eval.study.methods`` of its own."""

    def adapt(self, task: Task) -> Adapted:
        """Return the task's model made ready; the layers must be those of ``task.layers``.

        Raises:
            ValueError: If an option is not right, or the method cannot adapt such layers.
        """
        ...
