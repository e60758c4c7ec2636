"""An adapter whose outputs move no further on a context than a bound: ``corda_core.drift.DriftBound``, after each step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from corda_core.drift import DriftBound
from corda_eval.study.methods.keep import ADAPTERS
from corda_eval.study.named import options_of
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Positive


@dataclass(frozen=True)
class Bounded:
    """Options of a bound."""

    adapter: Mapping[str, Any]
    """What trains: ``method`` and its options."""

    max_drift: Positive
    """Root mean square over the layers of ``‖ΔW C^(1/2)‖ / ‖W C^(1/2)‖``."""

    context: Sequence[str] = ()
    """Domains that C is taken from; without any it is what the adapter's own plan knows, or all that is kept where it has none (LoRA)."""

    def adapt(self, task: Task) -> Adapted:
        """Return the adapter, and what takes it back when it is above the bound.

        Raises:
            ValueError: If an option is not right, or the setting lacks a domain.
        """
        domains = self.context or (task.default_context("kpm") if self.adapter.get("method") == "lora" else ())
        covariances = task.covariances(*domains) if domains else None
        adapted: Adapted = options_of(self.adapter, "method", ADAPTERS, "adapter").adapt(task)
        bound = DriftBound(adapted.model, self.max_drift, covariances)
        return replace(adapted, after_step=bound.hold_, finish=lambda: {"drift": bound.drift()})
