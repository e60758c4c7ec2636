"""Any method on some of the layers alone: attention only (arXiv 2510.08564), gate and up only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from corda_eval.study.methods.keep import ADAPTERS
from corda_eval.study.named import options_of
from corda_eval.study.task import Adapted, Task


@dataclass(frozen=True)
class Part:
    """Options of a method on some layers."""

    adapter: Mapping[str, Any]
    """What trains: ``method`` and its options."""

    layers: str
    """A regular expression, which those of the task's layers contain that may change: "attn", "gate_proj|up_proj"."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with the method on these layers; the others stay as they are.

        Raises:
            ValueError: If no layer contains the expression, or an option is not right.
        """
        chosen = tuple(name for name in task.layers if re.search(self.layers, name))
        if not chosen:
            raise ValueError(f"No layer contains {self.layers!r}; expected part of a name such as {task.layers[0]}.")
        adapted: Adapted = options_of(self.adapter, "method", ADAPTERS, "adapter").adapt(replace(task, layers=chosen))
        return adapted
