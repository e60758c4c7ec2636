"""MiLoRA (arXiv 2406.09044): the adapter gets the smallest components of W, whatever the context.

With ``protect: strict`` A is frozen there: what `strict` is without a context.
"""

from dataclasses import dataclass

from corda_core import attach, plan
from corda_core.linears import weight_shape
from corda_core.lora import Protect
from corda_eval.study.starts import even_context
from corda_eval.study.task import Adapted, Task
from corda_vlm.options import Count


@dataclass(frozen=True)
class Milora:
    """Options of MiLoRA."""

    rank: Count
    protect: Protect = Protect.START

    def adapt(self, task: Task) -> Adapted:
        """Return the model with ``B0 A0 = Σ_{i > k−r} σᵢ uᵢ vᵢᵀ`` of ``W = U Σ Vᵀ``, A and B (or B alone) training; unchanged at first.

        This is the decomposition of ``W C`` with C = I: ``B0 = U_S √Σ_S``, ``A0 = √Σ_S V_Sᵀ``, S the last r of k = min(m, n).

        Raises:
            ValueError: If the rank is below 1.

        Note:
            Published as the residual ``W − B0 A0`` plus ``B A``; here ``W + B A − B0 A0``, which is the same function.
        """
        sizes = {name: weight_shape(task.model, name)[1] for name in task.layers}
        contexts = {n: even_context(n) for n in set(sizes.values())}
        start = plan(task.model, {name: contexts[n] for name, n in sizes.items()}, mode="kpm", rank=self.rank, damping=0)
        return Adapted(attach(task.model, start, protect=self.protect))
