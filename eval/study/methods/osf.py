"""OSF (arXiv 2504.07097), PEFT's: the last r singular triples of W train, with gradients off the span of all others.

``W' = U_high Σ_high V_highᵀ + U_low diag(s) V_lowᵀ``; U_low (m, r), s (r,), V_low (n, r) start as W's own, and their gradients are
projected off the spans of U_high and V_high.

Note:
    PEFT's ``effective_rank`` is what is kept, ``min(m, n) − r`` in each layer. AdamW divides the projected gradient entry by entry, so
    its steps do leave the free subspace by a little; PEFT and the authors' code leave that so.
"""

import re
from dataclasses import dataclass

from peft import OSFConfig, get_peft_model

from corda_core.linears import weight_shape
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count


@dataclass(frozen=True)
class Osf:
    """Options of OSF."""

    rank: Count
    """How many of a layer's directions train."""

    def adapt(self, task: Task) -> Adapted:
        """Return the model with OSF on the task's layers; it starts as the base, up to rounding.

        Raises:
            ValueError: If the rank leaves nothing of a layer to keep.
        """
        kept = {name: min(weight_shape(task.model, name)) - self.rank for name in task.layers}
        small = [name for name, count in kept.items() if count < 1]
        if small:
            raise ValueError(f"{small[0]} has no more than {self.rank} directions, none of which OSF would keep; lower the rank.")
        config = OSFConfig(
            target_modules="|".join(re.escape(name) for name in task.layers),  # a string is matched as a whole, a list by endings
            rank_pattern={f"^{re.escape(name)}$": count for name, count in kept.items()},
        )
        return Adapted(get_peft_model(task.model, config))
